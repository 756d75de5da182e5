"""What the Triton twins share: tuning, the device guard, and keys that order floats as integers.

Imported, like every ``triton_*`` module, only when ``impl="triton"`` is asked for.
"""

# Kernels are in Triton's own language, whose types mypy does not know.
# mypy: disable-error-code="import-untyped,import-not-found,no-untyped-def,attr-defined"

import inspect
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from saelab.kernels.dispatch import interpreting


def autotuned(*choices: dict[str, int], key: list[str]) -> Callable[[Any], Any]:
    """Return a decorator that times the choices of block sizes on a GPU, once for each value of the ``key`` arguments.

    Every choice gives the same numbers up to the order of summation within a block. The interpreter, which cannot be
    timed, takes the first. Tuning depends on timing, so ``num_warps`` and the blocks may differ between runs: for equal
    bits on a GPU set ``SAELAB_TRITON_TUNE=0``, which takes the first as well.
    """
    taken = choices[:1] if interpreting() or not _tune() else choices
    configs = [
        triton.Config({name: value for name, value in choice.items() if name != "num_warps"}, choice["num_warps"])
        for choice in taken
    ]
    decorator: Callable[[Any], Any] = triton.autotune(configs=configs, key=key)
    return decorator


def _tune() -> bool:
    return os.environ.get("SAELAB_TRITON_TUNE", "1") != "0"


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which kernels are launched on the tensor's GPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def kernel(function: Callable[..., Any]) -> Any:
    """Return a Triton kernel of a function, undoing what the shape checks of the tests have wrapped it in."""
    return triton.jit(inspect.unwrap(function))


def key_bits(dtype: torch.dtype) -> int:
    """Return the width of the keys of a dtype: 16, 32 or 64."""
    return dtype.itemsize * 8


@kernel
def ordered_key(value, BITS: tl.constexpr):
    """Map floats to unsigned integers of the same order: flip all bits of negatives, and the sign bit of the rest.

    -0 counts as +0. NaN is above everything, as it is for ``torch.topk``.
    """
    value = tl.where(value == 0, 0.0, value).to(value.dtype)
    if BITS == 64:
        bits = value.to(tl.uint64, bitcast=True)
        key = tl.where((bits >> 63) != 0, bits ^ 0xFFFFFFFFFFFFFFFF, bits | 0x8000000000000000)
    elif BITS == 32:
        bits = value.to(tl.uint32, bitcast=True)
        key = tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    else:
        bits = value.to(tl.uint16, bitcast=True).to(tl.uint32)
        key = tl.where((bits >> 15) != 0, bits ^ 0xFFFF, bits | 0x8000)
    return key
