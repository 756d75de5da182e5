"""``Decomposition``: the numbers of sections 3.1 and 3.2 for one SAE, each beside its control.

The shrinkage control: a reconstruction that is only too small, ``x_hat = a x``, has an error that is a linear function
of x whatever the SAE has learned. So the R2 is given again for ``x_hat`` stretched by the one factor that fits best,
with the share of the error that this factor alone removes.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from saelab.analysis.dark_matter.decompose import EXTRA, NORMS, Measured, Passes
from saelab.analysis.dark_matter.norms import baseline_r2
from saelab.analysis.dark_matter.tokens import Tokens
from saelab.analysis.reconstruction import ratio
from saelab.core.regression import CrossMoments

if TYPE_CHECKING:
    import pandas as pd

SHRUNK = 0.95
"""Shrinkage below which an SAE is flagged."""
REMOVED = 0.1
"""Share of the error removed by one factor from which on an SAE is flagged."""
RESAMPLES = 400
"""Bootstrap samples of contexts behind an interval."""


@dataclass(frozen=True)
class Shrinkage:
    """What of the error is only a reconstruction of the wrong size."""

    shrinkage: float
    """``sum ||x_hat||^2 / sum <x, x_hat>`` on centred test tokens: 1 unbiased, below 1 shrunk."""
    factor: float
    """Factor on the centred ``x_hat`` that fits best, from the contexts of the fit."""
    removed: float
    """Share of the test tokens' error energy that this factor removes."""
    r2_rescaled: float
    """R2 of the error left after rescaling, on x; nan when nothing is left."""
    flagged: bool
    """Whether the linear part may be shrinkage: shrinkage under 0.95, or over a tenth of the error removed."""


@dataclass(frozen=True)
class Decomposition:
    """Linear and nonlinear error of one SAE on test contexts."""

    name: str
    """The SAE."""
    d_in: int
    """Activation width."""
    d_sae: int
    """Number of features."""
    l0: float
    """Mean number of active features per token."""
    n_fit: int
    """Tokens the map was fitted on."""
    n_test: int
    """Tokens everything else is of."""
    contexts_fit: int
    """Contexts of the fit."""
    contexts_test: int
    """Contexts of the test."""
    r2: float
    """Pooled R2 of the error vector on ``[x, 1]``."""
    r2_interval: list[float]
    """95 % interval of ``r2``, contexts resampled."""
    r2_per_dimension: float
    """Mean over dimensions of each one's R2: what the paper reports; dimensions of little variance weigh as much."""
    r2_no_intercept: float
    """Pooled R2 of the fit without a constant (that of the paper's main scan)."""
    r2_fit: float
    """Pooled R2 on the tokens of the fit; far above ``r2`` when there were too few."""
    r2_shuffled: float
    """Control: pooled R2 when x is paired with the error of another token."""
    fvu: float
    """FVU of the SAE."""
    fvu_interval: list[float]
    """95 % interval of ``fvu``."""
    fvu_linear: float
    """``fvu - fvu_nonlinear``: what adding the linear part back removes."""
    fvu_nonlinear: float
    """FVU of ``x_hat + l``."""
    fvu_nonlinear_interval: list[float]
    """95 % interval of ``fvu_nonlinear``."""
    linear_share: float
    """Share of ``sum ||l||^2`` in ``sum ||l||^2 + sum ||eta||^2``."""
    shrinkage: Shrinkage
    """The shrinkage control of ``r2``."""
    norm_r2: dict[str, float]
    """R2 on ``[x, 1]`` of the squared norms of error, reconstruction, reconstruction + linear part, linear and
    nonlinear part; ``error_norm`` is ``||e||`` without the square."""
    norm_r2_shuffled: dict[str, float]
    """Control: the same with the norms of other tokens."""
    baselines: dict[str, float]
    """R2 of ``||e||^2`` on single predictors: token identity (mean per token), ``||x||``, ``||x||^2``, L0, and where
    the model was run the loss at the token and the token's surprisal."""
    latents: dict[str, float]
    """Correlation (``pearson``, ``spearman``, over ``n`` features) between the inner product of the probe of
    ``||x_hat - b_dec||^2`` with a decoder row and the feature's mean active value."""

    def to_row(self) -> dict[str, Any]:
        """One flat row of numbers."""
        row = {k: v for k, v in vars(self).items() if isinstance(v, str | int | float)}
        row |= vars(self.shrinkage)
        row |= {f"norm_{k}": v for k, v in self.norm_r2.items()}
        return row | {f"baseline_{k}": v for k, v in self.baselines.items()}


