"""Triton twin of :func:`saelab.kernels.select_above.positions_from`: where a tile reaches a bound.

Two passes, one program per row: count, then (with the rows' starts known) write. Positions come in ascending order.
"""

# Kernels are in Triton's own language, whose types mypy does not know.
# ruff: noqa: PLR0917
# mypy: disable-error-code="import-untyped,import-not-found,no-untyped-def,attr-defined"

import torch
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from saelab.kernels.triton_common import autotuned, kernel, on_device


@autotuned({"BLOCK": 2048, "num_warps": 8}, {"BLOCK": 4096, "num_warps": 16}, key=["d_sae"])
@kernel
def _count(tile, least, counts, d_sae, per_column, ACC: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = 0
    for start in range(0, d_sae, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < d_sae
        value = tl.load(tile + row * d_sae + column, mask=inside, other=0.0).to(ACC)
        bound = tl.load(least + column * per_column, mask=inside, other=0.0).to(ACC)
        total += tl.sum((inside & (value >= bound)).to(tl.int32), axis=0)
    tl.store(counts + row, total.to(tl.int64))


@autotuned({"BLOCK": 2048, "num_warps": 8}, {"BLOCK": 4096, "num_warps": 16}, key=["d_sae"])
@kernel
def _write(tile, least, starts, places, d_sae, per_column, ACC: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    written = tl.load(starts + row)
    for start in range(0, d_sae, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < d_sae
        value = tl.load(tile + row * d_sae + column, mask=inside, other=0.0).to(ACC)
        bound = tl.load(least + column * per_column, mask=inside, other=0.0).to(ACC)
        keep = (inside & (value >= bound)).to(tl.int32)
        tl.store(places + written + tl.cumsum(keep, axis=0) - 1, row * d_sae + column, mask=keep != 0)
        written += tl.sum(keep, axis=0)


def positions_from(
    tile: Float[Tensor, "n d_sae"], least: Float[Tensor, ""] | Float[Tensor, " d_sae"]
) -> Int[Tensor, " found"]:
    """Return flat positions of the entries ``>= least`` of a matrix, in ascending order."""
    n, d_sae = tile.shape
    counts = torch.zeros(n, dtype=torch.int64, device=tile.device)
    if n == 0 or d_sae == 0:
        return counts.new_zeros(0)
    tile, least = tile.contiguous(), least.contiguous()
    accumulator = tl.float64 if tile.dtype == torch.float64 else tl.float32
    with on_device(tile):
        _count[(n,)](tile, least, counts, d_sae, least.ndim, accumulator)
        ends = counts.cumsum(0)
        places = torch.empty(int(ends[-1]), dtype=torch.int64, device=tile.device)
        _write[(n,)](tile, least, ends - counts, places, d_sae, least.ndim, accumulator)
    return places
