"""Errors of a ladder of SAEs that differ in width: the scaling law (3.3) and error per token from SAE to SAE (3.5)."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from saelab.analysis.dark_matter.norms import line_r2
from saelab.core.errors import ConfigError

FEWEST_WIDTHS = 4
"""Widths below which no law of three parameters is fitted."""
STEEPEST = 4.0
"""Largest exponent considered."""


@dataclass(frozen=True)
class ScalingFit:
    """``FVU(width) = c + a width^-b`` over a ladder, and a constant for the nonlinear part.

    Intervals are 95 % profile intervals (F test on the residuals of the fit): they say how well these widths pin the
    number down if the law holds, and nothing about whether it does.
    """

    widths: list[int]
    """Widths, rising."""
    l0: list[float]
    """Mean L0 at each: the law is about equal L0."""
    fvu: list[float]
    """FVU of each SAE."""
    fvu_nonlinear: list[float]
    """FVU of ``x_hat + l``."""
    a: float
    """Size of the part that vanishes with width."""
    b: float
    """Its exponent."""
    c: float
    """FVU left at infinite width."""
    b_interval: list[float]
    """95 % profile interval of b (within 0 to 4)."""
    c_interval: list[float]
    """95 % profile interval of c (within 0 to the smallest FVU)."""
    rms: float
    """Root mean square residual of the fit."""
    nonlinear: float
    """Mean FVU_nonlinear: the constant."""
    nonlinear_interval: list[float]
    """95 % t interval of that mean."""
    nonlinear_slope: float
    """Change of FVU_nonlinear per doubling of the width."""
    nonlinear_slope_interval: list[float]
    """Its 95 % t interval; when it holds 0 the constant is not refuted."""
    absent: list[float]
    """``a width^-b`` at each width: error from features that a wider SAE would have."""
    linear_left: float
    """``c - nonlinear``: linear error that stays (negative when the law's floor is below the nonlinear part)."""
    equal_l0: bool
    """Whether all L0 are within a tenth of their mean."""


@dataclass(frozen=True)
class TokenScaling:
    """How well the error norm of one SAE on a token is predicted from another SAE's on the same token (test tokens)."""

    smaller: str
    """SAE the predictors are of."""
    larger: str
    """SAE whose error norm is predicted."""
    r2: float
    """R2 of ``||e_larger||`` on ``[||e_smaller||, 1]``."""
    r2_with_nonlinear: float
    """R2 with ``||eta_smaller||`` as a second predictor."""
    removed: float
    """Share of the unexplained variance that the second predictor removes."""
    r2_x_norm: float
    """Control: R2 on ``[||x||, 1]`` alone; big activations have big errors in any SAE."""
    r2_beyond_x_norm: float
    """Share of what ``||x||`` leaves unexplained that adding ``||e_smaller||`` removes."""
    r2_shuffled: float
    """Control: R2 with the error norms of other tokens."""


def fit_scaling(widths: list[int], fvu: list[float], fvu_nonlinear: list[float], l0: list[float]) -> ScalingFit:
    """Fit the law to a ladder of SAEs. Raises :class:`ConfigError` for fewer than four different widths."""
    from scipy.stats import f, t

    if len(set(widths)) < FEWEST_WIDTHS:
        raise ConfigError(
            f"a scaling law needs SAEs of at least {FEWEST_WIDTHS} widths, got {len(set(widths))} "
            f"({', '.join(map(str, sorted(set(widths))))}); train a ladder (configs/ladder.yaml)"
        )
    order = np.argsort(widths, kind="stable")
    w, y, flat, active = (np.asarray(v, np.float64)[order] for v in (widths, fvu, fvu_nonlinear, l0))
    a, b, c, lowest = _best(w, y)
    free = max(len(w) - 3, 1)
    bound = lowest * (1 + float(f.ppf(0.95, 1, free)) / free) + 1e-18
    steps_c, steps_b = np.linspace(0, float(y.min()), 401), np.linspace(0.01, STEEPEST, 400)
    squares = _squares(w, y, steps_c, steps_b)
    c_in = [c, *steps_c[squares.min(1) <= bound]]
    b_in = [b, *steps_b[squares.min(0) <= bound]]
    mean, quantile = float(flat.mean()), float(t.ppf(0.975, len(w) - 1))
    half = quantile * float(flat.std(ddof=1)) / len(w) ** 0.5
    slope, slope_half = _slope(np.log2(w), flat)
    return ScalingFit(
        widths=[int(v) for v in w],
        l0=active.tolist(),
        fvu=y.tolist(),
        fvu_nonlinear=flat.tolist(),
        a=a,
        b=b,
        c=c,
        b_interval=[float(min(b_in)), float(max(b_in))],
        c_interval=[float(min(c_in)), float(max(c_in))],
        rms=float(np.sqrt(lowest / len(w))),
        nonlinear=mean,
        nonlinear_interval=[mean - half, mean + half],
        nonlinear_slope=slope,
        nonlinear_slope_interval=[slope - slope_half, slope + slope_half],
        absent=(a * w**-b).tolist(),
        linear_left=c - mean,
        equal_l0=bool(np.abs(active - active.mean()).max() <= 0.1 * active.mean()),
    )


def token_scaling(
    norms: dict[str, tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]],
    x_norm: Float[np.ndarray, " n"],
    fit: Bool[np.ndarray, " n"],
    seed: int = 0,
) -> list[TokenScaling]:
    """Predict error norms between all pairs of SAEs, given in order of width as name -> (``||e||``, ``||eta||``)."""
    names = list(norms)
    order = np.random.default_rng(seed).permutation(len(x_norm))
    # Tokens are exchanged within fit and within test.
    mixed = np.empty(len(x_norm), np.int64)
    for part in (fit, ~fit):
        mixed[np.flatnonzero(part)] = order[part[order]]
    result = []
    for i, smaller in enumerate(names):
        for larger in names[i + 1 :]:
            (e, eta), target = norms[smaller], norms[larger][0]

            def explained(*predictors: np.ndarray, target: np.ndarray = target) -> float:
                return line_r2(target, np.stack(predictors, 1), fit, ~fit)

            alone, both, size = explained(e), explained(e, eta), explained(x_norm)
            result.append(
                TokenScaling(
                    smaller=smaller,
                    larger=larger,
                    r2=alone,
                    r2_with_nonlinear=both,
                    removed=_share(both - alone, 1 - alone),
                    r2_x_norm=size,
                    r2_beyond_x_norm=_share(explained(x_norm, e) - size, 1 - size),
                    r2_shuffled=explained(e[mixed]),
                )
            )
    return result


