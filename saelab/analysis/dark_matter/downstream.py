"""What each part of the error costs the model (section 3.7): cross-entropy with x_hat, x_hat + l, x_hat + eta.

Test contexts only; positions that the decomposition left out keep their activation. Controls put noise of the same
norm, in a random direction at each token, in the place of an error.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from saelab.analysis.dark_matter.decompose import reconstruct
from saelab.analysis.dark_matter.losses import contexts_of, losses
from saelab.analysis.dark_matter.tokens import Tokens
from saelab.analysis.reconstruction import ratio
from saelab.core.progress import progress
from saelab.core.regression import LinearMap
from saelab.features.protocols import Dictionary, Model, Replace, Rows

if TYPE_CHECKING:
    import pandas as pd

VARIANTS = ("sae", "sae+linear", "sae+nonlinear", "random_error", "random_nonlinear", "random_linear")
"""What the site is replaced by: x_hat; x_hat + l (eta is missing); x_hat + eta (l is missing); x + noise of the norm of
e, of eta, of l."""
RESAMPLES = 400


@dataclass(frozen=True)
class Downstream:
    """Cross-entropies, and how much of the harm each part of the error does."""

    ce: dict[str, float]
    """Mean next-token cross-entropy in nats: ``clean`` and every variant."""
    recovered: dict[str, float]
    """``(CE_sae - CE_s) / (CE_sae - CE_clean)`` for adding the linear and adding the nonlinear part."""
    recovered_interval: dict[str, list[float]]
    """95 % intervals of ``recovered``, contexts resampled."""
    harm_nonlinear: float
    """``(CE_{sae+linear} - CE_clean) / (CE_sae - CE_clean)``: the harm left when only eta is missing."""
    harm_linear: float
    """The harm left when only l is missing."""
    harm_share_nonlinear: float
    """``harm_nonlinear / (harm_nonlinear + harm_linear)``."""
    harm_share_interval: list[float]
    """Its 95 % interval."""
    norm_share_nonlinear: float
    """Share of eta in ``sum ||l||^2 + sum ||eta||^2`` over the replaced tokens: proportional harm would equal this."""
    n_predictions: int
    """Predictions scored: made at a replaced token, of a kept one."""
    n_tokens: int
    """Tokens replaced."""
    n_contexts: int
    """Contexts."""

    def to_frame(self) -> "pd.DataFrame":
        """One row per variant: cross-entropy and harm relative to the SAE's."""
        import pandas as pd

        harm = self.ce["sae"] - self.ce["clean"]
        rows = [{"variant": k, "ce": v, "harm": ratio(v - self.ce["clean"], harm)} for k, v in self.ce.items()]
        return pd.DataFrame(rows)


@torch.no_grad()
def downstream(  # noqa: PLR0917
    model: Model,
    rows: Rows,
    site: str,
    sae: Dictionary,
    linear: LinearMap,
    tokens: Tokens,
    *,
    max_tokens: int = 50_000,
    rows_per_batch: int = 16,
    seed: int = 0,
) -> Downstream:
    """Run the model over test contexts, up to ``max_tokens`` tokens (whole contexts), with each variant in place."""
    chosen = _whole_contexts(tokens.only(~tokens.fit), max_tokens)
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, list[Tensor]] = {name: [] for name in ("clean", *VARIANTS)}
    counts, energy = [], torch.zeros(2, dtype=torch.float64)
    with progress("downstream", chosen.n) as bar:
        for part in contexts_of(rows, chosen, rows_per_batch):
            seen: list[Tensor] = []

            def look(x: Tensor, seen: list[Tensor] = seen) -> Tensor:
                seen.append(x)
                return x

            clean = model.logits(part.tokens, replace={site: look})
            x = seen[0][part.where.to(seen[0].device)].float().cpu()
            x_hat = reconstruct(sae, x, site)
            along = linear(x)
            rest = x - x_hat - along
            energy += torch.stack([along.double().square().sum(), rest.double().square().sum()])
            values = {
                "sae": x_hat,
                "sae+linear": x_hat + along,
                "sae+nonlinear": x_hat + rest,
                "random_error": x + _noise_like(x - x_hat, generator),
                "random_nonlinear": x + _noise_like(rest, generator),
                "random_linear": x + _noise_like(along, generator),
            }
            scored = torch.zeros_like(part.keep)
            scored[:, 1:] = part.where[:, :-1] & part.keep[:, 1:]
            counts.append(scored.sum(1).double())
            sums["clean"].append(_summed(clean, part.tokens, scored))
            del clean
            for name, value in values.items():
                logits = model.logits(part.tokens, replace={site: _put(value, part.where)})
                sums[name].append(_summed(logits, part.tokens, scored))
            bar.advance(part.places.numel())
    return _result({k: torch.cat(v).numpy() for k, v in sums.items()}, torch.cat(counts).numpy(), energy, chosen, seed)


