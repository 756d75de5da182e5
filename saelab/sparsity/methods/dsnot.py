"""DSnoT: trade weights of a given mask, without training (Zhang et al. 2023, arXiv 2310.08915).

For each output row, the pruned weights leave an expected error eps = sum over pruned j of W_j E[x_j]. Again and again
the pruned weight whose return takes the error most toward zero comes back (weighted by one over the variance of its
input), and of the kept weights whose loss also takes it toward zero the one with the smallest Wanda score goes. Counts
per row (per group with N:M) never change.

Our design: a trade is made only when it leaves |eps| no larger, which makes "the error never grows" a property rather
than a tendency, and when it leaves the row's mean squared error on the calibration tokens, v^T E[x x^T] v with v the
pruned weights, no larger: without that a small gain in the mean is bought with a large loss in the rest. That needs the
Gram matrix, which the paper does without. A row is finished at its first trade that would not, when |eps| is at most
``tolerance``, or after ``steps`` trades.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from saelab.sparsity.methods.base import Method, Pruned, masked
from saelab.sparsity.methods.wanda import wanda_score
from saelab.sparsity.pattern import NofM, Pattern
from saelab.sparsity.statistics import InputStatistics


class DSnoT(Method):
    """Start from a mask by magnitude or Wanda and trade weights so that each row's expected error shrinks."""

    name: Literal["dsnot"] = "dsnot"
    need = "gram"
    start: Literal["wanda", "magnitude"] = "wanda"
    """Where the first mask comes from."""
    steps: int = Field(default=50, ge=1)
    """Most trades in one row (T of the paper)."""
    tolerance: float = Field(default=0.1, ge=0)
    """A row is finished when its expected error is below this (the paper's epsilon, in units of the output)."""

    def prune(
        self, weight: Tensor, inputs: InputStatistics | None, pattern: Pattern | None, generator: torch.Generator
    ) -> Pruned:
        """Prune one layer."""
        assert pattern is not None
        assert inputs is not None
        score = wanda_score(weight, inputs)
        mask = pattern.mask(score if self.start == "wanda" else weight.abs())
        group = pattern.m if isinstance(pattern, NofM) else None
        new, trades = trade(weight, mask, inputs, score, steps=self.steps, tolerance=self.tolerance, group=group)
        before, after = (expected_error(weight, m, inputs).abs().mean().item() for m in (mask, new))
        return masked(weight, new, trades=trades, error_before=before, error_after=after)


def expected_error(
    weight: Float[Tensor, "out in"], mask: Bool[Tensor, "out in"], inputs: InputStatistics
) -> Float[Tensor, " out"]:
    """E[dense output] - E[sparse output] of each row, float64."""
    return (weight.double() * ~mask) @ inputs.mean


def trade(
    weight: Float[Tensor, "out in"],
    mask: Bool[Tensor, "out in"],
    inputs: InputStatistics,
    score: Float[Tensor, "out in"],
    *,
    steps: int,
    tolerance: float,
    group: int | None = None,
) -> tuple[Bool[Tensor, "out in"], int]:
    """Return a mask with equal counts per row (per ``group`` of inputs) and no larger errors, and the trades made."""
    mask = mask.clone()
    moved = weight.double() * inputs.mean  # what a weight adds to its row's expected output
    worth = moved / inputs.variance.clamp_min(1e-12)
    moments = inputs.gram / inputs.n
    gone = weight.double() * ~mask
    pull = gone @ moments  # E[error x_j]: half the derivative of a row's squared error by its pruned weight j
    error = expected_error(weight, mask, inputs)
    rows = torch.arange(weight.shape[0])
    active = error.abs() > tolerance
    trades = 0
    never = torch.tensor(torch.inf, dtype=torch.float64)
    for _ in range(steps):
        if not bool(active.any()):
            break
        sign = error.sign()[:, None]
        candidates = mask & (sign * moved < 0)
        growable = ~mask & (sign * moved > 0)
        if group is not None:  # a weight can only return where another of its group can go
            possible = candidates.view(len(weight), -1, group).any(2).repeat_interleave(group, 1)
            growable &= possible
        best, grown = torch.where(growable, sign * worth, -never).max(dim=1)
        if group is not None:
            candidates &= _same_group(grown, group, weight.shape[1])
        cost, pruned = torch.where(candidates, score.double(), never).min(dim=1)
        after = error - moved[rows, grown] + moved[rows, pruned]
        out, back = weight[rows, pruned].double(), weight[rows, grown].double()
        squared = 2 * (out * pull[rows, pruned] - back * pull[rows, grown]) - 2 * out * back * moments[pruned, grown]
        squared += out.square() * moments[pruned, pruned] + back.square() * moments[grown, grown]
        active &= best.isfinite() & cost.isfinite() & (after.abs() <= error.abs()) & (squared <= 0)
        chosen = rows[active]
        mask[chosen, grown[active]] = True
        mask[chosen, pruned[active]] = False
        pull[active] += (out[:, None] * moments[pruned] - back[:, None] * moments[grown])[active]
        error = torch.where(active, after, error)
        trades += len(chosen)
        active &= error.abs() > tolerance
    return mask, trades


def _same_group(index: Tensor, group: int, width: int) -> Tensor:
    return torch.arange(width)[None, :] // group == (index // group)[:, None]
