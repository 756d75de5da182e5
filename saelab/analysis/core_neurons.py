"""What a text's core neurons are worth: loss and speed with only them, how stable they are, how slowly neurons change.

Three questions about the MLPs of a model, each beside its control:

* *loss*: run after the prefix on the core neurons of each row (:mod:`saelab.sparsity.core_neurons`, CoreInfer), against
  as many neurons chosen once for the whole text, and as many at random;
* *stability*: how many core neurons the two halves of a row share, against halves of different rows and against
  chance, which is their share of all neurons; and whether rows with the same words have the same core neurons;
* *change*: how many neurons change from one token to the next by more than a threshold (delta sparsity: only they
  would have to be computed anew), against two tokens of different rows.
"""

import dataclasses
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab import __version__
from saelab.analysis.lazy_neurons import neuron_sites
from saelab.core.errors import TextError
from saelab.core.progress import progress
from saelab.core.result import Result
from saelab.features.protocols import Rows
from saelab.features.rows import Piece, pieces, source_fingerprint, source_name
from saelab.sparsity.core_neurons import CoreConfig, core_branches, core_cost, core_neurons, running_core

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

CHANGES = (0.01, 0.1, 0.5, 1.0)
"""Thresholds of a change, in units of the layer's root mean square."""


@dataclass(frozen=True)
class CorePoint:
    """The model on a share of its neurons, after the prefix."""

    alpha: float
    """Share of the neurons that count as a token's own."""
    beta: float
    """Share of the neurons that run."""
    loss: float
    """Cross-entropy after the prefix, nats, on each row's core neurons."""
    kl: float
    """KL(whole model || this one), nats."""
    loss_fixed: float
    """Control: the neurons that are core most often over all prefixes, the same for every row."""
    loss_random: float
    """Control: as many at random, the same for every row."""
    speed: float
    """Time of the whole model over the time on core neurons, for reading the last residual stream of the rows."""


@dataclass(frozen=True)
class LayerStability:
    """How far the core neurons of a layer belong to the text."""

    layer: int
    width: int
    same: float
    """Mean share of the core neurons of a row's first half that are core in its second half."""
    other: float
    """The same between the first half of a row and the second half of another."""
    chance: float
    """The same for two random sets of that size."""
    words: float
    """Rank correlation, over pairs of rows, of shared core neurons and shared tokens (cosine of token counts)."""


@dataclass(frozen=True)
class LayerChange:
    """How much a layer's neurons change between tokens."""

    layer: int
    changed: tuple[float, ...]
    """Share of neurons that change from a token to the next by more than each of :data:`CHANGES` times the RMS."""
    changed_other: tuple[float, ...]
    """The same between two tokens of different rows."""


