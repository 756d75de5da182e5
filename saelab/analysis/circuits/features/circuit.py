"""Feature circuits: the nodes of large effect, their edges, and what the model still does with those nodes alone.

Faithfulness of a set C of nodes is ``(m(C) - m(nothing)) / (m(model) - m(nothing))``, where every node outside C has
its mean over the corrupted prompts at its position. Completeness is the same formula for everything but C: near 0 when
nothing of the task is left outside.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.analysis.circuits.features.edges import EdgeWeights, feature_edges
from saelab.analysis.circuits.features.effects import (
    EffectMethod,
    Effects,
    FeatureRunner,
    PatchValue,
    exact_effects,
    node_effects,
)
from saelab.analysis.circuits.nodes import NodeAddress
from saelab.analysis.circuits.tasks import MetricName
from saelab.core.errors import ConfigError
from saelab.core.result import Result

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

Errors = Literal["circuit", "keep", "remove"]
Aggregation = Literal["sum", "none"]


@dataclass(frozen=True)
class FeatureNode:
    """A node of a feature circuit."""

    address: NodeAddress
    effect: float
    """Predicted m(node replaced) - m(clean), mean over prompts."""
    exact: float | None
    """The same measured by running the model, where it was (the largest nodes)."""


@dataclass(frozen=True)
class CurvePoint:
    """The circuit at one threshold, on the prompts it is judged on."""

    threshold: float
    n_nodes: int
    faithfulness: float
    completeness: float
    random: float
    """Mean faithfulness of random sets of as many nodes at each site, of nonzero effect, error nodes treated alike."""
    changed: float
    """Faithfulness of as many nodes at each site that change most between the prompts, whatever that does."""


@dataclass(frozen=True, eq=False, repr=False)
class FeatureCircuit(Result):
    """Nodes, edges and judgement."""

    model: str
    task: str
    sites: tuple[str, ...]
    method: EffectMethod
    metric: MetricName
    patch: PatchValue
    aggregation: Aggregation
    errors: Errors
    """``circuit``: error nodes count like any; ``keep``: all errors stay in every circuit; ``remove``: none does."""
    threshold: float
    nodes: tuple[FeatureNode, ...]
    edges: EdgeWeights
    curve: tuple[CurvePoint, ...]
    n_candidates: int
    """Nodes of nonzero effect."""
    n_prompts: int
    n_heldout: int

    def to_frame(self) -> "pd.DataFrame":
        """One row for each node, largest effect first."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "node": str(node.address),
                    "site": node.address.site,
                    "position": node.address.position,
                    "index": node.address.index,
                    "effect": node.effect,
                    "exact": node.exact,
                }
                for node in self.nodes
            ]
        )

    def curve_frame(self) -> "pd.DataFrame":
        """One row for each threshold."""
        import pandas as pd

        return pd.DataFrame([asdict(point) for point in self.curve])

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        kept = {n: v for n, v in vars(self).items() if n not in ("nodes", "edges", "curve")}
        return {
            **kept,
            "sites": list(self.sites),
            "nodes": [{"node": str(n.address), "effect": n.effect, "exact": n.exact} for n in self.nodes],
            "edges": [{"source": str(u), "target": str(d), "weight": w} for (u, d), w in self.edges.items()],
            "curve": [asdict(point) for point in self.curve],
        }

    def __repr__(self) -> str:
        best = max(self.curve, key=lambda point: point.n_nodes)
        return (
            f"FeatureCircuit({self.task} on {self.model}: {len(self.nodes)} of {self.n_candidates} nodes, "
            f"{len(self.edges)} edges; {best.n_nodes} nodes give faithfulness {best.faithfulness:.3f}, random ones "
            f"{best.random:.3f})"
        )

    def figures(self) -> "dict[str, tuple[Figure, pd.DataFrame]]":
        """Nodes and edges."""
        from saelab.analysis.circuits.features.figure import feature_figure

        return {"circuit": feature_figure(self)}