def decompositions(
    tokens: Tokens, measured: Measured, d_sae: dict[str, int], losses: dict[str, np.ndarray] | None = None
) -> list[Decomposition]:
    """Turn what the passes measured into results; ``losses`` are further per-token predictors of the error norm."""
    return [_one(tokens, measured, name, d_sae[name], losses or {}) for name in measured.saes]


def to_frame(results: "list[Decomposition]") -> "pd.DataFrame":
    """One row per SAE."""
    import pandas as pd

    return pd.DataFrame([result.to_row() for result in results])


def _one(tokens: Tokens, measured: Measured, name: str, d_sae: int, losses: dict[str, np.ndarray]) -> Decomposition:
    mine = measured.saes[name]
    r2 = mine.test.r2(mine.linear)
    nothing = mine.shuffled[0].fit()
    energy = float(mine.test.xx.diagonal().sum())
    test = (~tokens.fit).numpy()
    sums = {
        "error": mine.total[test],
        "nonlinear": mine.nonlinear[test],
        "centred": mine.centred[test],
        "x": measured.x_centred[test],
    }
    fvu = ratio(float(sums["error"].sum(dtype=np.float64)), energy)
    fvu_nonlinear = ratio(float(sums["nonlinear"].sum(dtype=np.float64)), energy)
    intervals = _intervals(tokens.context.numpy()[test], sums)
    both = float(mine.linear_norm[test].sum(dtype=np.float64)), float(sums["nonlinear"].sum(dtype=np.float64))
    norm_r2, norm_null = _norms(measured, name)
    predictors = {
        "x_norm": np.sqrt(measured.x_norm),
        "x_norm_squared": measured.x_norm,
        "l0": mine.l0,
        **losses,
    }
    return Decomposition(
        name=name,
        d_in=mine.fit.mean_x.numel(),
        d_sae=d_sae,
        l0=float(mine.l0[test].mean()),
        n_fit=mine.fit.n,
        n_test=mine.test.n,
        contexts_fit=tokens.n_contexts(True),
        contexts_test=tokens.n_contexts(False),
        r2=r2.pooled,
        r2_interval=intervals["r2"],
        r2_per_dimension=r2.per_dimension,
        r2_no_intercept=mine.test.r2(mine.fit.fit(intercept=False)).pooled,
        r2_fit=mine.fit.r2(mine.linear).pooled,
        r2_shuffled=mine.shuffled[1].r2(nothing).pooled,
        fvu=fvu,
        fvu_interval=intervals["fvu"],
        fvu_linear=fvu - fvu_nonlinear,
        fvu_nonlinear=fvu_nonlinear,
        fvu_nonlinear_interval=intervals["fvu_nonlinear"],
        linear_share=ratio(both[0], sum(both)),
        shrinkage=shrinkage_of(mine.fit, mine.test),
        norm_r2=norm_r2,
        norm_r2_shuffled=norm_null,
        baselines=baseline_r2(mine.total, predictors, tokens.token_id.numpy(), tokens.fit.numpy()),
        latents=_latents(measured, name, mine),
    )


