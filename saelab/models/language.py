"""How good a language model is: bits per byte of text, and the induction score."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from saelab.core.errors import TextError


@dataclass(frozen=True)
class Compression:
    """How well a model predicts text."""

    nats: float
    """Total negative log-likelihood of all tokens, in nats."""
    tokens: int
    """Tokens predicted: all tokens of all documents, the first one given BOS alone."""
    utf8_bytes: int
    """Length of the text in UTF-8."""

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of a token, in nats."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """``nats / ln 2 / bytes``: comparable between tokenizers and with file compressors."""
        return self.nats / math.log(2) / self.utf8_bytes

    def to_dict(self) -> dict[str, float]:
        """The fields and both rates."""
        return {**asdict(self), "loss": self.loss, "bits_per_byte": self.bits_per_byte}


@dataclass(frozen=True)
class Induction:
    """Loss on sequences of random tokens followed by themselves (Olsson et al. 2022, arXiv:2209.11895)."""

    first: float
    """Mean loss on the first occurrence, in nats (about ``ln d_vocab`` or worse: the tokens are random)."""
    second: float
    """Mean loss on the repetition, in nats; low for a model that finds and continues the earlier occurrence."""
    accuracy: float
    """Share of the repeated tokens that are the model's first choice."""

    @property
    def score(self) -> float:
        """``first - second`` in nats: what having seen the sequence before is worth."""
        return self.first - self.second

    def to_dict(self) -> dict[str, float]:
        """The fields and the score."""
        return {**asdict(self), "score": self.score}


def compression(
    model: Any, tokenizer: Any, documents: Iterable[str], *, context: int, stride: int | None = None, rows: int = 8
) -> Compression:
    """Measure how well a Hugging Face causal LM predicts ``documents``.

    Every document is its BOS token followed by its tokens, read through windows of ``context`` tokens that move on by
    ``stride`` (half a window unless given). Each token is predicted once, in the first window that holds it, so all
    but a document's first ``context`` tokens see at least ``context - stride`` tokens before them.

    Raises:
        TextError: the documents hold no tokens.

    """
    nats, tokens, size = 0.0, 0, 0

    def counted() -> Iterator[str]:
        nonlocal size
        for document in documents:
            size += len(document.encode())
            yield document

    for logits, targets in predictions(model, tokenizer, counted(), context=context, stride=stride, rows=rows):
        nats += F.cross_entropy(logits, targets, reduction="sum").item()
        tokens += len(targets)
    if tokens == 0:
        raise TextError("the documents hold no token to predict; give a text that is not empty")
    return Compression(nats=nats, tokens=tokens, utf8_bytes=size)


@torch.inference_mode()
def predictions(
    model: Any, tokenizer: Any, documents: Iterable[str], *, context: int, stride: int | None = None, rows: int = 8
) -> Iterator[tuple[Float[Tensor, "n vocab"], Int[Tensor, " n"]]]:
    """Yield logits and the tokens that came, for every token of every document once, in order (see compression)."""
    stride = stride or context // 2
    pending: list[tuple[Tensor, Tensor]] = []

    def flush() -> tuple[Tensor, Tensor]:
        inputs = torch.nn.utils.rnn.pad_sequence([a for a, _ in pending], batch_first=True)
        targets = torch.nn.utils.rnn.pad_sequence([b for _, b in pending], batch_first=True, padding_value=-100)
        pending.clear()
        hit = targets != -100
        return model(input_ids=inputs, use_cache=False).logits[hit].float(), targets[hit]

    for document in documents:
        ids = torch.tensor([tokenizer.bos_token_id, *tokenizer.backend_tokenizer.encode(document).ids])
        for start, scored in windows(len(ids) - 1, context, stride):
            targets = ids[start + 1 : start + context + 1].clone()
            targets[: len(targets) - scored] = -100
            pending.append((ids[start : start + len(targets)], targets))
            if len(pending) == rows:
                yield flush()
    if pending:
        yield flush()


def windows(n: int, context: int, stride: int) -> list[tuple[int, int]]:
    """Cover ``n`` predictions by windows of ``context``: pairs (first position, how many of the last are scored)."""
    result = []
    start = done = 0
    while done < n:
        end = min(start + context, n)
        result.append((start, end - done))
        done = end
        start += stride
    return result


@torch.inference_mode()
def induction(
    model: Any, tokens: Int[Tensor, " vocab"], bos: int, *, length: int = 64, sequences: int = 64, seed: int = 0
) -> Induction:
    """Measure induction: BOS, ``length`` random tokens, the same tokens again.

    Args:
        model: a Hugging Face causal LM.
        tokens: ids to draw from, uniformly and independently (all but the special ones, usually).
        bos: id at the beginning of each sequence.
        length: tokens in the repeated part; ``2 * length + 1`` must fit in the context.
        sequences: how many sequences to average over.
        seed: of the draw.

    """
    generator = torch.Generator().manual_seed(seed)
    part = tokens[torch.randint(len(tokens), (sequences, length), generator=generator)]
    ids = torch.cat([torch.full((sequences, 1), bos), part, part], dim=1)
    logits: Float[Tensor, "sequences positions vocab"] = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
    losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    # The repetition's first token cannot be foreseen: nothing says that the first part is over.
    second = losses[:, length + 1 :]
    right = logits.argmax(-1)[:, length + 1 :] == ids[:, length + 2 :]
    return Induction(
        first=losses[:, :length].mean().item(), second=second.mean().item(), accuracy=right.float().mean().item()
    )
