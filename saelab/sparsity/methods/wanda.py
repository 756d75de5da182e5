"""Wanda: a weight matters as much as it is large and its input is large (Sun et al. 2023, arXiv 2306.11695)."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.sparsity.methods.base import Method, Pruned, masked
from saelab.sparsity.pattern import Pattern
from saelab.sparsity.statistics import InputStatistics


def wanda_score(weight: Float[Tensor, "out in"], inputs: InputStatistics) -> Float[Tensor, "out in"]:
    """|W_ij| ||X_j||_2 (Wanda, equation 1), X_j the layer's j-th input over the calibration tokens."""
    return weight.abs() * inputs.norm.float()


class Wanda(Method):
    """Keep the weights of largest |W_ij| ||X_j||. The paper compares within each output row: pattern ``row``."""

    name: Literal["wanda"] = "wanda"

    def prune(
        self, weight: Tensor, inputs: InputStatistics | None, pattern: Pattern | None, generator: torch.Generator
    ) -> Pruned:
        """Prune one layer."""
        assert pattern is not None
        assert inputs is not None
        return masked(weight, pattern.mask(wanda_score(weight, inputs)))