@dataclass(frozen=True, repr=False)
class CoreNeurons(Result):
    """What :func:`core_study` found."""

    model: str
    model_fingerprint: str
    source: str
    source_fingerprint: str
    prefix: int
    """Tokens of a row that run whole."""
    first_layer: int
    """First block whose MLP runs on core neurons."""
    loss_whole: float
    """Cross-entropy of the whole model after the prefix, nats."""
    predictions: int
    """Predictions after the prefix."""
    points: tuple[CorePoint, ...]
    stability: tuple[LayerStability, ...]
    change: tuple[LayerChange, ...]
    saelab_version: str = __version__

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain values."""
        return dataclasses.asdict(self)

    def to_frame(self) -> "pd.DataFrame":
        """One row per alpha and beta."""
        import pandas as pd

        return pd.DataFrame([vars(point) for point in self.points])

    def figures(self) -> "dict[str, tuple[Figure, pd.DataFrame]]":
        """``loss`` against the share of neurons, beside the controls; ``speed``."""
        from saelab.core.plotting import PALETTE, figure

        frame = self.to_frame()
        loss, speed = figure(), figure()
        for colour, (alpha, part) in zip(PALETTE, frame.groupby("alpha", sort=False), strict=False):
            lines = (
                ("core", "loss", "solid"),
                ("same for all", "loss_fixed", "dash"),
                ("random", "loss_random", "dot"),
            )
            for name, column, dash in lines:
                label = f"alpha {alpha:g}, {name}"
                loss.add_scatter(x=part["beta"], y=part[column], name=label, line={"color": colour, "dash": dash})
            speed.add_scatter(x=part["beta"], y=part["speed"], name=f"alpha {alpha:g}", line_color=colour)
        loss.add_hline(y=self.loss_whole, line_dash="dot", annotation_text="whole model")
        for drawn, title in ((loss, "loss after the prefix (nats)"), (speed, "speed over the whole model's")):
            drawn.update_xaxes(title_text="share of the neurons that run", tickformat=".0%")
            drawn.update_yaxes(title_text=title)
        return {"loss": (loss, frame), "speed": (speed, frame)}

    def __repr__(self) -> str:
        best = min(self.points, key=lambda point: point.loss)
        return (
            f"CoreNeurons({self.model}: loss {self.loss_whole:.4f}, on {best.beta:.0%} of the neurons {best.loss:.4f}, "
            f"{best.speed:.2f} times as fast, {self.predictions:,} predictions of {self.source})"
        )

    def layer_frame(self) -> "pd.DataFrame":
        """One row per layer: stability, and the share of neurons that change (``other``: the control)."""
        import pandas as pd

        changes = {part.layer: part for part in self.change}
        rows = []
        for part in self.stability:
            row: dict[str, Any] = vars(part).copy()
            found = changes[part.layer]
            for k, share in enumerate(CHANGES):
                row |= {f">{share:g}": found.changed[k], f">{share:g} other": found.changed_other[k]}
            rows.append(row)
        return pd.DataFrame(rows)


@torch.no_grad()
def core_study(
    model: Any,
    rows: Rows,
    *,
    alphas: Sequence[float] = (0.05, 0.2),
    betas: Sequence[float] = (0.25, 0.4, 0.6, 0.8),
    prefix: int = 64,
    first_layer: int = 1,
    max_tokens: int | None = 8_000,
    rows_per_batch: int = 16,
    rounds: int = 3,
    seed: int = 0,
) -> CoreNeurons:
    """Measure a model on its core neurons, and how these behave, on the first ``max_tokens`` kept tokens of a text.

    ``rounds``: how often each speed is measured (the median counts). Raises :class:`ConfigError`, :class:`ModelError`
    (an unknown kind of MLP) and :class:`TextError` (fewer than two rows longer than the prefix).
    """
    found = list(pieces(rows, rows_per_batch, max_tokens))
    if sum(piece.tokens.shape[0] for piece in found) < 2 or all(p.tokens.shape[1] <= prefix + 1 for p in found):
        raise TextError(f"core neurons need at least two rows longer than the prefix of {prefix}; give more text")
    settings = [
        CoreConfig(alpha=alpha, beta=beta, prefix=prefix, first_layer=first_layer) for alpha in alphas for beta in betas
    ]
    activations = _Activations(model, found, settings[0])
    generator = torch.Generator().manual_seed(seed)
    points = []
    with progress("core neurons", len(settings), "settings") as bar:
        for config in settings:
            points.append(_point(model, found, config, activations, generator, rounds))
            bar.advance(1)
    cost = core_cost(model, settings[0], found)
    order = torch.randperm(len(activations.rows), generator=generator)
    return CoreNeurons(
        model=model.name,
        model_fingerprint=model.fingerprint,
        source=source_name(rows),
        source_fingerprint=source_fingerprint(rows),
        prefix=prefix,
        first_layer=first_layer,
        loss_whole=cost.loss_dense,
        predictions=cost.tokens,
        points=tuple(points),
        stability=tuple(_stability(activations, layer, settings[0], order) for layer in activations.layers),
        change=tuple(_change(activations, layer, order) for layer in activations.layers),
    )


class _Activations:
    """The neurons' activations on every kept token, by row."""

    def __init__(self, model: Any, found: Sequence[Piece], config: CoreConfig) -> None:
        self.sites = neuron_sites(model)
        self.layers = {layer: site for site, layer in self.sites.items()}
        self.names = {branch.block: branch.out.name for branch in core_branches(model, config)}
        self.rows: list[dict[int, Tensor]] = []
        self.tokens: list[Tensor] = []
        self.prefixes: dict[int, list[Tensor]] = {layer: [] for layer in self.layers}
        for piece in found:
            read = model.read(piece.tokens, list(self.sites))
            for row, keep in enumerate(piece.keep):
                if int(keep.sum()) < 4:
                    continue
                kept = keep.to(model.device)
                self.rows.append({layer: read[site][row][kept].float() for layer, site in self.layers.items()})
                self.tokens.append(piece.tokens[row][keep])
                for layer, site in self.layers.items():
                    self.prefixes[layer].append(read[site][row, : config.prefix].float())

    def fixed(self, config: CoreConfig) -> dict[str, Tensor]:
        """The neurons that are core most often over all prefixes, by the name of the MLP's last layer."""
        found = {}
        for layer, name in self.names.items():
            joined = torch.cat(self.prefixes[layer])
            found[name] = core_neurons(joined, config.alpha, config.beta)
        return found

    def random(self, config: CoreConfig, generator: torch.Generator) -> dict[str, Tensor]:
        """As many at random."""
        chosen = self.fixed(config)
        widths = {name: self.prefixes[layer][0].shape[1] for layer, name in self.names.items()}
        return {
            name: torch.randperm(widths[name], generator=generator)[: len(neurons)].sort().values.to(neurons.device)
            for name, neurons in chosen.items()
        }