def shrinkage_of(fit: CrossMoments, test: CrossMoments) -> Shrinkage:
    """The shrinkage control, from the cross-moments of x with e on fit and test tokens."""
    x_hat, along = _energies(fit)
    factor = ratio(along, x_hat)
    own, along_test = _energies(test)
    after_fit, after_test = _rescaled(fit, factor), _rescaled(test, factor)
    left, before = float(after_test.yy.sum()), float(test.yy.sum())
    r2 = float("nan")
    if left > 1e-10 * float(test.xx.diagonal().sum()):
        r2 = after_test.r2(after_fit.fit()).pooled
    shrinkage, removed = ratio(own, along_test), 1 - ratio(left, before)
    return Shrinkage(shrinkage, factor, removed, r2, shrinkage < SHRUNK or removed > REMOVED)


def _energies(m: CrossMoments) -> tuple[float, float]:
    """Centred ``sum ||x_hat||^2`` and ``sum <x, x_hat>`` from the moments of x with e = x - x_hat."""
    x, e, cross = float(m.xx.diagonal().sum()), float(m.yy.sum()), float(m.xy.diagonal().sum())
    return x - 2 * cross + e, x - cross


def _rescaled(m: CrossMoments, factor: float) -> CrossMoments:
    """Moments of x with ``x - factor x_hat = (1 - factor) x + factor e``."""
    rest = 1 - factor
    result = CrossMoments(0, 0)
    result.n, result.mean_x, result.xx = m.n, m.mean_x, m.xx
    result.mean_y = rest * m.mean_x + factor * m.mean_y
    result.xy = rest * m.xx + factor * m.xy
    result.yy = rest**2 * m.xx.diagonal() + 2 * rest * factor * m.xy.diagonal() + factor**2 * m.yy
    return result


def _norms(measured: Measured, name: str) -> tuple[dict[str, float], dict[str, float]]:
    columns = measured.norm_columns(name)
    names = (*NORMS, *EXTRA)
    found = []
    for fit, test in ((measured.norms_fit, measured.norms_test), measured.norms_shuffled):
        each = test.select(y=columns).r2(fit.select(y=columns).fit()).each.tolist()
        found.append({k: v for k, v in zip(names, each, strict=True) if k != "active_part"})
    return found[0], found[1]


def _latents(measured: Measured, name: str, mine: Passes) -> dict[str, float]:
    """Correlate the probe's inner product with each decoder row with the feature's mean active value."""
    from scipy.stats import spearmanr

    column = measured.norm_columns(name).stop - 1
    probe = measured.norms_fit.select(y=slice(column, column + 1)).fit().weight[:, 0]
    often = mine.fired >= 10
    n = int(often.sum())
    if n < 3:
        return {"pearson": float("nan"), "spearman": float("nan"), "n": float(n)}
    along = (mine.decoder.double() @ probe)[often].numpy()
    value = (mine.active[often] / mine.fired[often]).numpy()
    spearman = spearmanr(along, value)[0] if np.ptp(along) > 0 and np.ptp(value) > 0 else float("nan")
    stacked = torch.from_numpy(np.stack([along, value]))
    return {"pearson": float(torch.corrcoef(stacked)[0, 1]), "spearman": float(spearman), "n": float(n)}


def _intervals(context: np.ndarray, values: dict[str, np.ndarray], seed: int = 0) -> dict[str, list[float]]:
    """95 % intervals of FVU, FVU_nonlinear and R2 by resampling contexts."""
    _, place = np.unique(context, return_inverse=True)
    count = int(place.max()) + 1
    sums = {k: np.bincount(place, weights=v.astype(np.float64), minlength=count) for k, v in values.items()}
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLES)
    drawn = {k: draws @ v for k, v in sums.items()}
    with np.errstate(divide="ignore", invalid="ignore"):
        samples = {
            "fvu": drawn["error"] / drawn["x"],
            "fvu_nonlinear": drawn["nonlinear"] / drawn["x"],
            "r2": 1 - drawn["nonlinear"] / drawn["centred"],
        }
        return {k: [float(q) for q in np.quantile(v, (0.025, 0.975))] for k, v in samples.items()}