def _whole_contexts(tokens: Tokens, max_tokens: int) -> Tokens:
    """Keep the first contexts, the fewest that hold ``max_tokens`` tokens."""
    if tokens.n <= max_tokens:
        return tokens
    return tokens.only(tokens.context <= tokens.context[max_tokens - 1])


def _noise_like(error: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(error.shape, generator=generator)
    scale: Tensor = error.norm(dim=1) / noise.norm(dim=1)
    return noise * scale[:, None]


def _put(value: Tensor, where: Tensor) -> Replace:
    def replace(x: Tensor) -> Tensor:
        x = x.clone()
        x[where.to(x.device)] = value.to(x)
        return x

    return replace


def _summed(logits: Tensor, tokens: Tensor, scored: Tensor) -> Tensor:
    """Summed loss of the scored tokens of each row."""
    nats = losses(logits, tokens)
    total: Tensor = torch.where(scored, nats, 0.0).double().sum(1)
    return total


def _result(sums: dict[str, np.ndarray], counts: np.ndarray, energy: Tensor, chosen: Tokens, seed: int) -> Downstream:
    n = len(counts)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), RESAMPLES)
    point = _shares({k: float(v.sum()) for k, v in sums.items()})
    with np.errstate(divide="ignore", invalid="ignore"):
        samples = [_shares({k: float(draw @ v) for k, v in sums.items()}) for draw in draws]

    def interval(name: str) -> list[float]:
        values = [s[name] for s in samples if np.isfinite(s[name])]
        return [float(q) for q in np.quantile(values, (0.025, 0.975))] if values else [float("nan")] * 2

    total = float(counts.sum())
    return Downstream(
        ce={k: ratio(float(v.sum()), total) for k, v in sums.items()},
        recovered={k: point[k] for k in ("linear", "nonlinear")},
        recovered_interval={k: interval(k) for k in ("linear", "nonlinear")},
        harm_nonlinear=point["harm_nonlinear"],
        harm_linear=point["harm_linear"],
        harm_share_nonlinear=point["share"],
        harm_share_interval=interval("share"),
        norm_share_nonlinear=ratio(float(energy[1]), float(energy.sum())),
        n_predictions=int(total),
        n_tokens=chosen.n,
        n_contexts=n,
    )


def _shares(ce: dict[str, float]) -> dict[str, float]:
    harm = ce["sae"] - ce["clean"]
    left = {"harm_nonlinear": ce["sae+linear"] - ce["clean"], "harm_linear": ce["sae+nonlinear"] - ce["clean"]}
    return {
        "linear": ratio(ce["sae"] - ce["sae+linear"], harm),
        "nonlinear": ratio(ce["sae"] - ce["sae+nonlinear"], harm),
        **{k: ratio(v, harm) for k, v in left.items()},
        "share": ratio(left["harm_nonlinear"], sum(left.values())),
    }
