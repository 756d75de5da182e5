"""Least squares from a stream: cross-moments in float64, linear maps and their R2, nothing kept but sums.

    moments = CrossMoments(d_x, d_y)
    for x, y in stream: moments.update(x, y)
    linear = moments.fit()                 # y ~ [x, 1]
    held_out.r2(linear)                    # on the cross-moments of other tokens

A fit and an R2 are functions of ``n``, the two means and the centred products, so memory is d_x^2 + d_x d_y numbers
whatever the number of tokens. Products are taken about the running means (Chan, Golub and LeVeque's pairwise update):
with a few massive coordinates, ``sum(x x^T) - n mean mean^T`` would have few digits left.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

BLOCK = 4096
"""Vectors turned to float64 at a time."""
TOLERANCE = 1e-12
"""Directions of the scaled x whose variance is below this share of the largest are left out of a fit."""


@dataclass(frozen=True, eq=False)
class LinearMap:
    """``y ~ x weight + bias``."""

    weight: Float64[Tensor, "d_x d_y"]
    """Coefficients."""
    bias: Float64[Tensor, " d_y"]
    """Constant term; zeros in a fit without intercept."""
    rank: int
    """Directions of x that the fit could use."""
    n: int
    """Vectors it was fitted on."""

    def __call__(self, x: Float[Tensor, "n d_x"]) -> Float[Tensor, "n d_y"]:
        """Return the prediction in the dtype of ``x``, computed there too."""
        return x @ self.weight.to(x) + self.bias.to(x)

    def select(self, columns: slice) -> "LinearMap":
        """Return the map to some of the targets."""
        return LinearMap(self.weight[:, columns].clone(), self.bias[columns].clone(), self.rank, self.n)


@dataclass(frozen=True, eq=False)
class RSquared:
    """How much of y a linear map explains on some vectors; nan where there is nothing to explain."""

    pooled: float
    """``1 - sum ||y - y_hat||^2 / sum ||y - mean(y)||^2``, all dimensions together: the default R2 of this library."""
    per_dimension: float
    """Mean over the dimensions that vary of each one's own R2; those of little variance count as much as others."""
    each: Float64[Tensor, " d_y"]
    """R2 of each dimension; nan where y does not vary."""
    residual: Float64[Tensor, " d_y"]
    """``sum (y - y_hat)^2`` of each dimension."""
    total: Float64[Tensor, " d_y"]
    """``sum (y - mean(y))^2`` of each dimension."""
    n: int
    """Vectors."""


