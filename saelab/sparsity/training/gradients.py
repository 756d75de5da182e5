"""The fifth axis: what the forward pass sees of a masked weight, and what gradient it receives.

``forward`` makes the weight of the forward pass from the trained one, ``backward`` the gradient of the trained weight
from that of the forward pass's. Shapes (out, in) everywhere.
"""

from abc import ABC
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor

from saelab.core.config import Config
from saelab.sparsity.pattern import NofM, Pattern
from saelab.sparsity.training.schedules import Share, require_window


@dataclass(eq=False)
class View:
    """One weight at one step, as an axis sees it."""

    weight: Float[Tensor, "out in"]
    """The trained (stored) weight."""
    mask: Bool[Tensor, "out in"]
    """True where a weight stays."""
    pattern: Pattern | None
    """Pattern of the mask; None while it is dense."""
    progress: float
    """Share of the training that is done: 0 at the first step, 1 at the last."""
    memory: dict[str, Tensor] = field(default_factory=dict)
    """What a method remembers of this weight; it is in every checkpoint."""
    step: int = 0
    """The step, from 0."""
    looking: bool = False
    """Whether this is no step: somebody looks at the result so far, or the training is over."""


class Gradient(Config, ABC):
    """What happens to masked weights in the two passes. This base masks both: a masked weight is zero and stays so."""

    dense: ClassVar[bool] = True
    """Whether masked weights have values of their own that go on being trained."""
    needs_modules: ClassVar[bool] = False
    """Whether it changes the backward pass of ``nn.Linear`` and ``Conv1D`` modules."""
    unpatterned: ClassVar[bool] = False
    """Whether it needs no pattern and no sparsity, having its own measure of how much goes."""
    alone: ClassVar[bool] = False
    """Whether every parameter that is no target stays as it was."""

    def own_mask(self, view: View) -> Bool[Tensor, "out in"] | None:
        """Return this step's mask, where the method makes it itself."""
        return None

    def forward(self, view: View) -> Float[Tensor, "out in"]:
        """Return the weight of the forward pass."""
        return view.weight * view.mask

    def backward(self, gradient: Float[Tensor, "out in"], view: View) -> Float[Tensor, "out in"]:
        """Return the gradient of the trained weight, given that of :meth:`forward`'s result."""
        return gradient

    def after_step(self, view: View) -> None:
        """Change the trained weight in place after the optimiser's step."""

    def facts(self, view: View) -> dict[str, float]:
        """Say what there is to say of a weight at the end, beside its zeros."""
        return {}

    def taking_part(self, density: float, progress: float) -> float:
        """Return the share of the weights that the forward pass uses, ``density`` being the masks'."""
        return density


class Masked(Gradient):
    """Masked weights are zero and receive nothing: ordinary sparse training."""

    name: Literal["none"] = "none"
    dense = False

    def backward(self, gradient: Tensor, view: View) -> Tensor:
        """Mask the gradient."""
        return gradient * view.mask


class STE(Gradient):
    """Straight through: the dense weight receives the gradient of the masked one."""

    name: Literal["ste"] = "ste"


class SRSTE(Gradient):
    """SR-STE (Zhou et al. 2021, eq. 9): g(W * mask) + lambda (1 - mask) * W, a decay of the masked weights alone."""

    name: Literal["sr-ste"] = "sr-ste"
    decay: float = Field(default=2e-4, ge=0)
    """lambda."""

    def backward(self, gradient: Tensor, view: View) -> Tensor:
        """Add the decay."""
        return gradient + self.decay * view.weight * ~view.mask


class SoftThreshold(Gradient):
    """S-STE (Hu et al. 2024): a mask that is continuous in the weights.

    In each group with threshold t, the largest magnitude among those that go (for 2:4 the second smallest of four),
    w -> beta sign(w) max(|w| - t, 0). A weight that enters or leaves the mask does so at 0, so nothing jumps. beta =
    <W, S(W)> / ||S(W)||^2 per tensor, fixed at the first step. The gradient goes straight through.
    """

    name: Literal["soft"] = "soft"

    def forward(self, view: View) -> Tensor:
        """Shrink and scale."""
        shrunk = soft_threshold(view.weight, view.mask, view.pattern)
        if "beta" not in view.memory:
            view.memory["beta"] = scale_of(view.weight, shrunk)
        return view.memory["beta"] * shrunk


class Decayed(Gradient):
    """MdGf (Bambhaniya et al. 2024): masked weights take part with a factor a_t from 1 down to 0, in both passes."""

    name: Literal["decayed"] = "decayed"
    shape: Literal["linear", "exponential"] = "linear"
    """How a_t falls: 1 - p, or exp(-5 p) (below 0.7 % when it is cut to 0), p the share of the window that is over."""
    start: Share = 0.0
    """Share of the training with a_t = 1."""
    stop: float = Field(default=0.75, gt=0, lt=1)
    """Share of the training after which a_t is 0."""

    @model_validator(mode="after")
    def _ordered(self) -> "Decayed":
        require_window(self.start, self.stop)
        return self

    def factor(self, progress: float) -> float:
        """Return a_t."""
        part = min(max((progress - self.start) / (self.stop - self.start), 0.0), 1.0)
        if self.shape == "linear" or part == 1.0:
            return 1 - part
        return float(torch.exp(torch.tensor(-5.0 * part)))

    def forward(self, view: View) -> Tensor:
        """Scale the masked weights."""
        return view.weight * self._factors(view)

    def backward(self, gradient: Tensor, view: View) -> Tensor:
        """Scale their gradients (the chain rule)."""
        return gradient * self._factors(view)

    def taking_part(self, density: float, progress: float) -> float:
        """All of them, until a_t is 0."""
        return 1.0 if self.factor(progress) > 0 else density

    def _factors(self, view: View) -> Tensor:
        kept = view.mask.to(view.weight.dtype)
        return kept + self.factor(view.progress) * (1 - kept)


class BDWP(Gradient):
    """BDWP (Fang et al. 2023): N:M along the inputs for the forward pass, N:M along the outputs for the backward pass.

    The gradient of a layer's input is taken with the weight pruned along its outputs, so that that product has N:M
    sparsity too; the weight's own gradient goes straight through.
    """

    name: Literal["bdwp"] = "bdwp"
    needs_modules = True

    @staticmethod
    def backward_mask(weight: Float[Tensor, "out in"], pattern: NofM) -> Bool[Tensor, "out in"]:
        """Return the mask of the backward pass: of every M consecutive outputs, N stay for each input."""
        return pattern.mask(weight.abs().T.contiguous()).T


def soft_threshold(
    weight: Float[Tensor, "out in"], mask: Bool[Tensor, "out in"], pattern: Pattern | None
) -> Float[Tensor, "out in"]:
    """Return sign(w) max(|w| - t, 0), t the largest magnitude that the mask takes away in the weight's group.

    ``mask`` must keep the largest magnitudes of each group.
    """
    if pattern is None:
        return weight
    size = pattern.groups(weight.abs())
    gone = torch.where(pattern.groups(mask), torch.zeros_like(size), size)
    shrunk = (size - gone.amax(dim=1, keepdim=True)).clamp_min(0)
    return weight.sign() * shrunk.reshape(weight.shape)


def scale_of(weight: Float[Tensor, "out in"], sparse: Float[Tensor, "out in"]) -> Float[Tensor, ""]:
    """Return beta = <W, S> / ||S||^2, with which beta S is nearest to W; 1 when S is zero."""
    square = sparse.square().sum()
    return torch.where(square > 0, (weight * sparse).sum() / square.clamp_min(1e-30), torch.ones_like(square))
