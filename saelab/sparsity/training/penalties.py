"""The sixth axis: what pulls weights towards zero before the schedule's mask takes them away.

A penalty changes gradients after the backward pass or weights after the optimiser's step. The papers take plain
gradient steps; here the optimiser is whatever the loop has (AdamW), and the proximal step follows its step, with the
same learning rate: that combination is ours.
"""

from abc import ABC
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from saelab.core.config import Config
from saelab.sparsity.pattern import Neurons, Pattern, Unstructured
from saelab.sparsity.training.groups import envelope_factors, marked_lasso_factors
from saelab.sparsity.training.target import Target

Memory = Mapping[str, dict[str, Tensor]]
"""By target: what is remembered of it; it is in every checkpoint."""


class Penalty(Config, ABC):
    """What is done to the weights that take part. ``active`` masks say which do: all, until the schedule's mask."""

    pattern: ClassVar[type[Neurons | Unstructured]] = Unstructured
    """The kind of mask it works towards."""

    def after_backward(
        self, targets: Sequence[Target], active: Mapping[str, Tensor], memory: Memory, pattern: Pattern, progress: float
    ) -> None:
        """Change gradients in place, or remember something of them."""

    def after_step(
        self, targets: Sequence[Target], active: Mapping[str, Tensor], memory: Memory, pattern: Pattern, lr: float
    ) -> None:
        """Change weights in place."""


class GroupEnvelope(Penalty):
    """WGSEF: the convex envelope of the group-sparse ridge, at most k neurons of each layer (see :mod:`.groups`).

    Each step ends with the exact proximal operator at ``lr * strength``: neurons beyond the k strongest are shrunk the
    harder the weaker they are, until about k are left (two that tie for the last place may share it; noise of small
    batches revives some); k comes from the recipe's sparsity, and the schedule's mask makes it exact.
    """

    name: Literal["wgsef"] = "wgsef"
    strength: float = Field(default=1.0, gt=0)
    """lambda: weight of the envelope against the loss."""
    pattern = Neurons

    def after_step(
        self, targets: Sequence[Target], active: Mapping[str, Tensor], memory: Memory, pattern: Pattern, lr: float
    ) -> None:
        """Take the proximal step."""
        assert isinstance(pattern, Neurons)
        for t in targets:
            norms = t.weight.norm(dim=1)
            t.weight.mul_(envelope_factors(norms, pattern.kept(len(norms)), lr * self.strength)[:, None])


class MarkedLasso(Penalty):
    """MaskSparsity (Jiang et al. 2022): a group lasso on the neurons that a mask marks, and on no others.

    The marks are the weakest neurons of each layer, as many as the recipe's sparsity says, at ``mark``.
    """

    name: Literal["mask-sparsity"] = "mask-sparsity"
    strength: float = Field(default=1.0, gt=0)
    """Weight of the lasso against the loss."""
    mark: float = Field(default=0.25, ge=0, lt=1)
    """Share of the training after which neurons are marked."""
    pattern = Neurons

    def after_backward(
        self, targets: Sequence[Target], active: Mapping[str, Tensor], memory: Memory, pattern: Pattern, progress: float
    ) -> None:
        """Mark, once."""
        for t in targets:
            if progress >= self.mark and "marked" not in memory[t.name]:
                memory[t.name]["marked"] = ~pattern.mask(t.weight.abs()).any(dim=1)

    def after_step(
        self, targets: Sequence[Target], active: Mapping[str, Tensor], memory: Memory, pattern: Pattern, lr: float
    ) -> None:
        """Shrink the marked neurons."""
        for t in targets:
            if (marked := memory[t.name].get("marked")) is not None:
                factors = marked_lasso_factors(t.weight.norm(dim=1), marked, lr * self.strength)
                t.weight.mul_(factors[:, None])


class Lobster(Penalty):
    """LOBSTER (Tartaglione et al. 2020): weights decay as far as the loss is insensitive to them.

    The paper's |dL/dw| has the unit 1; a mean loss over many tokens has gradients far below that, so the gradient is
    measured in units of the layer's root mean square (our change), or nothing would be spared.
    """

    name: Literal["lobster"] = "lobster"
    strength: float = Field(default=1e-3, gt=0)
    """lambda: largest share of a weight that goes in a step."""

    def after_backward(
        self, targets: Sequence[Target], active: Mapping[str, Tensor], memory: Memory, pattern: Pattern, progress: float
    ) -> None:
        """Remember the sensitivities."""
        for t in targets:
            if (gradient := t.gradient) is not None:
                unit = gradient.square().mean().sqrt().clamp_min(torch.finfo(gradient.dtype).tiny)
                memory[t.name]["sensitivity"] = gradient.abs() / unit

    def after_step(
        self, targets: Sequence[Target], active: Mapping[str, Tensor], memory: Memory, pattern: Pattern, lr: float
    ) -> None:
        """Decay."""
        for t in targets:
            t.weight.copy_(lobster_decay(t.weight, memory[t.name]["sensitivity"], self.strength))


class GlobalMomentum(Penalty):
    """GSM (Ding et al. 2019): in each step the Q weights of largest |w dL/dw| get the gradient, all others only decay.

    Q is what the recipe's sparsity leaves of all layers together. Weights that keep being left out go to zero; which
    ones is decided anew in every step.
    """

    name: Literal["gsm"] = "gsm"
    decay: float = Field(default=1e-3, gt=0, lt=1)
    """Share of every weight that goes in each step."""

    def after_backward(
        self, targets: Sequence[Target], active: Mapping[str, Tensor], memory: Memory, pattern: Pattern, progress: float
    ) -> None:
        """Let only some gradients through."""
        assert isinstance(pattern, Unstructured)
        size = sum(t.weight.numel() for t in targets)
        gradients = [t.gradient for t in targets]
        known = [g for g in gradients if g is not None]
        masks = largest_saliency(
            [(t.weight * g).abs() for t, g in zip(targets, known, strict=True)], size - round(pattern.sparsity * size)
        )
        for gradient, mask in zip(known, masks, strict=True):
            gradient.mul_(mask)

    def after_step(
        self, targets: Sequence[Target], active: Mapping[str, Tensor], memory: Memory, pattern: Pattern, lr: float
    ) -> None:
        """Decay everything."""
        for t in targets:
            t.weight.mul_(1 - self.decay)


AnyPenalty = Annotated[GroupEnvelope | MarkedLasso | Lobster | GlobalMomentum, Field(discriminator="name")]
"""A penalty by its ``name``."""


def lobster_decay(
    weight: Float[Tensor, "*shape"], sensitivity: Float[Tensor, "*shape"], strength: float
) -> Float[Tensor, "*shape"]:
    """Return w - strength w max(0, 1 - |sensitivity|) (LOBSTER, arXiv 2011.09905)."""
    return weight - strength * weight * (1 - sensitivity.abs()).clamp_min(0)


def largest_saliency(saliency: list[Float[Tensor, "..."]], kept: int) -> list[Bool[Tensor, "..."]]:
    """Return masks of the ``kept`` largest entries of several tensors together, exactly; ties go to the first."""
    flat = torch.cat([s.reshape(-1) for s in saliency])
    chosen = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    chosen[flat.argsort(descending=True, stable=True)[:kept]] = True
    return [c.view(s.shape) for c, s in zip(torch.split(chosen, [s.numel() for s in saliency]), saliency, strict=True)]
