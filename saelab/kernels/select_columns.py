"""Choosing the m_i largest pre-activations of each feature over a batch of tokens (Feature-Choice), without gradient.

Tiles are sets of features with all their tokens, computed as ``w_enc_t[features] @ x.T``, so that a column of the
(N, d_sae) matrix is a row of the tile. Features are gone through in classes of similar quota (a factor 2), as each row
of a tile is searched for the same number of entries.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.kernels.dispatch import Impl, use_sparse
from saelab.kernels.product import product
from saelab.kernels.segments import entry_dots
from saelab.kernels.select import BF16_MARGIN, Precision, row_topk, tile_rows
from saelab.kernels.select_above import Entries, entries_at


class Columns(NamedTuple):
    """What :func:`select_columns` finds."""

    entries: Entries
    """The chosen entries."""
    border: Float[Tensor, " d_sae"]
    """Midway between each feature's least chosen and largest refused z; +inf for a quota of 0 and without tokens."""
    demand: Int[Tensor, " d_sae"]
    """Tokens of each feature with z above the level that was asked about, chosen or not."""


@torch.no_grad()
def select_columns(
    x: Float[Tensor, "n d_in"],
    w_enc_t: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    quotas: Int[Tensor, " d_sae"],
    level: Float[Tensor, ""] | None = None,
    *,
    precision: Precision = "f32",
    impl: Impl = "auto",
) -> Columns:
    """Select, for each feature i, the ``quotas[i]`` tokens with the largest ``z = x @ w_enc_t.T + b_enc``.

    Exactly ``quotas[i]`` (at most n) entries, whatever their sign; ties are broken in a fixed but unspecified way.
    ``level``: count for each feature the tokens with z above it. ``precision="bf16"`` takes 8 further candidates per
    feature from a bfloat16 product and recomputes them; counts are then bfloat16's. The reference ignores it.
    """
    n, d_sae = x.shape[0], w_enc_t.shape[0]
    quotas = quotas.clamp(max=n)
    border = torch.full((d_sae,), torch.inf, dtype=x.dtype, device=x.device)
    demand = torch.zeros(d_sae, dtype=torch.int64, device=x.device)
    half = precision == "bf16" and use_sparse(impl)
    left, w = (t.to(torch.bfloat16) if half else t for t in (x, w_enc_t))
    places, values = [], []
    for features, widest in _pieces(quotas, n, tiled=use_sparse(impl)):
        # The bias of a feature is the same for all tokens of a row, so it is left out until something is chosen.
        tile = product(w[features], left) if use_sparse(impl) else w[features] @ left.T
        shift = b_enc[features].unsqueeze(1)
        wide = min(n, widest + (BF16_MARGIN if half else 1))
        value, token = _top(tile, wide, impl)
        if half:
            value = entry_dots(x, w_enc_t, features.repeat_interleave(wide), token.view(-1), impl=impl).view(
                token.shape
            )
        value = value + shift
        if level is not None:
            demand[features] = tile.gt_((level - shift).to(tile.dtype)).sum(1, dtype=torch.float32).to(torch.int64)
        value, order = value.sort(dim=1, descending=True, stable=True)
        quota = quotas[features].unsqueeze(1)
        border[features] = _midway(value, quota)
        keep = (torch.arange(wide, device=x.device) < quota).view(-1).nonzero().squeeze(1)
        places.append((token.gather(1, order) * d_sae + features.unsqueeze(1)).view(-1)[keep])
        values.append(value.reshape(-1)[keep])
    place = torch.cat(places) if places else torch.zeros(0, dtype=torch.int64, device=x.device)
    place, order = place.sort()
    value = torch.cat(values)[order] if values else x.new_zeros(0)
    return Columns(entries_at(place, value, n, d_sae), border, demand)


def _pieces(quotas: Int[Tensor, " d_sae"], n: int, *, tiled: bool) -> list[tuple[Int[Tensor, " piece"], int]]:
    """Return the tiles: sets of features and the largest quota in each. Features without a quota count demand only."""
    d_sae = quotas.numel()
    if n == 0:
        return []
    if not tiled:
        return [(torch.arange(d_sae, device=quotas.device), int(quotas.max()))]
    # A quota of q is of class floor(log2(q)) + 1, and 0 of class 0.
    classes = torch.frexp(quotas.double()).exponent.to(torch.int64)
    order = classes.sort(stable=True).indices
    counts = torch.bincount(classes).tolist()
    rows, start, pieces = tile_rows(d_sae, n), 0, []
    for count in counts:
        for first in range(start, start + count, rows):
            features = order[first : min(first + rows, start + count)]
            pieces.append((features, int(quotas[features].max())))
        start += count
    return pieces


def _top(tile: Float[Tensor, "piece n"], wide: int, impl: Impl) -> tuple[Tensor, Tensor]:
    if use_sparse(impl):
        return row_topk(tile, wide, impl)
    values, tokens = tile.topk(wide, dim=1)
    return values, tokens


def _midway(ordered: Float[Tensor, "piece wide"], quota: Int[Tensor, "piece 1"]) -> Float[Tensor, " piece"]:
    """Return the mean of the last chosen and the first refused of each row; the last chosen if none is refused."""
    last = ordered.gather(1, (quota - 1).clamp(min=0))
    first_refused = ordered.gather(1, quota.clamp(max=ordered.shape[1] - 1))
    return torch.where(quota > 0, (last + first_refused) / 2, torch.inf).squeeze(1)
