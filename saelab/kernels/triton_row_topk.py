"""Triton twin of :func:`saelab.kernels.select.row_topk`: the k largest of each row by radix search.

One program per row. Floats become integers of the same order; the k-th largest is found digit by digit (8 bits each)
from histograms of the row: 2 passes for bfloat16, 4 for float32, none of which writes anything. A last pass writes what
is above it, and of its equals the first ones, so that the choice is exact, in column order, and always the same. Rows
of a tile come from the L2 cache of a GPU after the first pass.
"""

# Kernels are in Triton's own language, whose types mypy does not know.
# ruff: noqa: PLR0917
# mypy: disable-error-code="import-untyped,import-not-found,no-untyped-def,attr-defined"

import torch
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from saelab.kernels.triton_common import autotuned, kernel, key_bits, on_device, ordered_key


@autotuned(
    {"BLOCK": 2048, "num_warps": 8},
    {"BLOCK": 1024, "num_warps": 4},
    {"BLOCK": 4096, "num_warps": 16},
    {"BLOCK": 8192, "num_warps": 16},
    key=["d_sae"],
)
@kernel
def _row_topk(tile, values, columns, d_sae, k, BITS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    digits = tl.arange(0, 256)
    wanted = k
    least = tl.zeros([1], dtype=tl.uint64 if BITS == 64 else tl.uint32)
    for above in tl.static_range(0, BITS, 8):  # bits that are known
        counts = tl.zeros([256], dtype=tl.int32)
        for start in range(0, d_sae, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < d_sae
            key = ordered_key(tl.load(tile + row * d_sae + column, mask=inside, other=0.0), BITS)
            if above > 0:
                inside = inside & ((key >> (BITS - above)) == least)
            counts += tl.histogram(((key >> (BITS - 8 - above)) & 255).to(tl.int32), 256, mask=inside)
        from_here = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0) + counts
        digit = tl.max(tl.where(from_here >= wanted, digits, 0), axis=0)
        wanted -= tl.sum(tl.where(digits > digit, counts, 0), axis=0)
        least = ((least << 8) | digit).to(least.dtype)
    written = 0
    for start in range(0, d_sae, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < d_sae
        value = tl.load(tile + row * d_sae + column, mask=inside, other=0.0)
        key = ordered_key(value, BITS)
        equal = ((key == least) & inside).to(tl.int32)
        keep = ((key > least) & inside).to(tl.int32) | (equal & (tl.cumsum(equal, axis=0) <= wanted).to(tl.int32))
        place = row * k + written + tl.cumsum(keep, axis=0) - 1
        tl.store(columns + place, column.to(tl.int64), mask=keep != 0)
        tl.store(values + place, value, mask=keep != 0)
        wanted = tl.maximum(wanted - tl.sum(equal, axis=0), 0)
        written += tl.sum(keep, axis=0)


def row_topk(tile: Float[Tensor, "n d_sae"], k: int) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """Return values and columns of the k largest entries of each row, in column order; of equals the first."""
    n, d_sae = tile.shape
    values = torch.empty(n, k, dtype=tile.dtype, device=tile.device)
    columns = torch.empty(n, k, dtype=torch.int64, device=tile.device)
    if n and k:
        with on_device(tile):
            _row_topk[(n,)](tile.contiguous(), values, columns, d_sae, k, key_bits(tile.dtype))
    return values, columns
