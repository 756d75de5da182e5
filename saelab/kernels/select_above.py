"""Choosing all pre-activations above a threshold, tile by tile, without gradient: codes with ragged rows."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.core.code import SparseCode
from saelab.kernels.dispatch import Impl, use_sparse, use_triton
from saelab.kernels.product import product
from saelab.kernels.segments import entry_dots, pick
from saelab.kernels.select import Precision, tile_rows


class Entries(NamedTuple):
    """Chosen entries of the (N, d_sae) matrix of pre-activations, in CSR form."""

    indices: Int[Tensor, " nnz"]
    """Feature of each entry."""
    values: Float[Tensor, " nnz"]
    """Pre-activation of each entry."""
    offsets: Int[Tensor, " n_plus_1"]
    """First entry of each token."""

    def code(self, d_sae: int) -> SparseCode:
        """The entries as a code, values as they are."""
        return SparseCode(self.indices, self.values, self.offsets, d_sae)


@torch.no_grad()
def select_above(
    x: Float[Tensor, "n d_in"],
    w_enc_t: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    threshold: Float[Tensor, ""] | Float[Tensor, " d_sae"],
    *,
    precision: Precision = "f32",
    impl: Impl = "auto",
) -> Entries:
    """Select every entry of ``z = x @ w_enc_t.T + b_enc`` with ``z > threshold`` (one for all features, or one each).

    The size of the result is what the data make it; only a tile of z exists at a time. ``precision="bf16"`` takes as
    candidates what a bfloat16 product puts above the threshold or up to six standard errors of it below, and recomputes
    them: values are exact and so is every entry that is there, but one just above its threshold may be missing. The
    reference ignores it.
    """
    n, d_sae = x.shape[0], w_enc_t.shape[0]
    if not use_sparse(impl):
        pre = x @ w_enc_t.T + b_enc
        return entries_of((pre > threshold).view(-1).nonzero().squeeze(1), pre.view(-1), n, d_sae)
    half = precision == "bf16" and x.dtype != torch.bfloat16
    left, right, bias = (t.to(torch.bfloat16) if half else t for t in (x, w_enc_t, b_enc))
    least = threshold - _bf16_error(x, w_enc_t, b_enc, threshold) if half else threshold
    least = torch.nextafter(least, torch.full_like(least, math.inf)).to(left.dtype)  # z > t: z >= the next after t
    rows = tile_rows(n, d_sae)
    buffer = torch.empty(rows, d_sae, dtype=left.dtype, device=x.device)
    places, values = [], []
    for start in range(0, n, rows):
        tile = product(left[start : start + rows], right, bias, out=buffer[: min(rows, n - start)])
        found = positions_from(tile, least, impl=impl)
        if not half:
            values.append(pick(tile.view(-1), found))
        places.append(found.add_(start * d_sae))
    place = torch.cat(places) if places else torch.zeros(0, dtype=torch.int64, device=x.device)
    if half:
        return _recomputed(place, x, w_enc_t, b_enc, threshold, impl)
    return entries_at(place, torch.cat(values) if values else x.new_zeros(0), n, d_sae)


def _bf16_error(
    x: Float[Tensor, "n d_in"],
    w_enc_t: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    threshold: Float[Tensor, ""] | Float[Tensor, " d_sae"],
) -> Float[Tensor, ""]:
    """Return six standard errors of a bfloat16 product with typical rows, and the rounding of what is added to it.

    Each factor is rounded by a relative error spread evenly over +-2^-9, which adds up like a random walk.
    """
    if x.numel() == 0:
        return x.new_zeros(())
    norms = x.square().sum(1).mean().sqrt() * w_enc_t.square().sum(1).mean().sqrt()
    rounding = norms * (2.0**-9 * math.sqrt(2 / 3 / x.shape[1]))
    error: Tensor = 6 * rounding + 2.0**-8 * (b_enc.abs().max() + 2 * threshold.abs().max())
    return error


def _recomputed(  # noqa: PLR0917
    place: Int[Tensor, " candidates"],
    x: Float[Tensor, "n d_in"],
    w_enc_t: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    threshold: Float[Tensor, ""] | Float[Tensor, " d_sae"],
    impl: Impl,
) -> Entries:
    """Return the candidates that are above their threshold in full precision."""
    n, d_sae = x.shape[0], w_enc_t.shape[0]
    rows = place.div(d_sae, rounding_mode="floor")
    indices = place - rows * d_sae
    exact = entry_dots(x, w_enc_t, indices, rows, impl=impl) + pick(b_enc, indices)
    keep = (exact > (threshold if threshold.ndim == 0 else pick(threshold, indices))).nonzero().squeeze(1)
    return entries_at(pick(place, keep), pick(exact, keep), n, d_sae)


def positions_from(
    tile: Float[Tensor, "n d_sae"],
    least: Float[Tensor, ""] | Float[Tensor, " d_sae"],
    group: int = 16,
    impl: Impl = "auto",
) -> Int[Tensor, " found"]:
    """Return flat positions of the entries ``>= least`` of a contiguous matrix, row by row (in no order within a row).

    With one bound for all, the columns are dealt into groups of ``group``; the maximum of each is a fast vectorised
    pass, and only groups that reach the bound are looked at entry by entry.
    """
    if use_triton(impl, tile.device):
        from saelab.kernels import triton_positions

        return triton_positions.positions_from(tile, least)
    n, d_sae = tile.shape
    while group > 2 and d_sae % group:
        group //= 2
    groups = d_sae // group
    if least.ndim == 0 and group > 2:
        # Group i holds columns i, i + groups, i + 2 groups ...
        hit = (tile.as_strided((n, group, groups), (d_sae, groups, 1)).amax(1) >= least).view(-1).nonzero().squeeze(1)
        if hit.numel() * 4 < n * groups:
            first = hit + hit.div(groups, rounding_mode="floor") * (d_sae - groups)
            candidates = (first.unsqueeze(1) + torch.arange(group, device=tile.device) * groups).view(-1)
            return candidates[pick(tile.view(-1), candidates) >= least]
    return (tile >= least).view(-1).nonzero().squeeze(1)


def entries_of(place: Int[Tensor, " nnz"], pre: Float[Tensor, " all"], n: int, d_sae: int) -> Entries:
    """Return the entries at flat positions ``place`` (row by row) of flattened pre-activations."""
    return entries_at(place, pre[place], n, d_sae)


def entries_at(place: Int[Tensor, " nnz"], values: Float[Tensor, " nnz"], n: int, d_sae: int) -> Entries:
    """Return entries from flat positions ``token * d_sae + feature``, which come token by token."""
    rows = place.div(d_sae, rounding_mode="floor")
    counts = torch.bincount(rows, minlength=n)
    return Entries(place - rows * d_sae, values, torch.cat([counts.new_zeros(1), counts.cumsum(0)]))