def find_feature_circuit(
    runner: FeatureRunner,
    heldout: FeatureRunner,
    *,
    method: EffectMethod = "ig",
    steps: int = 10,
    aggregation: Aggregation = "sum",
    errors: Errors = "circuit",
    threshold: float = 0.1,
    edge_threshold: float = 0.01,
    n_exact: int = 20,
    thresholds: Sequence[float] | None = None,
    seed: int = 0,
) -> FeatureCircuit:
    """Find nodes and edges on the runner's prompts and judge circuits of several sizes on held-out ones.

    Thresholds are shares of the largest absolute effect. Raises :class:`ConfigError` for positions kept apart
    (``aggregation="none"``) with prompts of different lengths, whose positions do not mean the same.
    """
    if aggregation == "none" and len(set(runner.batch.readout.tolist())) > 1:
        raise ConfigError(
            f"prompts of {runner.batch.name} differ in length, so positions cannot be kept apart; use aggregation sum"
        )
    effects = node_effects(runner, method, steps)
    table = mean_effects(effects, aggregation)
    largest = max((float(v.abs().max()) for v in table.values()), default=0.0)
    if largest == 0:
        raise ConfigError("no node has any effect on the metric; are the SAEs at sites that the task goes through?")
    chosen = _above(table, threshold * largest, aggregation)
    exact = exact_effects(runner, [a for a, _ in chosen[:n_exact]]).double().mean(1).tolist() if chosen else []
    nodes = [FeatureNode(a, e, exact[i] if i < len(exact) else None) for i, (a, e) in enumerate(chosen)]
    edges = feature_edges(runner, effects, [a for a, _ in chosen], edge_threshold * largest)
    levels = thresholds if thresholds is not None else np.geomspace(1e-3, 1, 8)
    judge = Judge(heldout, errors)
    generator = torch.Generator().manual_seed(seed)
    tables = table, changes(runner, aggregation)
    curve = [_point(judge, tables, float(level), largest, generator) for level in levels]
    return FeatureCircuit(
        model=runner.model.name,
        task=runner.batch.name,
        sites=tuple(d.site for d in runner.dictionaries),
        method=method,
        metric=runner.metric_name,
        patch=runner.patch,
        aggregation=aggregation,
        errors=errors,
        threshold=threshold,
        nodes=tuple(nodes),
        edges=edges,
        curve=tuple(curve),
        n_candidates=int(sum((v != 0).sum() for v in table.values())),
        n_prompts=len(runner.batch),
        n_heldout=len(heldout.batch),
    )


Table = dict[str, Float[Tensor, "p f"]]
"""Mean effect by site: (positions, or 1 where they are summed) x (latents and, last, the error)."""


def mean_effects(effects: Effects, aggregation: Aggregation) -> Table:
    """Mean over prompts of the effects, positions summed or apart."""
    table: Table = {}
    for site, found in effects.sites.items():
        both = torch.cat([found.latents, found.error[..., None]], -1).double().mean(0)
        table[site] = (both.sum(0, keepdim=True) if aggregation == "sum" else both).float()
    return table


def _above(table: Table, threshold: float, aggregation: Aggregation) -> list[tuple[NodeAddress, float]]:
    found: list[tuple[NodeAddress, float]] = []
    for site, values in table.items():
        n = values.shape[1] - 1
        for p, i in (values.abs() >= threshold).nonzero().tolist():
            address = NodeAddress(site, None if aggregation == "sum" else p, "error" if i == n else i)
            found.append((address, float(values[p, i])))
    return sorted(found, key=lambda item: -abs(item[1]))


