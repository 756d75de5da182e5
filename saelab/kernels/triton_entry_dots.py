"""Triton twin of :func:`saelab.kernels.segments.entry_dots`: the gradients of a code's values, and exact recomputation.

One program makes the dots of a block of entries, which come feature by feature, so that neighbours share a row of
``right`` in the cache. No (nnz, d) matrix exists; each result is written once, by one program.
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
    {"ENTRIES": 16, "WIDTH": 128, "num_warps": 4},
    {"ENTRIES": 8, "WIDTH": 256, "num_warps": 4},
    {"ENTRIES": 32, "WIDTH": 64, "num_warps": 4},
    {"ENTRIES": 4, "WIDTH": 512, "num_warps": 4},
    key=["d"],
)
@kernel
def _entry_dots(
    left, right, indices, rows, order, out, nnz, d, ACC: tl.constexpr, ENTRIES: tl.constexpr, WIDTH: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    valid = place < nnz
    entry = tl.load(order + place, mask=valid, other=0).to(tl.int64)
    feature = tl.load(indices + entry, mask=valid, other=0).to(tl.int64)
    row = tl.load(rows + entry, mask=valid, other=0).to(tl.int64)
    total = tl.zeros([ENTRIES], dtype=ACC)
    for start in range(0, d, WIDTH):
        columns = start + tl.arange(0, WIDTH)
        mask = valid[:, None] & (columns < d)[None, :]
        a = tl.load(left + row[:, None] * d + columns[None, :], mask=mask, other=0.0).to(ACC)
        b = tl.load(right + feature[:, None] * d + columns[None, :], mask=mask, other=0.0).to(ACC)
        total += tl.sum(a * b, axis=1)
    tl.store(out + entry, total.to(out.dtype.element_ty), mask=valid)


def entry_dots(
    left: Float[Tensor, "n d"],
    right: Float[Tensor, "d_sae d"],
    indices: Int[Tensor, " nnz"],
    rows: Int[Tensor, " nnz"],
    order: Int[Tensor, " nnz"],
) -> Float[Tensor, " nnz"]:
    """Return ``out[j] = <left[rows[j]], right[indices[j]]>``, going through the entries in ``order``; no gradient."""
    nnz, d = indices.numel(), left.shape[1]
    out = torch.empty(nnz, dtype=left.dtype, device=left.device)
    if nnz:
        accumulator = tl.float64 if left.dtype == torch.float64 else tl.float32
        with on_device(left):
            _entry_dots[lambda meta: (triton.cdiv(nnz, meta["ENTRIES"]),)](
                left.contiguous(),
                right.contiguous(),
                indices.contiguous(),
                rows.contiguous(),
                order.contiguous(),
                out,
                nnz,
                d,
                accumulator,
            )
    return out
