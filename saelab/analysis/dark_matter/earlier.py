"""Error from earlier SAEs (section 3.8.13): how much of e, l and eta is linear in what other SAEs reconstruct."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from saelab.analysis.dark_matter.decompose import reconstruct
from saelab.analysis.dark_matter.tokens import Tokens
from saelab.analysis.reconstruction import ratio
from saelab.core.errors import ConfigError
from saelab.core.progress import progress
from saelab.core.regression import CrossMoments, LinearMap
from saelab.features.protocols import Dictionary

if TYPE_CHECKING:
    import pandas as pd

OWN = "own"
PARTS = ("error", "linear", "nonlinear")


@dataclass(frozen=True)
class FromEarlier:
    """R2 on test contexts of the parts of the error, regressed on reconstructions at some sites."""

    predictors: str
    """``own`` (the SAE's own x_hat), a site, ``earlier`` (all of them) or ``own+earlier``."""
    error: float
    """Pooled R2 of e."""
    linear: float
    """Pooled R2 of l."""
    nonlinear: float
    """Pooled R2 of eta."""
    shuffled: float
    """Control: R2 of e on the reconstructions of another token."""
    fvu: float
    """FVU of ``x_hat`` + what is predicted of e."""
    width: int
    """Number of predictors."""


def frame(results: list[FromEarlier]) -> "pd.DataFrame":
    """One row per set of predictors."""
    import pandas as pd

    return pd.DataFrame([vars(r) for r in results])


@torch.no_grad()
def from_earlier(  # noqa: PLR0917
    tokens: Tokens,
    site: str,
    sae: Dictionary,
    linear: LinearMap,
    earlier: Mapping[str, Dictionary],
    seed: int = 0,
) -> list[FromEarlier]:
    """Regress the error of ``sae`` on its own reconstruction and on those of SAEs at other sites (site -> SAE)."""
    widths = {OWN: sae.d_in, **{name: other.d_in for name, other in earlier.items()}}
    for name, other in earlier.items():
        if tokens.width(name) != other.d_in:
            raise ConfigError(
                f"the SAE for {name} reads width {other.d_in}, but the store has {tokens.width(name)} there"
            )
    d, total = sae.d_in, sum(widths.values())
    real = [CrossMoments(total, 3 * d) for _ in range(2)]
    null = [CrossMoments(total, 3 * d) for _ in range(2)]
    energy = CrossMoments(0, d)
    generator = torch.Generator().manual_seed(seed)
    with progress("earlier sites", tokens.n) as bar:
        for chunk in tokens.chunks([site, *earlier]):
            x = chunk.x[site]
            own = reconstruct(sae, x, site)
            parts = [own, *(reconstruct(other, chunk.x[name], name) for name, other in earlier.items())]
            e, along = x - own, linear(x)
            inputs, targets = torch.cat(parts, 1), torch.cat([e, along, e - along], 1)
            for some, moments, control in ((chunk.fit, real[0], null[0]), (~chunk.fit, real[1], null[1])):
                moments.update(inputs[some], targets[some])
                mixed = torch.randperm(int(some.sum()), generator=generator)
                control.update(inputs[some], targets[some][mixed])
            test = x[~chunk.fit]
            energy.update(test[:, :0], test)
            bar.advance(x.shape[0])
    variance = float(energy.yy.sum())
    return [_with(name, columns, real, null, d, variance) for name, columns in _sets(widths).items()]


def _sets(widths: dict[str, int]) -> dict[str, torch.Tensor]:
    """Columns of each set of predictors."""
    columns, start = {}, 0
    for name, width in widths.items():
        columns[name] = torch.arange(start, start + width)
        start += width
    others = [columns[name] for name in widths if name != OWN]
    if len(others) > 1:
        columns["earlier"] = torch.cat(others)
    if others:
        columns["own+earlier"] = torch.arange(start)
    return columns


def _with(  # noqa: PLR0917
    name: str, columns: torch.Tensor, real: list[CrossMoments], null: list[CrossMoments], d: int, variance: float
) -> FromEarlier:
    fit, test = (m.select(columns) for m in real)
    linear = fit.fit()
    r2 = {}
    for k, part in enumerate(PARTS):
        mine = slice(k * d, (k + 1) * d)
        r2[part] = test.select(y=mine).r2(linear.select(mine))
    whole = slice(0, d)
    shuffled = null[1].select(columns, whole).r2(null[0].select(columns, whole).fit()).pooled
    return FromEarlier(
        predictors=name,
        error=r2["error"].pooled,
        linear=r2["linear"].pooled,
        nonlinear=r2["nonlinear"].pooled,
        shuffled=shuffled,
        fvu=ratio(float(r2["error"].residual.sum()), variance),
        width=len(columns),
    )
