"""Triton twin of :func:`saelab.kernels.segments.bag_sum`: sparse decode, and the gradients of both weight matrices.

One program makes one tile of one bag (a token in the decode, a feature in a weight gradient): it goes through the bag's
entries in their order and writes its tile once, so there are no atomics and the same bits come out every time. Sums are
kept in float32 for float32, bfloat16 and float16 (float64 for float64).
"""

# Kernels are in Triton's own language, whose types mypy does not know.
# ruff: noqa: PLR0917
# mypy: disable-error-code="import-untyped,import-not-found,no-untyped-def,attr-defined"

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from saelab.kernels.triton_common import autotuned, kernel, on_device


@autotuned(
    {"ENTRIES": 4, "WIDTH": 256, "num_warps": 4},
    {"ENTRIES": 8, "WIDTH": 128, "num_warps": 4},
    {"ENTRIES": 16, "WIDTH": 128, "num_warps": 4},
    {"ENTRIES": 4, "WIDTH": 512, "num_warps": 8},
    key=["d"],
)
@kernel
def _bag_sum(weight, indices, offsets, scale, out, d, ACC: tl.constexpr, ENTRIES: tl.constexpr, WIDTH: tl.constexpr):
    bag = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = columns < d
    first, last = tl.load(offsets + bag), tl.load(offsets + bag + 1)
    total = tl.zeros([WIDTH], dtype=ACC)
    for start in range(first, last, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        valid = entry < last
        row = tl.load(indices + entry, mask=valid, other=0).to(tl.int64)
        factor = tl.load(scale + entry, mask=valid, other=0.0).to(ACC)
        mask = valid[:, None] & inside[None, :]
        values = tl.load(weight + row[:, None] * d + columns[None, :], mask=mask, other=0.0).to(ACC)
        total += tl.sum(values * factor[:, None], axis=0)
    tl.store(out + bag * d + columns, total.to(out.dtype.element_ty), mask=inside)


def bag_sum(
    weight: Float[Tensor, "rows d"],
    indices: Int[Tensor, " nnz"],
    offsets: Int[Tensor, " bags_plus_1"],
    scale: Float[Tensor, " nnz"],
) -> Float[Tensor, "bags d"]:
    """Return ``out[b] = sum over the entries j of bag b of scale[j] * weight[indices[j]]``; no gradient."""
    bags, d = offsets.numel() - 1, weight.shape[1]
    out = torch.empty(bags, d, dtype=weight.dtype, device=weight.device)
    if bags and d:
        accumulator = tl.float64 if weight.dtype == torch.float64 else tl.float32
        with on_device(weight):
            _bag_sum[lambda meta: (bags, triton.cdiv(d, meta["WIDTH"]))](
                weight.contiguous(), indices.contiguous(), offsets.contiguous(), scale.contiguous(), out, d, accumulator
            )
    return out
