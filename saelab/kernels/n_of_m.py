"""N:M weights, packed: of every M consecutive inputs of an output row, N values and their places in the group.

:func:`pack` and :func:`PackedWeight.to_dense` are exact. :func:`packed_linear` is the product: the reference unpacks
and multiplies; on a CUDA device of compute capability 8.0 or more, ``semi_structured`` hands a 2:4 weight to the sparse
tensor cores (:func:`torch.sparse.to_sparse_semi_structured`). **The GPU path has not been run on a GPU.** On a CPU a
packed product cannot beat a dense one at N:M sparsities (``benchmarks/sparse_kernels.py`` has the break-even), so there
is no fast CPU twin.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from saelab.core.errors import ConfigError

_ALIGNED = 64
"""Rows and columns must be multiples of this for the sparse tensor cores' 16-bit kernels."""


@dataclass(frozen=True)
class PackedWeight:
    """A weight (out, in) of which each group of ``m`` inputs holds at most ``n`` values."""

    values: Float[Tensor, "out groups n"]
    """The values, zeros where a group has fewer."""
    places: UInt8[Tensor, "out groups n"]
    """Where each stands in its group, rising."""
    m: int

    def to_dense(self) -> Float[Tensor, "out in"]:
        """Return the dense weight."""
        out, groups, _ = self.values.shape
        dense = self.values.new_zeros(out, groups, self.m)
        return dense.scatter_(2, self.places.long(), self.values).view(out, groups * self.m)

    @property
    def bytes(self) -> int:
        """Size in memory; two bits would do for a place when m is 4."""
        return self.values.numel() * self.values.element_size() + self.places.numel()


def pack(weight: Float[Tensor, "out in"], n: int, m: int) -> PackedWeight:
    """Pack a weight whose groups hold at most n values. Raises :class:`ConfigError` when it is no such weight."""
    if not fits(weight, n, m):
        raise ConfigError(f"this weight is not {n}:{m} (at most {n} of every {m} inputs of a row); prune it first")
    groups = weight.detach().view(weight.shape[0], -1, m)
    # The nonzeros first, in place order; then zeros, up to n.
    places = (groups != 0).to(torch.int8).argsort(dim=2, descending=True, stable=True)[:, :, :n].sort(dim=2).values
    return PackedWeight(groups.gather(2, places), places.to(torch.uint8), m)


def fits(weight: Float[Tensor, "out in"], n: int, m: int) -> bool:
    """Return whether a weight is N:M, along its inputs."""
    if weight.shape[1] % m:
        return False
    return bool(((weight.view(weight.shape[0], -1, m) != 0).sum(2) <= n).all())


def packed_linear(
    x: Float[Tensor, "tokens in"], weight: PackedWeight, bias: Float[Tensor, " out"] | None = None
) -> Float[Tensor, "tokens out"]:
    """Return ``x W^T + b`` (the reference: unpacks)."""
    return F.linear(x, weight.to_dense().to(x.dtype), bias)


def semi_structured_problem(weight: Float[Tensor, "out in"]) -> str | None:
    """Return why a weight cannot run on sparse tensor cores where it is, or None when it can."""
    if not weight.is_cuda:
        return "2:4 runs on CUDA devices only"
    if torch.cuda.get_device_capability(weight.device) < (8, 0):
        return "2:4 needs a GPU of compute capability 8.0 or more"
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return f"2:4 needs float16 or bfloat16 weights, these are {weight.dtype}"
    if weight.shape[0] % _ALIGNED or weight.shape[1] % _ALIGNED:
        return f"2:4 needs widths that are multiples of {_ALIGNED}, these are {tuple(weight.shape)}"
    if not fits(weight, 2, 4):
        return "the weight is not 2:4"
    return None


def semi_structured(weight: Float[Tensor, "out in"]) -> Tensor:
    """Return a 2:4 weight for the sparse tensor cores; ``F.linear`` takes it. Raises :class:`ConfigError`."""
    if problem := semi_structured_problem(weight):
        raise ConfigError(f"{problem}; leave this layer dense")
    found: Tensor = torch.sparse.to_sparse_semi_structured(weight.contiguous())
    return found
