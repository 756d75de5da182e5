"""Streaming accumulators: ``update`` with a batch, ``merge`` with another's, ``result`` in float64.

Merging two accumulators gives what one would have given over both streams (up to float64 rounding), so several
processes or passes need nothing else.
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from saelab.core.counts import Histogram, HistogramResult, IntegerCounts, TopK

__all__ = ["Histogram", "HistogramResult", "IntegerCounts", "Moments", "TopK"]


class Moments:
    """Mean and variance per dimension of a stream of vectors, in float64.

    Chan, Golub and LeVeque's pairwise update: the squared deviations are kept about the running mean, so a few massive
    coordinates do not cancel away the digits of the variance as they do in ``sum(x^2) - n mean^2``.
    """

    def __init__(self, width: int) -> None:
        self.n = 0
        """Number of vectors seen."""
        self.mean: Float64[Tensor, " d"] = torch.zeros(width, dtype=torch.float64)
        """Their mean (zero before the first)."""
        self.deviation: Float64[Tensor, " d"] = torch.zeros(width, dtype=torch.float64)
        """Sum of squared deviations from the mean, per dimension."""

    def update(self, x: Float[Tensor, "n d"]) -> None:
        """Take in n vectors."""
        if x.shape[0] == 0:
            return
        x = x.detach().to("cpu", torch.float64)
        mean = x.mean(0)
        self._combine(x.shape[0], mean, (x - mean).square_().sum(0))

    def merge(self, other: "Moments") -> None:
        """Take in everything that ``other`` has seen."""
        if other.n:
            self._combine(other.n, other.mean, other.deviation)

    def _combine(self, n: int, mean: Float64[Tensor, " d"], deviation: Float64[Tensor, " d"]) -> None:
        total = self.n + n
        step = mean - self.mean
        self.deviation = self.deviation + deviation + step.square() * (self.n * n / total)
        self.mean = self.mean + step * (n / total)
        self.n = total

    @property
    def sum(self) -> Float64[Tensor, " d"]:
        """Sum of the vectors."""
        return self.mean * self.n

    @property
    def sum_of_squares(self) -> Float64[Tensor, " d"]:
        """Sum of the squares, per dimension."""
        return self.deviation + self.mean.square() * self.n

    @property
    def variance(self) -> Float64[Tensor, " d"]:
        """Variance per dimension (divided by n)."""
        return self.deviation / max(self.n, 1)

    @property
    def pooled_variance(self) -> float:
        """Mean squared distance from the mean: the variances summed over dimensions."""
        return float(self.variance.sum())
