"""Scores that look at nothing but the weights: magnitude, and chance as the control."""

from typing import Literal

import torch
from torch import Tensor

from saelab.sparsity.methods.base import Method, Pruned, masked
from saelab.sparsity.pattern import Pattern
from saelab.sparsity.statistics import InputStatistics


class Magnitude(Method):
    """Keep the weights of largest absolute value."""

    name: Literal["magnitude"] = "magnitude"
    need = None

    def prune(
        self, weight: Tensor, inputs: InputStatistics | None, pattern: Pattern | None, generator: torch.Generator
    ) -> Pruned:
        """Prune one layer."""
        assert pattern is not None
        return masked(weight, pattern.mask(weight.abs()))


class Random(Method):
    """Keep weights at random: what a score must beat."""

    name: Literal["random"] = "random"
    need = None

    def prune(
        self, weight: Tensor, inputs: InputStatistics | None, pattern: Pattern | None, generator: torch.Generator
    ) -> Pruned:
        """Prune one layer."""
        assert pattern is not None
        score = torch.rand(weight.shape, generator=generator)
        return masked(weight, pattern.mask(score))
