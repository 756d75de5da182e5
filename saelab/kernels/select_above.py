"""Choosing all pre-activations above a threshold, tile by tile, without gradient: codes with ragged rows."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.core.code import SparseCode
from saelab.kernels.dispatch import Impl, use_sparse, use_triton
from saelab.kernels.select import tile_rows


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
    impl: Impl = "auto",
) -> Entries:
    """Select every entry of ``z = x @ w_enc_t.T + b_enc`` with ``z > threshold`` (one for all features, or one each).

    The size of the result is what the data make it; only a tile of z exists at a time.
    """
    n, d_sae = x.shape[0], w_enc_t.shape[0]
    if not use_sparse(impl):
        pre = x @ w_enc_t.T + b_enc
        return entries_of((pre > threshold).view(-1).nonzero().squeeze(1), pre.view(-1), n, d_sae)
    least = torch.nextafter(threshold, torch.full_like(threshold, math.inf))  # z > t is z >= the next float after t
    rows = tile_rows(n, d_sae)
    buffer = torch.empty(rows, d_sae, dtype=x.dtype, device=x.device)
    places, values = [], []
    for start in range(0, n, rows):
        tile = torch.addmm(b_enc, x[start : start + rows], w_enc_t.T, out=buffer[: min(rows, n - start)])
        found = positions_from(tile, least, impl=impl)
        values.append(tile.view(-1)[found])
        places.append(found.add_(start * d_sae))
    place = torch.cat(places) if places else torch.zeros(0, dtype=torch.int64, device=x.device)
    return entries_at(place, torch.cat(values) if values else x.new_zeros(0), n, d_sae)


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
            return candidates[tile.view(-1)[candidates] >= least]
    return (tile >= least).view(-1).nonzero().squeeze(1)


def entries_of(place: Int[Tensor, " nnz"], pre: Float[Tensor, " all"], n: int, d_sae: int) -> Entries:
    """Return the entries at flat positions ``place`` (row by row) of flattened pre-activations."""
    return entries_at(place, pre[place], n, d_sae)


def entries_at(place: Int[Tensor, " nnz"], values: Float[Tensor, " nnz"], n: int, d_sae: int) -> Entries:
    """Return entries from flat positions ``token * d_sae + feature``, which come token by token."""
    rows = place.div(d_sae, rounding_mode="floor")
    counts = torch.bincount(rows, minlength=n)
    return Entries(place - rows * d_sae, values, torch.cat([counts.new_zeros(1), counts.cumsum(0)]))
