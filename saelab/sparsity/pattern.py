"""Which sets of weights may stay: the number per row, per layer, or N of every M. Pure functions of score tensors.

Counts are exact: of ``n`` weights at sparsity ``s``, ``round(s * n)`` go. Ties are broken by position, so that the same
scores always give the same mask.
"""

import re
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from saelab.core.errors import ConfigError


@dataclass(frozen=True)
class Unstructured:
    """Any weights, as many as the sparsity says."""

    sparsity: float
    """Share that goes, in [0, 1)."""
    per_row: bool
    """Whether every output row loses equally many (else the layer as a whole)."""

    def mask(self, score: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        """Return True where a weight stays: the largest scores."""
        groups = self.groups(score)
        return keep_largest(groups, groups.shape[1] - round(self.sparsity * groups.shape[1])).view(score.shape)

    def groups(self, weight: Tensor) -> Shaped[Tensor, "groups n"]:
        """Return the sets of weights that compete with one another, one per row."""
        return weight if self.per_row else weight.reshape(1, -1)


@dataclass(frozen=True)
class NofM:
    """In every output row, of each ``m`` consecutive inputs, ``n`` stay."""

    n: int
    m: int

    @property
    def sparsity(self) -> float:
        """Share that goes."""
        return 1 - self.n / self.m

    def mask(self, score: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        """Return True where a weight stays: the n largest scores of each group. Raises :class:`ConfigError`."""
        self.require(score.shape[1])
        return keep_largest(self.groups(score), self.n).view(score.shape)

    def groups(self, weight: Tensor) -> Shaped[Tensor, "groups m"]:
        """Return the sets of weights that compete with one another, one per row."""
        return weight.reshape(-1, self.m)

    def require(self, width: int, name: str = "a layer") -> None:
        """Raise :class:`ConfigError` when ``m`` does not divide the number of inputs."""
        if width % self.m:
            raise ConfigError(
                f"pattern {self.n}:{self.m} does not divide {name}, which has {width} inputs; "
                f"choose an M that divides {width}, or exclude the layer"
            )


@dataclass(frozen=True)
class Neurons:
    """Whole output rows stay or go, in every layer alike: those with the largest sum of squared scores stay."""

    sparsity: float
    """Share of a layer's rows that goes, in [0, 1)."""

    def kept(self, rows: int) -> int:
        """Return how many rows stay: at least 1."""
        return max(1, rows - round(self.sparsity * rows))

    def mask(self, score: Float[Tensor, "out in"]) -> Bool[Tensor, "out in"]:
        """Return True where a weight stays. Scores below 0 (masked for good) count as 0."""
        rows = score.clamp_min(0).square().sum(dim=1)
        return keep_largest(rows[None], self.kept(len(rows)))[0][:, None].expand_as(score).clone()

    def groups(self, weight: Tensor) -> Shaped[Tensor, "1 n"]:
        """Return the sets of weights that compete with one another: all of them."""
        return weight.reshape(1, -1)


Pattern = Unstructured | NofM | Neurons


def parse_pattern(text: str, sparsity: float | None) -> Pattern:
    """Return the pattern that ``row``, ``layer``, ``neuron`` or ``N:M`` names. Raises :class:`ConfigError`."""
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        n, m = int(match[1]), int(match[2])
        if not 0 < n < m:
            raise ConfigError(f"pattern {text} keeps {n} of {m}; N must be at least 1 and less than M")
        if sparsity is not None and abs(sparsity - (1 - n / m)) > 1e-9:
            raise ConfigError(f"pattern {text} means sparsity {1 - n / m:g}, not {sparsity:g}; leave sparsity out")
        return NofM(n, m)
    if text not in ("row", "layer", "neuron"):
        raise ConfigError(f"unknown pattern '{text}'; use row, layer, neuron, or N:M such as 2:4")
    if sparsity is None:
        raise ConfigError(f"pattern {text} needs a sparsity; give one in [0, 1), such as 0.5")
    if text == "neuron":
        return Neurons(require_share(sparsity))
    return Unstructured(require_share(sparsity), text == "row")


def require_share(sparsity: float) -> float:
    """Return a sparsity in [0, 1); raise :class:`ConfigError` for another."""
    if not 0 <= sparsity < 1:
        raise ConfigError(f"sparsity {sparsity:g} is outside [0, 1); 0.5 takes half of the weights away")
    return sparsity


def keep_largest(score: Float[Tensor, "rows n"], kept: int) -> Bool[Tensor, "rows n"]:
    """Return True at the ``kept`` largest of each row; among equals the first ones stay."""
    order = score.argsort(dim=1, descending=True, stable=True)
    mask = torch.zeros_like(score, dtype=torch.bool)
    return mask.scatter_(1, order[:, :kept], True)
