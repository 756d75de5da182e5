"""Pairs of activations for contrastive SAEs, from a file of paired texts or from any text.

From a file (.jsonl or .parquet), a pair is two texts: the activation at the last token of either, and, with a
``context`` column, the activation at the last token of what both begin with.

From any text, a pair is a fork in the road: at a random position t, the positive side is the activation after the
token that really follows, the negative side the one after the token that the model would rather have seen there (the
most probable one that is wrong); the context is the activation at t. This is the language-model reading of "optimal and
sub-optimal rollout from one root", ours.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from saelab.core.config import Config
from saelab.core.errors import MissingFileError, TextError, nearest
from saelab.core.progress import progress
from saelab.workflows.corpus import CorpusJob

if TYPE_CHECKING:
    from saelab.models.subject import SubjectModel


FIRST_PAIRS = 32_768
"""Pairs that room is made for at first."""


class PairColumns(Config):
    """Columns of a file of paired texts."""

    positive: str = "positive"
    """Column of the positive text."""
    negative: str = "negative"
    """Column of the negative text."""
    context: str | None = None
    """Column of the text that both begin with; it is put before them."""


class PairsJob(CorpusJob):
    """Where pairs come from."""

    file: str | None = None
    """File of paired texts (.jsonl, .parquet); null: forks of ``text``."""
    columns: PairColumns = PairColumns()
    """Its columns."""
    with_context: bool = True
    """Put the activation of the context before either side (where there is a context); d_in is then twice as wide."""
    max_pairs: int = Field(default=20_000, ge=1)
    """Number of pairs."""
    per_row: int = Field(default=4, ge=1)
    """Forks in each row of text."""
    rows_per_batch: int = Field(default=32, ge=1)
    """Rows of text in one forward pass."""

    def width(self, width: int) -> int:
        """Return d_in for activations of a width."""
        has_context = self.with_context and (self.file is None or self.columns.context is not None)
        return 2 * width if has_context else width


@dataclass(frozen=True, eq=False)
class Pairs:
    """Paired activations."""

    positive: Float[Tensor, "n d"]
    """One side."""
    negative: Float[Tensor, "n d"]
    """The other."""
    context: Float[Tensor, "n d"] | None
    """What both begin with."""
    about: dict[str, Any]
    """Where they come from."""


def collect_pairs(job: PairsJob, model: "SubjectModel", site: str, seed: int = 0) -> Pairs:
    """Run the model and return the pairs of ``job``. Raises :class:`TextError` when there are none."""
    parts = _from_file(job, model, site) if job.file is not None else _forks(job, model, site, seed)
    # Written into place: small tensors that are kept, one after each batch, split the heap that the next batch's large
    # ones come from, and the process grows by gigabytes.
    found: list[Tensor | None] = [None, None, None]
    have = 0
    with progress("pairs", job.max_pairs, "pairs") as bar:
        for part in parts:
            n = min(part[0].shape[0], job.max_pairs - have)
            for k, value in enumerate(part):
                if value is None:
                    continue
                kept = found[k]
                if kept is None:
                    kept = torch.empty(min(job.max_pairs, FIRST_PAIRS), value.shape[1])
                while len(kept) < have + n:  # doubled, since a file may hold far fewer than max_pairs
                    kept = torch.cat([kept, torch.empty_like(kept)])
                kept[have : have + n] = value[:n]
                found[k] = kept
            have += n
            bar.advance(part[0].shape[0])
            if have >= job.max_pairs:
                break
    positive, negative, context = (None if kept is None else kept[:have] for kept in found)
    if positive is None or negative is None or not have:
        raise TextError(f"{job.file or job.text} gives no pairs; give a longer text, or another --pairs.file")
    if job.width(1) == 1:
        context = None
    text = job.file if job.file is not None else job.text
    return Pairs(positive, negative, context, {"text": text, "kind": "file" if job.file else "forks", "n": have})


def fingerprint(pairs: Pairs) -> str:
    """Hash of the activations, by which a resumed run knows them again."""
    digest = hashlib.sha256()
    for tensor in (pairs.positive, pairs.negative, pairs.context):
        if tensor is not None:
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


Part = tuple[Tensor, Tensor, Tensor | None]


def _forks(job: PairsJob, model: "SubjectModel", site: str, seed: int) -> Iterator[Part]:
    generator = torch.Generator().manual_seed(seed)
    for batch in job.rows(model).batches(job.rows_per_batch):
        tokens, keep = batch.tokens, batch.keep
        forks = keep[:, :-1] & keep[:, 1:]
        clean = model.read(tokens, [site])[site]
        guesses = model.logits(tokens)[:, :-1]
        guesses = guesses.scatter(2, tokens[:, 1:, None].to(guesses.device), -torch.inf).argmax(2)
        for _ in range(job.per_row):
            # rows that have no fork left drop out; a fork is drawn without replacement
            rows = forks.any(1).nonzero().squeeze(1)
            if not rows.numel():
                break
            at = torch.multinomial(forks[rows].float(), 1, generator=generator).squeeze(1)
            forks[rows, at] = False
            changed = tokens[rows].clone()
            changed[torch.arange(len(rows)), at + 1] = guesses[rows.to(guesses.device), at.to(guesses.device)].cpu()
            other = model.read(changed, [site])[site]
            here = torch.arange(len(rows))
            yield clean[rows, at + 1], other[here, at + 1], clean[rows, at]


def _from_file(job: PairsJob, model: "SubjectModel", site: str) -> Iterator[Part]:
    assert job.file is not None
    columns = job.columns
    records = iter(_records(Path(job.file), [c for c in (columns.positive, columns.negative, columns.context) if c]))
    while group := list(islice(records, job.rows_per_batch)):
        begin = [str(r[columns.context]) if columns.context else "" for r in group]
        sides = [
            _last(model, site, [a + str(r[name]) for a, r in zip(begin, group, strict=True)])
            for name in (columns.positive, columns.negative)
        ]
        yield sides[0], sides[1], _last(model, site, begin) if columns.context else None


def _records(path: Path, names: list[str]) -> Iterator[dict[str, Any]]:
    import pandas as pd

    if not path.is_file():
        raise MissingFileError(f"file of pairs not found: {path}; give a .jsonl or .parquet file")
    frame = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_json(path, lines=True)
    for name in names:
        if name not in frame:
            raise TextError(f"{path} has no column '{name}'{nearest(name, frame.columns)}; name it in pairs.columns")
    for record in frame[names].to_dict("records"):
        yield {str(name): value for name, value in record.items()}


def _last(model: "SubjectModel", site: str, texts: list[str]) -> Float[Tensor, "n d"]:
    """Activation at the last token of each text, which begins with BOS where the model has one."""
    tokenizer = model.tokenizer
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = [(bos + tokenizer(text, add_special_tokens=False)["input_ids"])[: model.n_ctx] for text in texts]
    if not all(ids):
        raise TextError("a text of a pair has no tokens; leave such pairs out")
    length = max(map(len, ids))
    tokens: Int[Tensor, "n t"] = torch.tensor([row + [row[-1]] * (length - len(row)) for row in ids])
    ends = torch.tensor([len(row) - 1 for row in ids])
    # What is after the end of a text is seen by nothing that is read: the model is causal.
    return model.read(tokens, [site])[site][torch.arange(len(ids)), ends]
