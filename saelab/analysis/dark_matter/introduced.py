"""The synthetic model of section 3.4: the linear/nonlinear split against errors that were put in.

Codes of a real SAE make a truth of known parts. ``x' = x_hat + sigma_x noise`` is the activation; the "SAE" has lost
the q per cent of features with the lowest mean value (absent features) and adds ``sigma_r noise`` of its own
(introduced error). So ``e' = absent + sigma_x noise - sigma_r noise'``, and linear and nonlinear error estimated from
(x', e') can be held against the true energies. For orthonormal features with linearly readable coefficients
``R2 = Var(absent) / (Var(absent) + Var(introduced))``.

Sigmas are in units of the root mean square, per coordinate, of the real SAE's error, so at 1 a noise has as much energy
as that error (the paper's grid is in the model's own units).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.core.code import SparseCode
from saelab.core.progress import progress
from saelab.core.regression import CrossMoments
from saelab.features.protocols import Dictionary
from saelab.features.rows import encode_in_parts

if TYPE_CHECKING:
    import pandas as pd

SIGMAS_X = (0.0, 0.3, 0.6, 1.0)
SIGMAS_R = (0.0, 0.5, 1.0, 2.0)
ABSENT = (0.0, 10.0, 25.0, 50.0)


@dataclass(frozen=True)
class IntroducedCell:
    """One setting; energies are means over test tokens of squared norms about the mean, over those of x'."""

    absent_percent: float
    """Features left out, per cent of those that fire."""
    sigma_x: float
    """Dense noise in the activation."""
    sigma_r: float
    """Noise added to the reconstruction."""
    true_absent: float
    """Energy of the absent features and the dense noise: what an ideal SAE lacks."""
    true_introduced: float
    """Energy of the introduced error."""
    linear: float
    """Estimated linear error (FVU_linear)."""
    nonlinear: float
    """Estimated nonlinear error (FVU_nonlinear)."""
    r2: float
    """R2 of the error vector on test contexts."""


@dataclass(frozen=True)
class Introduced:
    """The grid, and how estimates go with truth."""

    cells: list[IntroducedCell]
    """All settings with some error."""
    correlation: dict[str, dict[str, float]]
    """Pearson correlation over the grid: estimated ``linear`` / ``nonlinear`` with true ``absent`` / ``introduced``."""
    n_tokens: int
    """Tokens used."""
    seed: int
    """Seed of the noise."""

    def to_frame(self) -> "pd.DataFrame":
        """One row per setting."""
        import pandas as pd

        return pd.DataFrame([vars(cell) for cell in self.cells])


@torch.no_grad()
def introduced_error(
    sae: Dictionary,
    x: Float[Tensor, "n d"],
    fit: Bool[Tensor, " n"],
    *,
    absent: tuple[float, ...] = ABSENT,
    sigmas_x: tuple[float, ...] = SIGMAS_X,
    sigmas_r: tuple[float, ...] = SIGMAS_R,
    seed: int = 0,
) -> Introduced:
    """Run the grid on some activations; ``fit`` says which tokens the estimates are fitted on."""
    generator = torch.Generator().manual_seed(seed)
    code = encode_in_parts(sae, x, "the site").positive()
    x_hat = sae.decode(code).float().cpu()
    unit = float((x - x_hat).square().mean().sqrt())
    noise_x, noise_r = (torch.randn(x.shape, generator=generator) * unit for _ in range(2))
    order = _weakest_first(code)
    cells = []
    with progress("synthetic error", len(absent) * len(sigmas_x) * len(sigmas_r), "settings") as bar:
        for percent in absent:
            lost = x_hat - sae.decode(_without(code, order[: round(len(order) * percent / 100)])).float().cpu()
            for sigma_x in sigmas_x:
                for sigma_r in sigmas_r:
                    missing, added = lost + sigma_x * noise_x, sigma_r * noise_r
                    truth = x_hat + sigma_x * noise_x
                    cell = _cell((percent, sigma_x, sigma_r), truth, missing, added, fit)
                    if cell is not None:
                        cells.append(cell)
                    bar.advance(1)
    return Introduced(cells, _correlations(cells), x.shape[0], seed)


def _cell(
    setting: tuple[float, float, float], x: Tensor, missing: Tensor, added: Tensor, fit: Tensor
) -> IntroducedCell | None:
    e = missing - added
    if not bool((e != 0).any()):
        return None
    d = x.shape[1]
    moments = [CrossMoments(d, d) for _ in range(2)]
    for some, part in ((fit, moments[0]), (~fit, moments[1])):
        part.update(x[some], e[some])
    found = moments[1].r2(moments[0].fit())
    energy = float(moments[1].xx.diagonal().sum())
    left, all_of_it = float(found.residual.sum()) / energy, float(moments[1].yy.sum()) / energy
    true = [_spread(part[~fit]) / energy for part in (missing, added)]
    return IntroducedCell(*setting, true[0], true[1], all_of_it - left, left, found.pooled)


def _spread(x: Tensor) -> float:
    return float((x - x.mean(0)).double().square().sum())


def _weakest_first(code: SparseCode) -> Tensor:
    """Features that fire, by rising mean active value."""
    total = torch.zeros(code.d_sae, dtype=torch.float64).index_add_(0, code.indices.cpu(), code.values.cpu().double())
    count = torch.bincount(code.indices.cpu(), minlength=code.d_sae)
    mean = torch.where(count > 0, total / count.clamp_min(1), torch.inf)
    return torch.argsort(mean, stable=True)[: int((count > 0).sum())]


def _without(code: SparseCode, features: Tensor) -> SparseCode:
    gone = torch.zeros(code.d_sae, dtype=torch.bool)
    gone[features] = True
    kept = ~gone.to(code.indices.device)[code.indices]
    counts = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.to(torch.int64).cumsum(0)])
    return SparseCode(code.indices[kept], code.values[kept], counts[code.offsets], code.d_sae)


def _correlations(cells: list[IntroducedCell]) -> dict[str, dict[str, float]]:
    def together(a: list[float], b: list[float]) -> float:
        if np.ptp(a) == 0 or np.ptp(b) == 0:
            return float("nan")
        return float(np.corrcoef(a, b)[0, 1])

    true = {"absent": [c.true_absent for c in cells], "introduced": [c.true_introduced for c in cells]}
    estimated = {"linear": [c.linear for c in cells], "nonlinear": [c.nonlinear for c in cells]}
    return {e: {t: together(found, real) for t, real in true.items()} for e, found in estimated.items()}
