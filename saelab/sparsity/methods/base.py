"""What every pruning method is: a config that turns one layer's weight into a sparse one."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.core.config import Config
from saelab.sparsity.pattern import Pattern
from saelab.sparsity.statistics import InputStatistics, Need


@dataclass(frozen=True)
class Pruned:
    """One layer after pruning."""

    weight: Float[Tensor, "out in"]
    """The new weight, zero where ``mask`` is False."""
    mask: Bool[Tensor, "out in"]
    """True where a weight stays."""
    facts: Mapping[str, float] = field(default_factory=dict)
    """What the method says about the layer beside its sparsity (bits per weight, swaps ...)."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """What is to be kept beside the model (the codes of a quantised layer ...)."""


class Method(Config, ABC):
    """A pruning method: its settings, and what it does to a layer."""

    need: ClassVar[Need | None] = "moments"
    """What it wants to know about the layer's inputs; None: nothing."""
    patterned: ClassVar[bool] = True
    """Whether it follows a pattern and sparsity; else it has its own measure of how much goes."""

    @abstractmethod
    def prune(
        self,
        weight: Float[Tensor, "out in"],
        inputs: InputStatistics | None,
        pattern: Pattern | None,
        generator: torch.Generator,
    ) -> Pruned:
        """Prune one layer.

        ``weight`` is a float32 copy; ``inputs`` is there when ``need`` says so, ``pattern`` when ``patterned``.
        """


def masked(weight: Tensor, mask: Tensor, **facts: Any) -> Pruned:
    """Return the weight with what the mask takes away set to zero."""
    return Pruned(torch.where(mask, weight, torch.zeros_like(weight)), mask, facts)
