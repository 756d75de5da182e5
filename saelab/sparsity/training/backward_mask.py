"""BDWP's second mask: the gradient of a linear layer's input, taken with the weight pruned along its outputs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from saelab.core.errors import ConfigError
from saelab.sparsity.pattern import NofM
from saelab.sparsity.training.gradients import BDWP
from saelab.sparsity.training.target import Target


def prune_backward(
    targets: Sequence[Target], pattern: NofM, stored: Callable[[Target], Tensor]
) -> list[RemovableHandle]:
    """Let every layer's backward pass give dX = dY (W * backward mask), W its stored weight.

    Raises :class:`ConfigError` for a weight that is no linear layer's.
    """
    handles: list[RemovableHandle] = []
    for target in targets:
        if target.module is None:
            raise ConfigError(
                f"gradient bdwp changes the backward pass of linear layers, and {target.name} is computed by the "
                "SAE's own kernels; use ste or sr-ste"
            )
        redirect = _Redirect(target, pattern, stored)
        handles.append(target.module.register_forward_pre_hook(redirect.before))
        handles.append(target.module.register_forward_hook(redirect.after))
    return handles


class _Redirect:
    """Cuts the layer's input off from its graph, and gives that input the gradient through the pruned weight."""

    def __init__(self, target: Target, pattern: NofM, stored: Callable[[Target], Tensor]) -> None:
        self._target, self._pattern, self._stored = target, pattern, stored
        self._inputs: list[Tensor] = []

    def before(self, module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self._inputs.append(given[0])
        return (given[0].detach(), *given[1:])

    def after(self, module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        x = self._inputs.pop()
        if not x.requires_grad:
            return out
        weight = self._stored(self._target)
        pruned = weight * BDWP.backward_mask(weight, self._pattern)
        redirected: Tensor = _InputGradient.apply(x, out, pruned)  # type: ignore[no-untyped-call]
        return redirected


class _InputGradient(torch.autograd.Function):
    """The identity on ``out``, whose gradient also goes to ``x`` through ``weight`` (out, in)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dtype = x.dtype
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (weight,) = ctx.saved_tensors
        (gradient,) = gradients
        return (gradient @ weight.to(gradient.dtype)).to(ctx.dtype), gradient, None
