"""Activation functions of single entries whose backward pass is not the derivative of the forward one."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.kernels.segments import pick


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


def jump_relu(
    z: Float[Tensor, " nnz"], theta: Float[Tensor, " d_sae"], indices: Int[Tensor, " nnz"], bandwidth: float
) -> Float[Tensor, " nnz"]:
    """Return ``z [z > theta_i]`` for entries of features i; gradients as in Rajamanoharan et al. 2024 (2407.14435).

    d/dz is ``[z > theta_i]``; d/dtheta_i is estimated as ``-(theta_i / eps) K((z - theta_i) / eps)`` with the bandwidth
    eps and the rectangle K(u) = [|u| < 1/2].
    """
    out: Tensor = _JumpReLU.apply(z, theta, indices, bandwidth)  # type: ignore[no-untyped-call]
    return out


def step_above(
    z: Float[Tensor, " nnz"], theta: Float[Tensor, " d_sae"], indices: Int[Tensor, " nnz"], bandwidth: float
) -> Float[Tensor, " nnz"]:
    """Return ``[z > theta_i]``; d/dtheta_i is estimated as ``-K((z - theta_i) / eps) / eps``, and d/dz is 0."""
    out: Tensor = _StepAbove.apply(z.detach(), theta, indices, bandwidth)  # type: ignore[no-untyped-call]
    return out


def _near(z: Tensor, at: Tensor, bandwidth: float) -> Tensor:
    """K((z - theta) / eps) / eps."""
    return ((z - at).abs() < bandwidth / 2).to(z.dtype) / bandwidth


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, indices: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, theta, indices)
        ctx.bandwidth = bandwidth
        return z * (z > pick(theta, indices))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        z, theta, indices = ctx.saved_tensors
        at = pick(theta, indices)
        share = -at * _near(z, at, ctx.bandwidth) * g
        return g * (z > at), torch.zeros_like(theta).index_add_(0, indices, share), None, None


class _StepAbove(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, theta: Tensor, indices: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, theta, indices)
        ctx.bandwidth = bandwidth
        return (z > pick(theta, indices)).to(z.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        z, theta, indices = ctx.saved_tensors
        share = -_near(z, pick(theta, indices), ctx.bandwidth) * g
        return None, torch.zeros_like(theta).index_add_(0, indices, share), None, None
