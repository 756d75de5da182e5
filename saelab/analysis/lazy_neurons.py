"""Activation sparsity of a model's MLPs ("lazy neurons", Li et al. 2022, arXiv 2210.06313), and of an SAE beside it.

``h`` is the MLP's hidden vector after its nonlinearity (after the gate, in gated MLPs): what the output matrix reads. A
ReLU makes true zeros; other functions do not, so *active* is said two ways: ``h > 0``, and ``|h| > epsilon RMS`` with
the root mean square of the layer over the tokens. The participation ratio ``(sum h^2)^2 / sum h^4`` counts effective
neurons without a threshold.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from saelab import __version__
from saelab.analysis.sparsified import Comparison, TopKPoint
from saelab.core.errors import ConfigError, SiteError
from saelab.core.progress import progress
from saelab.core.result import Result
from saelab.core.statistics import Moments
from saelab.features.protocols import Rows
from saelab.features.rows import pieces, require_finite, source_fingerprint, source_name

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

EPSILON = 0.01
"""Default threshold, as a share of the layer's root mean square."""
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of the neurons at which the cumulative energy is given."""


@dataclass(frozen=True)
class LayerSparsity:
    """Sparsity of one vector of units (a layer's neurons, or an SAE's code) over tokens."""

    name: str
    """The site, or the SAE."""
    layer: int
    """Block of the model."""
    width: int
    """Number of units."""
    positive: float
    """Mean share of units with ``h > 0``."""
    nonzero: float
    """Mean share of units that are not exactly 0."""
    above: float
    """Mean share with ``|h| > epsilon RMS``."""
    effective: float
    """Mean participation ratio, in units."""
    rms: float
    """Root mean square of h over tokens and units."""
    never: float
    """Share of units above the threshold on no token at all."""
    energy: list[float]
    """Mean share of ``||h||^2`` in the strongest 1, 2, 5, 10, 20, 50 and 100 % of the units of each token."""
    rates: list[float]
    """Share of tokens on which each unit is above the threshold, falling."""


@dataclass(frozen=True, repr=False)
class LazyNeurons(Result):
    """What :func:`lazy_neurons` found; :func:`saelab.analysis.sparsified.compare_with_sae` adds the SAE."""

    model: str
    """The model's name."""
    model_fingerprint: str
    """Its fingerprint."""
    source: str
    """The text."""
    source_fingerprint: str
    """Its fingerprint."""
    epsilon: float
    """Threshold as a share of each layer's RMS."""
    n_tokens: int
    """Kept tokens (no padding, no BOS) that the shares are over."""
    layers: list[LayerSparsity]
    """Every layer's neurons."""
    positive: float
    """Share of positive neurons over all layers together (each neuron counts once, whatever its layer's width)."""
    above: float
    """Share above the threshold over all layers together."""
    curve: list[TopKPoint]
    """Loss with only the k strongest neurons of every token kept, in all layers at once."""
    comparison: Comparison | None = None
    """Neurons against an SAE at equal L0."""
    code: LayerSparsity | None = None
    """The same shares for the SAE's code."""
    saelab_version: str = __version__
    """Version that took the numbers."""

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain values."""
        return dataclasses.asdict(self)

    def to_frame(self) -> "pd.DataFrame":
        """One row per layer, and one for the SAE's code."""
        import pandas as pd

        rows = []
        for part in [*self.layers, *([self.code] if self.code else [])]:
            row = {k: v for k, v in vars(part).items() if k not in ("energy", "rates")}
            rows.append(row | {f"energy_{q:.0%}": v for q, v in zip(SHARES, part.energy, strict=True)})
        return pd.DataFrame(rows)

    def figures(self) -> "dict[str, tuple[Figure, pd.DataFrame]]":
        """``layers``, ``energy``, ``rates``, ``curve``, and ``comparison`` when there is an SAE."""
        from saelab.analysis.lazy_figures import figures

        return figures(self)

    def __repr__(self) -> str:
        return (
            f"LazyNeurons({self.model}: {self.positive:.1%} of the neurons positive, {self.above:.1%} over the "
            f"threshold, {len(self.layers)} layers, {self.n_tokens:,} tokens of {self.source})"
        )