class Judge:
    """Runs the model with only some nodes at each site as they come, the others at their mean on corrupted prompts."""

    def __init__(self, runner: FeatureRunner, errors: Errors) -> None:
        self.runner, self.errors = runner, errors
        valid = runner.valid
        count = valid.sum(0).clamp_min(1)
        self.means = {
            site: ((c.latents * valid).sum(0) / count, (c.error * valid).sum(0) / count)
            for site, c in runner.other.items()
        }
        self.full = float(runner.clean_score.double().mean())
        self.empty = self.score({d.site: torch.zeros(1, d.n + 1, dtype=torch.bool) for d in runner.dictionaries})
        if abs(self.full - self.empty) < 1e-6 * max(1.0, abs(self.full)):
            raise ConfigError(f"ablating every node leaves {runner.metric_name} as it is: there is nothing to explain")

    @torch.no_grad()
    def score(self, masks: dict[str, Bool[Tensor, "p f"]]) -> float:
        """Mean metric with only the nodes in ``masks`` (latents and, last, the error) as they come."""
        return self.runner.score({d.site: self._splice(d, masks[d.site]) for d in self.runner.dictionaries})

    def _splice(self, d: Any, mask: Bool[Tensor, "p f"]) -> Any:
        mean, mean_error = self.means[d.site]

        def visit(x: Tensor) -> Tensor:
            coded = d.code(x)
            keep = mask[:, :-1].to(x.device)
            latents = torch.where(keep, coded.latents, mean)
            error = torch.where(self._keeps_error(mask).to(x.device), coded.error, mean_error)
            step = (latents - coded.latents) @ d.rows + error - coded.error
            spliced: Tensor = x + (step * self.runner.valid).to(x.dtype)
            return spliced

        return visit

    def _keeps_error(self, mask: Bool[Tensor, "p f"]) -> Bool[Tensor, "p 1"]:
        if self.errors == "circuit":
            return mask[:, -1:]
        return torch.full_like(mask[:, -1:], self.errors == "keep")

    def faithfulness(self, masks: dict[str, Bool[Tensor, "p f"]]) -> float:
        """``(m(C) - m(nothing)) / (m(model) - m(nothing))``."""
        return (self.score(masks) - self.empty) / (self.full - self.empty)


def changes(runner: FeatureRunner, aggregation: Aggregation) -> Table:
    """Length of what each node adds to its site, other run less clean run: mean over prompts, laid out as effects."""
    table: Table = {}
    for d in runner.dictionaries:
        clean, other = runner.clean[d.site], runner.other[d.site]
        latents = (other.latents - clean.latents).abs() * d.rows.norm(dim=1)
        error = (other.error - clean.error).norm(dim=-1, keepdim=True)
        both = (torch.cat([latents, error], -1) * runner.valid).double().mean(0)
        table[d.site] = (both.sum(0, keepdim=True) if aggregation == "sum" else both).float()
    return table


def _point(
    judge: Judge, tables: tuple[Table, Table], level: float, largest: float, generator: torch.Generator
) -> CurvePoint:
    """Judge the nodes above a threshold beside chance; the tables hold effects and changes."""
    table, change = tables
    masks = {site: values.abs() >= max(level * largest, 1e-12) for site, values in table.items()}
    random = [judge.faithfulness(_like(masks, table, generator)) for _ in range(3)]
    most = {site: _largest(change[site], int(mask.sum())) for site, mask in masks.items()}
    return CurvePoint(
        level,
        int(sum(mask.sum() for mask in masks.values())),
        judge.faithfulness(masks),
        judge.faithfulness({site: ~mask for site, mask in masks.items()}),
        float(np.mean(random)),
        judge.faithfulness(most),
    )


def _like(
    masks: dict[str, Bool[Tensor, "p f"]], table: Table, generator: torch.Generator
) -> dict[str, Bool[Tensor, "p f"]]:
    """Draw as many nodes at each site, from those of nonzero effect."""
    found = {}
    for site, values in table.items():
        noise = torch.rand(values.shape, generator=generator).to(values.device)
        found[site] = _largest(torch.where(values != 0, noise, -1), int(masks[site].sum()))
    return found


def _largest(values: Float[Tensor, "p f"], n: int) -> Bool[Tensor, "p f"]:
    chosen = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
    chosen[values.flatten().topk(n).indices] = True
    return chosen.view_as(values)