def _point(  # noqa: PLR0917
    model: Any,
    found: Sequence[Piece],
    config: CoreConfig,
    activations: _Activations,
    generator: torch.Generator,
    rounds: int,
) -> CorePoint:
    cost = core_cost(model, config, found)
    fixed = core_cost(model, config, found, activations.fixed(config))
    random = core_cost(model, config, found, activations.random(config, generator))
    return CorePoint(
        alpha=config.alpha,
        beta=config.beta,
        loss=cost.loss_sparse,
        kl=cost.kl,
        loss_fixed=fixed.loss_sparse,
        loss_random=random.loss_sparse,
        speed=_speed(model, found[0].tokens, config, rounds),
    )


def _speed(model: Any, tokens: Tensor, config: CoreConfig, rounds: int) -> float:
    """Median ratio of the times of neighbouring runs."""
    site = f"blocks.{model.n_layers - 1}.hook_resid_post"

    def seconds() -> float:
        began = time.perf_counter()
        model.read(tokens, [site])
        if tokens.is_cuda or model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    ratios = []
    for _ in range(max(1, rounds) + 1):  # the first one warms up
        whole = seconds()
        with running_core(model, config):
            ratios.append(whole / seconds())
    return statistics.median(ratios[1:])


def _stability(activations: _Activations, layer: int, config: CoreConfig, order: Tensor) -> LayerStability:
    width = activations.rows[0][layer].shape[1]
    first: list[Tensor] = []
    second: list[Tensor] = []
    for row in activations.rows:
        middle = row[layer].shape[0] // 2
        for half, into in ((row[layer][:middle], first), (row[layer][middle:], second)):
            core = core_neurons(half, config.alpha, config.beta)
            into.append(torch.zeros(width).index_fill_(0, core.cpu(), 1.0))
    a, b = torch.stack(first), torch.stack(second)
    kept = float(a[0].sum())
    shared = a @ b.T / kept
    other = ~torch.eye(len(a), dtype=torch.bool)
    vocabulary = 1 + max(int(t.max()) for t in activations.tokens)
    counts = torch.stack([torch.bincount(t, minlength=vocabulary).float() for t in activations.tokens])
    words = torch.nn.functional.normalize(counts, dim=1)
    similar = words @ words.T
    return LayerStability(
        layer=layer,
        width=width,
        same=float(shared.diagonal().mean()),
        other=float(shared[other].mean()),
        chance=kept / width,
        words=_rank_correlation(shared[other], similar[other]),
    )


def _rank_correlation(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> float:
    """Spearman's rho; NaN for fewer than three pairs or a constant side."""
    from scipy.stats import spearmanr

    if len(x) < 3 or bool((x == x[0]).all()) or bool((y == y[0]).all()):
        return float("nan")
    return float(spearmanr(x.numpy(), y.numpy()).statistic)


def _change(activations: _Activations, layer: int, order: Tensor) -> LayerChange:
    parts = [row[layer] for row in activations.rows]
    rms = torch.cat(parts).square().mean().sqrt()
    near = torch.cat([(part[1:] - part[:-1]).abs() for part in parts])
    far = []
    for i, j in zip(order.tolist(), order.roll(1).tolist(), strict=True):
        n = min(len(parts[i]), len(parts[j]))
        far.append((parts[i][:n] - parts[j][:n]).abs())
    distant = torch.cat(far)
    return LayerChange(
        layer=layer,
        changed=tuple(float((near > share * rms).float().mean()) for share in CHANGES),
        changed_other=tuple(float((distant > share * rms).float().mean()) for share in CHANGES),
    )