class UnitCounts:
    """Streaming counts behind a :class:`LayerSparsity`, given the threshold."""

    def __init__(self, width: int, threshold: float) -> None:
        self.width, self.threshold = width, threshold
        self.n = 0
        self.sums = torch.zeros(5, dtype=torch.float64)
        self.energy = torch.zeros(len(SHARES), dtype=torch.float64)
        self.fired: Float64[Tensor, " width"] = torch.zeros(width, dtype=torch.float64)

    def update(self, h: Float[Tensor, "n width"]) -> None:
        """Take in n tokens."""
        if not h.shape[0]:
            return
        h = h.float()
        squares = h.square()
        total = squares.sum(1)
        above = h.abs() > self.threshold
        effective = total.square() / squares.square().sum(1).clamp_min(1e-30)
        self.n += h.shape[0]
        parts = [(h > 0).sum(), (h != 0).sum(), above.sum(), effective.double().sum(), total.double().sum()]
        self.sums += torch.stack([part.to("cpu", torch.float64) for part in parts])
        self.fired += above.sum(0).to("cpu", torch.float64)
        held = squares.sort(1, descending=True).values.cumsum(1) / total.clamp_min(1e-30)[:, None]
        counts = [max(1, round(share * self.width)) - 1 for share in SHARES]
        alive = total > 0
        self.energy += (torch.where(alive[:, None], held[:, counts], 1.0)).double().sum(0).cpu()

    def result(self, name: str, layer: int) -> LayerSparsity:
        """Return the shares so far."""
        n, cells = max(self.n, 1), max(self.n * self.width, 1)
        positive, nonzero, above, effective, energy = self.sums.tolist()
        rates = (self.fired / n).sort(descending=True).values
        return LayerSparsity(
            name=name,
            layer=layer,
            width=self.width,
            positive=positive / cells,
            nonzero=nonzero / cells,
            above=above / cells,
            effective=effective / n,
            rms=(energy / cells) ** 0.5,
            never=float((self.fired == 0).double().mean()),
            energy=(self.energy / n).tolist(),
            rates=rates.tolist(),
        )


def neuron_sites(model: Any) -> dict[str, int]:
    """Sites of the MLPs' hidden activations and their layers. Raises :class:`SiteError` when there are none."""
    found = {}
    for site in model.sites():
        match = re.fullmatch(r"blocks\.(\d+)\.mlp\.hook_post", site)
        if match:
            found[site] = int(match[1])
    if not found:
        raise SiteError(f"{model.name} has no MLP activations (no site blocks.N.mlp.hook_post); saelab sites lists all")
    return found


@torch.no_grad()
def lazy_neurons(
    model: Any,
    rows: Rows,
    *,
    max_tokens: int | None = 20_000,
    epsilon: float = EPSILON,
    top_k: Sequence[int] | None = None,
    curve_tokens: int | None = 5_000,
    rows_per_batch: int = 16,
) -> LazyNeurons:
    """Measure the sparsity of every layer's neurons, and the loss when only the strongest are kept.

    ``model`` is a :class:`~saelab.models.subject.SubjectModel`, or anything with its ``sites``, ``width``, ``read`` and
    ``logits``.

    Two passes over the text: one for each layer's RMS, one for the counts. ``top_k``: how many neurons to keep at each
    point of the curve (default: 1/64, 1/32 ... 1/2 and all of them); ``()`` leaves the curve out.
    """
    from saelab.analysis.sparsified import top_k_curve

    if not epsilon >= 0:
        raise ConfigError(f"epsilon is {epsilon}, expected a share of the RMS, such as 0.01")
    sites = neuron_sites(model)
    rms = _rms(model, rows, list(sites), max_tokens, rows_per_batch)
    counts = {site: UnitCounts(model.width(site), epsilon * rms[site]) for site in sites}
    with progress("neurons", max_tokens) as bar:
        for piece in pieces(rows, rows_per_batch, max_tokens):
            for site, x in model.read(piece.tokens, list(sites)).items():
                counts[site].update(x[piece.keep.to(x.device)])
            bar.advance(piece.n_kept)
    layers = [counts[site].result(site, layer) for site, layer in sites.items()]
    width = max(part.width for part in layers)
    if top_k is None:
        top_k = sorted({max(1, width >> s) for s in range(7)})
    curve = []
    if top_k:
        curve = top_k_curve(model, rows, list(sites), top_k, max_tokens=curve_tokens, rows_per_batch=rows_per_batch)
    every = sum(part.width for part in layers)
    return LazyNeurons(
        model=model.name,
        model_fingerprint=model.fingerprint,
        source=source_name(rows),
        source_fingerprint=source_fingerprint(rows),
        epsilon=epsilon,
        n_tokens=next(iter(counts.values())).n,
        layers=layers,
        positive=sum(part.positive * part.width for part in layers) / every,
        above=sum(part.above * part.width for part in layers) / every,
        curve=curve,
    )


def _rms(model: Any, rows: Rows, sites: list[str], max_tokens: int | None, rows_per_batch: int) -> dict[str, float]:
    moments = {site: Moments(1) for site in sites}
    with progress("neuron scale", max_tokens) as bar:
        for piece in pieces(rows, rows_per_batch, max_tokens):
            for site, x in model.read(piece.tokens, sites).items():
                require_finite(x, piece, site)
                kept = x[piece.keep.to(x.device)].float()
                moments[site].update(kept.square().mean(1, keepdim=True))
            bar.advance(piece.n_kept)
    return {site: float(m.mean) ** 0.5 for site, m in moments.items()}
