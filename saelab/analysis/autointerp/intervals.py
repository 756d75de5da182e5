"""Scores as numbers with their 95 % confidence intervals."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

Z = 1.959963984540054
"""97.5 % quantile of the normal distribution."""


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % confidence interval; all nan when it is not defined."""

    value: float
    """The estimate."""
    low: float
    """Lower end."""
    high: float
    """Upper end."""


UNDEFINED = Estimate(math.nan, math.nan, math.nan)


def proportion(hits: float, n: float) -> Estimate:
    """Return a share with Wilson's interval."""
    if n <= 0:
        return UNDEFINED
    p = hits / n
    centre = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return Estimate(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)))


def balanced(true_positives: int, positives: int, true_negatives: int, negatives: int) -> Estimate:
    """Balanced accuracy ``(TPR + TNR) / 2``; the two Wilson intervals combined by Zou and Donner's method (2008)."""
    a, b = proportion(true_positives, positives), proportion(true_negatives, negatives)
    value = (a.value + b.value) / 2
    if not math.isfinite(value):
        return UNDEFINED
    low = math.hypot(a.value - a.low, b.value - b.low) / 2
    high = math.hypot(a.high - a.value, b.high - b.value) / 2
    return Estimate(value, max(0.0, value - low), min(1.0, value + high))


def auc(scores: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"]) -> Estimate:
    """Area under the ROC curve, ties half, with DeLong's interval (1988); 0.5 on constant scores.

    When one class is separated perfectly DeLong's variance is 0; the interval is then Wilson's for the smaller class.
    """
    high, low = np.asarray(scores, np.float64)[positive], np.asarray(scores, np.float64)[~positive]
    if not len(high) or not len(low):
        return UNDEFINED
    wins = (high[:, None] > low[None]) + 0.5 * (high[:, None] == low[None])
    value = float(wins.mean())
    if min(len(high), len(low)) < 2:
        return proportion(value * min(len(high), len(low)), min(len(high), len(low)))
    variance = wins.mean(1).var(ddof=1) / len(high) + wins.mean(0).var(ddof=1) / len(low)
    if variance == 0:
        smaller = min(len(high), len(low))
        return proportion(value * smaller, smaller)
    half = Z * math.sqrt(variance)
    return Estimate(value, max(0.0, value - half), min(1.0, value + half))


def correlation(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> Estimate:
    """Pearson's r with Fisher's interval; undefined (nan, not 0) when either is constant."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return UNDEFINED
    x, y = x - x.mean(), y - y.mean()
    r = float(np.clip(x @ y / math.sqrt(float(x @ x) * float(y @ y)), -1, 1))
    if len(x) < 4 or abs(r) == 1:
        return Estimate(r, r, r) if abs(r) == 1 else Estimate(r, -1.0, 1.0)
    half = Z / math.sqrt(len(x) - 3)
    return Estimate(r, math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half))


def mean(values: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"] | None = None) -> Estimate:
    """Mean, weighted if ``weights`` are given, with the normal interval of the mean; nan values are left out."""
    values = np.asarray(values, np.float64)
    share = np.ones(len(values)) if weights is None else np.asarray(weights, np.float64)
    there = np.isfinite(values) & (share > 0)
    values, share = values[there], share[there]
    if not len(values):
        return UNDEFINED
    share = share / share.sum()
    value = float(share @ values)
    if len(values) < 2:
        return Estimate(value, math.nan, math.nan)
    half = Z * math.sqrt(float(share**2 @ (values - value) ** 2) * len(values) / (len(values) - 1))
    return Estimate(value, value - half, value + half)