class CrossMoments:
    """Means of pairs of vectors (x, y), ``sum dx dx^T``, ``sum dx dy^T`` and ``sum dy^2`` of a stream, in float64.

    ``dx`` and ``dy`` are deviations from the means of what was seen.
    """

    def __init__(self, d_x: int, d_y: int) -> None:
        double = torch.float64
        self.n = 0
        """Number of pairs seen."""
        self.mean_x: Float64[Tensor, " d_x"] = torch.zeros(d_x, dtype=double)
        """Mean of x."""
        self.mean_y: Float64[Tensor, " d_y"] = torch.zeros(d_y, dtype=double)
        """Mean of y."""
        self.xx: Float64[Tensor, "d_x d_x"] = torch.zeros(d_x, d_x, dtype=double)
        """``sum dx dx^T``."""
        self.xy: Float64[Tensor, "d_x d_y"] = torch.zeros(d_x, d_y, dtype=double)
        """``sum dx dy^T``."""
        self.yy: Float64[Tensor, " d_y"] = torch.zeros(d_y, dtype=double)
        """``sum dy^2`` per dimension."""

    def update(self, x: Float[Tensor, "n d_x"], y: Float[Tensor, "n d_y"]) -> None:
        """Take in n pairs."""
        for some_x, some_y in zip(torch.split(x.detach(), BLOCK), torch.split(y.detach(), BLOCK), strict=True):
            if not some_x.shape[0]:
                continue
            dx, dy = some_x.to("cpu", torch.float64), some_y.to("cpu", torch.float64)
            mean_x, mean_y = dx.mean(0), dy.mean(0)
            dx, dy = dx - mean_x, dy - mean_y
            self._shift(some_x.shape[0], mean_x, mean_y)
            self.xx.addmm_(dx.T, dx)
            self.xy.addmm_(dx.T, dy)
            self.yy.add_(dy.square_().sum(0))

    def merge(self, other: "CrossMoments") -> None:
        """Take in everything that ``other`` has seen."""
        if other.n:
            self._shift(other.n, other.mean_x, other.mean_y)
            self.xx += other.xx
            self.xy += other.xy
            self.yy += other.yy

    def _shift(self, n: int, mean_x: Tensor, mean_y: Tensor) -> None:
        """Move the means for n further pairs of these means, and add what that adds to the centred products."""
        total = self.n + n
        step_x, step_y = mean_x - self.mean_x, mean_y - self.mean_y
        weight = self.n * n / total
        self.xx.addr_(step_x, step_x, alpha=weight)
        self.xy.addr_(step_x, step_y, alpha=weight)
        self.yy.addcmul_(step_y, step_y, value=weight)
        self.mean_x = self.mean_x + step_x * (n / total)
        self.mean_y = self.mean_y + step_y * (n / total)
        self.n = total

    def select(
        self, x: Int[Tensor, " some_x"] | slice = slice(None), y: Int[Tensor, " some_y"] | slice = slice(None)
    ) -> "CrossMoments":
        """Return the moments of some columns of x and of y, as if only those had been given."""
        result = CrossMoments(0, 0)
        result.n = self.n
        result.mean_x, result.mean_y, result.yy = self.mean_x[x], self.mean_y[y], self.yy[y]
        result.xx, result.xy = self.xx[x][:, x], self.xy[x][:, y]
        return result

    def fit(self, intercept: bool = True, tolerance: float = TOLERANCE) -> LinearMap:
        """Least squares ``y ~ [x, 1]`` (or ``y ~ x``), the one of least norm where x does not span its space.

        Coordinates are scaled to their own spread first, so the result does not depend on their units and a massive
        coordinate does not swallow the small ones.
        """
        xx, xy = self.xx, self.xy
        if not intercept:
            xx = xx + self.n * torch.outer(self.mean_x, self.mean_x)
            xy = xy + self.n * torch.outer(self.mean_x, self.mean_y)
        scale = xx.diagonal().clamp_min(0).sqrt()
        inverse = torch.where(scale > 0, 1 / scale.clamp_min(1e-300), 0.0)
        values, vectors = torch.linalg.eigh(inverse[:, None] * xx * inverse)
        largest = float(values[-1]) if values.numel() else 0.0
        usable = (values > tolerance * largest) & (values > 0)
        basis = vectors[:, usable]
        weight = basis @ ((basis.T @ (inverse[:, None] * xy)) / values[usable, None])
        weight = inverse[:, None] * weight
        bias = self.mean_y - self.mean_x @ weight if intercept else torch.zeros_like(self.mean_y)
        return LinearMap(weight, bias, int(usable.sum()), self.n)

    def r2(self, linear: LinearMap) -> RSquared:
        """Return how well ``linear``, fitted on these pairs or on others, predicts these."""
        w = linear.weight
        shift = self.mean_y - self.mean_x @ w - linear.bias
        residual = self.yy - 2 * (w * self.xy).sum(0) + (w * (self.xx @ w)).sum(0) + self.n * shift.square()
        residual = residual.clamp_min(0)
        # What is left of a constant after rounding is no variance.
        varies = self.yy > 1e-20 * self.n * self.mean_y.square() + 1e-300
        each = torch.where(varies, 1 - residual / self.yy.clamp_min(1e-300), torch.nan)
        total = float(self.yy[varies].sum())
        return RSquared(
            pooled=1 - float(residual.sum()) / total if total > 0 else float("nan"),
            per_dimension=float(each[varies].mean()) if bool(varies.any()) else float("nan"),
            each=each,
            residual=residual,
            total=self.yy.clone(),
            n=self.n,
        )
