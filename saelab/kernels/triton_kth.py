"""Triton part of the budget selection: the count-th largest of a pool of values by radix search over all programs.

Programs add their histograms of a digit into one of 256 counters by integer atomics, whose sum does not depend on their
order; the digit is chosen on the device, so that nothing waits for the host between the passes.
"""

# Kernels are in Triton's own language, whose types mypy does not know.
# ruff: noqa: PLR0917
# mypy: disable-error-code="import-untyped,import-not-found,no-untyped-def,attr-defined"

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from saelab.kernels.triton_common import kernel, key_bits, on_device, ordered_key

BLOCK = 4096
"""Values per program."""


@kernel
def _histogram(values, prefix, counts, n, SHIFT: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < n
    key = ordered_key(tl.load(values + place, mask=inside, other=0.0), BITS)
    if SHIFT + 8 < BITS:
        inside = inside & ((key >> (SHIFT + 8)).to(tl.int64) == tl.load(prefix))
    found = tl.histogram(((key >> SHIFT) & 255).to(tl.int32), 256, mask=inside)
    tl.atomic_add(counts + tl.arange(0, 256), found.to(tl.int64))


def kth_largest(values: Float[Tensor, " n"], k: int) -> Float[Tensor, ""]:
    """Return the k-th largest (1 <= k <= n) of a vector."""
    values, n, bits = values.contiguous(), values.numel(), key_bits(values.dtype)
    assert 1 <= k <= n
    prefix = torch.zeros((), dtype=torch.int64, device=values.device)
    wanted = torch.full((), k, dtype=torch.int64, device=values.device)
    with on_device(values):
        for shift in range(bits - 8, -1, -8):
            counts = torch.zeros(256, dtype=torch.int64, device=values.device)
            _histogram[(triton.cdiv(n, BLOCK),)](values, prefix, counts, n, shift, bits, BLOCK)
            from_here = counts.flip(0).cumsum(0).flip(0)
            digit = (from_here >= wanted).sum() - 1
            wanted -= (from_here - counts).index_select(0, digit.view(1)).squeeze(0)
            prefix = (prefix << 8) | digit
    return _float_of(prefix, values.dtype)


def _float_of(key: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo :func:`~saelab.kernels.triton_common.ordered_key` for one key, held in an int64."""
    bits = key_bits(dtype)
    integer = {16: torch.int16, 32: torch.int32, 64: torch.int64}[bits]
    top = 1 << (bits - 1)
    if bits == 64:  # the key's top bit is the sign of the int64 that holds it
        return torch.where(key < 0, key ^ -(1 << 63), ~key).view(dtype)
    return torch.where(key >= top, key - top, ((1 << bits) - 1 - key) - (1 << bits)).to(integer).view(dtype)
