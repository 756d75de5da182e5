"""The model's losses at the tokens of a store: the store's text is read again, and must be the same."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int
from torch import Tensor

from saelab.analysis.dark_matter.tokens import Tokens
from saelab.core.errors import StoreError
from saelab.core.progress import progress
from saelab.features.protocols import Model, Rows

LOGIT_BYTES = 256 << 20
"""Rows of text go through the model so that one float32 logit tensor stays below this."""


class Contexts(NamedTuple):
    """Some rows of text, and the chosen tokens in them."""

    tokens: Int[Tensor, "b t"]
    """Token ids."""
    keep: Bool[Tensor, "b t"]
    """False at BOS, padding and other special tokens."""
    where: Bool[Tensor, "b t"]
    """True at the chosen tokens."""
    places: Int[Tensor, " n"]
    """Places of the chosen tokens among all chosen ones, in the order of ``where``."""
    context: Int[Tensor, " b"]
    """Number of each row."""


def contexts_of(rows: Rows, tokens: Tokens, rows_per_batch: int) -> Iterator[Contexts]:
    """Yield the rows of text that hold chosen tokens. Raises :class:`StoreError` when the text is another."""
    first, last = int(tokens.context[0]), int(tokens.context[-1])
    row = first
    batches = rows.batches(rows_per_batch, start_row=first)
    try:
        for batch in batches:
            n, length = batch.tokens.shape
            numbers = torch.arange(row, row + n)
            begin, end = torch.searchsorted(tokens.context, torch.tensor([row, row + n])).tolist()
            index = torch.arange(begin, end)
            local, position = tokens.context[begin:end] - row, tokens.position[begin:end]
            row += n
            if index.numel():
                if int(position.max()) >= length or not torch.equal(
                    batch.tokens[local, position], tokens.token_id[begin:end]
                ):
                    raise _other_text(int(numbers[0]))
                where = torch.zeros(n, length, dtype=torch.bool)
                where[local, position] = True
                some = where.any(1)
                yield Contexts(batch.tokens[some], batch.keep[some], where[some], index, numbers[some])
            if row > last:
                return
    finally:
        close = getattr(batches, "close", None)
        if close is not None:
            close()
    raise _other_text(row)


def _other_text(row: int) -> StoreError:
    return StoreError(
        f"the text is not the one the store was harvested from (row {row} differs); give --text and --tokens as in "
        "the harvest, or --model_parts false"
    )


def batch_rows(d_vocab: int, context: int, most: int = 16) -> int:
    """Rows whose logits fit into ``LOGIT_BYTES``."""
    return max(1, min(most, LOGIT_BYTES // (4 * d_vocab * context)))


@torch.no_grad()
def token_losses(model: Model, rows: Rows, tokens: Tokens, rows_per_batch: int) -> dict[str, Float32[np.ndarray, " n"]]:
    """Return, for each chosen token, two losses of the untouched model in nats.

    ``loss``: of the prediction made at the token (of the next one), nan where there is no next kept token.
    ``surprisal``: of the token itself, given those before it.
    """
    found = {name: np.full(tokens.n, np.nan, np.float32) for name in ("loss", "surprisal")}
    with progress("model loss", tokens.n) as bar:
        for part in contexts_of(rows, tokens, rows_per_batch):
            nats = losses(model.logits(part.tokens), part.tokens)
            at, before = torch.full_like(nats, torch.nan), torch.full_like(nats, torch.nan)
            at[:, :-1] = torch.where(part.keep[:, 1:], nats[:, 1:], torch.nan)
            before[:, 1:] = nats[:, 1:]
            index = part.places.numpy()
            found["loss"][index] = at[part.where].numpy()
            found["surprisal"][index] = before[part.where].numpy()
            bar.advance(len(index))
    return found


def losses(logits: Tensor, tokens: Int[Tensor, "b t"]) -> Float32[Tensor, "b t"]:
    """Loss of each token given those before it; nan at position 0."""
    result = torch.full(tokens.shape, torch.nan)
    for k in range(tokens.shape[0]):
        log_p = logits[k, :-1].float().log_softmax(-1)
        result[k, 1:] = -log_p.gather(-1, tokens[k, 1:, None].to(log_p.device)).squeeze(-1).cpu()
    return result
