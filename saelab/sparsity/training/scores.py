"""The first axis: which weights matter. Pure functions of (out, in) tensors; the largest scores stay."""

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Weights = Float[Tensor, "out in"]
ScoreName = Literal["magnitude", "random", "gradient", "sensitivity"]


def magnitude(weight: Weights, gradient: Weights | None, draw: Weights) -> Weights:
    """|w|."""
    return weight.abs()


def random(weight: Weights, gradient: Weights | None, draw: Weights) -> Weights:
    """Chance."""
    return draw


def largest_gradient(weight: Weights, gradient: Weights | None, draw: Weights) -> Weights:
    """|dL/dw|, of the dense weights."""
    assert gradient is not None
    return gradient.abs()


def sensitivity(weight: Weights, gradient: Weights | None, draw: Weights) -> Weights:
    """|w dL/dw|: to first order, what removing the weight does to the loss (SNIP, Lee et al. 2019)."""
    assert gradient is not None
    return (weight * gradient).abs()


SCORES: Mapping[ScoreName, Callable[[Tensor, Tensor | None, Tensor], Tensor]] = {
    "magnitude": magnitude,
    "random": random,
    "gradient": largest_gradient,
    "sensitivity": sensitivity,
}
NEED_GRADIENT: frozenset[str] = frozenset({"gradient", "sensitivity"})
"""Scores that can be told only after a backward pass."""


def draw_like(weight: Weights, seed: int, step: int, index: int) -> Weights:
    """Return uniform noise for layer ``index`` at a step: a function of its arguments, so that resuming repeats it."""
    number = int(np.random.SeedSequence([seed, step, index]).generate_state(1, np.uint64)[0])
    generator = torch.Generator().manual_seed(number >> 1)
    return torch.rand(weight.shape, generator=generator).to(weight.device)