def _share(gain: float, left: float) -> float:
    return gain / left if left > 0 else float("nan")


def _best(w: np.ndarray, y: np.ndarray) -> tuple[float, float, float, float]:
    """Return a, b, c and the sum of squares of the bounded least-squares fit."""
    from scipy.optimize import least_squares

    def residuals(p: np.ndarray) -> np.ndarray:
        return np.asarray(p[2] + p[0] * (w / w[0]) ** -p[1] - y)

    top, lowest = float(y.max()) + 1e-9, float(y.min())
    tight = {"xtol": 1e-14, "ftol": 1e-14, "gtol": 1e-14}
    found = [
        least_squares(
            residuals,
            [max(float(y[0] - y[-1]), 1e-6), b, 0.5 * lowest],
            bounds=([0.0, 0.0, 0.0], [10 * top, STEEPEST, lowest + 1e-12]),
            **tight,
        )
        for b in (0.2, 0.7, 1.5)
    ]
    best = min(found, key=lambda fit: float(fit.cost))
    a, b, c = (float(v) for v in best.x)
    return a * float(w[0]) ** b, b, c, float(np.square(best.fun).sum())


def _squares(w: np.ndarray, y: np.ndarray, c: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Sum of squares at every (c, b), with the a >= 0 that fits best."""
    shape = (w / w[0]) ** -b[:, None]
    left = y - c[:, None]
    a = np.clip(left @ shape.T / np.square(shape).sum(1), 0, None)
    return np.asarray(np.square(left[:, None, :] - a[:, :, None] * shape).sum(2))


def _slope(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Slope of y on x and half its 95 % t interval."""
    from scipy.stats import linregress, t

    line = linregress(x, y)
    return float(line.slope), float(t.ppf(0.975, len(x) - 2) * line.stderr)
