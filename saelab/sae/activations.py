"""Activation functions of single entries whose backward pass is not the derivative of the forward one."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def raised_relu(z: Float[Tensor, " nnz"]) -> Float[Tensor, " nnz"]:
    """Return ReLU(z); for z <= 0 the gradient passes where following it raises z, and is 0 where it would lower z.

    That is the projected gradient of the constraint ``f >= 0``: an entry at 0 moves only if it is wanted above 0.
    """
    out: Tensor = _RaisedReLU.apply(z)  # type: ignore[no-untyped-call]
    return out


class _RaisedReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.relu()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return torch.where(z > 0, g, g.clamp(max=0))
