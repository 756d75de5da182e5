"""Scores of edges and heads, and what comes of judging them: AUC, F1, faithfulness, CPR and CMD."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Float64

from saelab.analysis.circuits.graph import EdgeGraph
from saelab.analysis.circuits.run import EdgeRunner, Setting
from saelab.core.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of edges at which a circuit's faithfulness is measured (those of the MIB benchmark)."""


@dataclass(frozen=True, eq=False)
class EdgeScores:
    """What a method says of every edge, or, where it knows only heads, of every head."""

    method: str
    graph: EdgeGraph
    setting: Setting | None
    """Metric, ablation and positions; None for a method without runs of the model's upper part."""
    edges: Float[np.ndarray, "r w"] | None
    """Score of each edge; larger magnitude means more important."""
    nodes: Float[np.ndarray, " w"]
    """Score of each writer (nan where the method says nothing of it)."""
    seconds: float
    """Wall time of the method on the prompts it was given."""
    n_prompts: int
    details: dict[str, Any] = field(default_factory=dict)
    """Settings of the method."""

    def to_frame(self) -> "pd.DataFrame":
        """One row for each edge (or head), the largest magnitude first."""
        import pandas as pd

        if self.edges is None:
            named = [
                (self.graph.writers[w], self.nodes[w]) for w in range(len(self.nodes)) if self.nodes[w] == self.nodes[w]
            ]
            frame = pd.DataFrame(named, columns=["node", "score"])
        else:
            places = np.argwhere(self.graph.valid)
            frame = pd.DataFrame(
                {
                    "edge": [self.graph.name(int(r), int(w)) for r, w in places],
                    "score": self.edges[self.graph.valid],
                }
            )
        return frame.sort_values("score", key=np.abs, ascending=False, kind="stable").reset_index(drop=True)


@dataclass(frozen=True, eq=False)
class Curve:
    """Faithfulness of the circuits that a method's scores give at several sizes."""

    fractions: Float64[np.ndarray, " k"]
    """Shares of all edges."""
    faithfulness: Float64[np.ndarray, " k"]
    cpr: float
    """Area under the curve (circuit performance ratio; larger is better)."""
    cmd: float
    """Area between the curve and 1 (circuit-model distance; smaller is better)."""


def roc_auc(scores: Float[np.ndarray, " n"], truth: Bool[np.ndarray, " n"]) -> float:
    """Probability that a true item scores higher than a false one, ties counted half; nan without both kinds."""
    from scipy.stats import rankdata

    positive = int(truth.sum())
    negative = len(truth) - positive
    if not positive or not negative:
        return float("nan")
    ranks = rankdata(scores)
    return float((ranks[truth].sum() - positive * (positive + 1) / 2) / (positive * negative))


def best_f1(scores: Float[np.ndarray, " n"], truth: Bool[np.ndarray, " n"]) -> float:
    """Largest F1 = 2 P R / (P + R) over all thresholds on the scores."""
    if not truth.any():
        return float("nan")
    best = 0.0
    for threshold in np.unique(scores):
        chosen = scores >= threshold
        best = max(best, 2 * float((chosen & truth).sum()) / float(chosen.sum() + truth.sum()))
    return best


def f1(chosen: Bool[np.ndarray, " n"], truth: Bool[np.ndarray, " n"]) -> float:
    """F1 = 2 TP / (chosen + true)."""
    total = int(chosen.sum() + truth.sum())
    return 2 * int((chosen & truth).sum()) / total if total else float("nan")


def faithfulness(runner: EdgeRunner, circuits: Bool[np.ndarray, "*k r w"]) -> Float64[np.ndarray, " k"]:
    """``(m(C) - m(nothing)) / (m(model) - m(nothing))`` for each circuit: all edges outside it removed.

    A ratio of means over prompts, not a mean of ratios. Raises :class:`ConfigError` when removing everything changes
    nothing, as then it means nothing.
    """
    sets = circuits.reshape(-1, *runner.graph.valid.shape)
    values = runner.scores(np.concatenate([runner.graph.valid[None] & ~sets, runner.graph.valid[None]]))
    empty, full = values[-1], runner.clean_score
    if abs(full - empty) < 1e-6 * max(1.0, abs(full)):
        raise ConfigError(
            f"removing every edge leaves {runner.setting.metric} at {empty:.3g}: faithfulness has nothing to measure; "
            "choose another metric or ablation"
        )
    found: np.ndarray = (values[:-1] - empty) / (full - empty)
    return found


def top_edges(graph: EdgeGraph, scores: Float[np.ndarray, "r w"], n: int) -> Bool[np.ndarray, "r w"]:
    """Return the n edges of largest magnitude, less those that lead nowhere; ties go to the earlier edge."""
    magnitude = np.where(graph.valid, np.abs(scores), -1).ravel()
    mask = np.zeros(magnitude.shape, bool)
    mask[np.argsort(-magnitude, kind="stable")[:n]] = True
    return graph.connected(mask.reshape(graph.valid.shape))


def curve(runner: EdgeRunner, scores: EdgeScores, fractions: tuple[float, ...] = FRACTIONS) -> Curve:
    """Faithfulness of a method's best edges (or best heads and all edges among them) at several shares of all edges."""
    graph, sizes = runner.graph, [max(1, round(f * runner.graph.n_edges)) for f in fractions]
    if scores.edges is not None:
        circuits = [top_edges(graph, scores.edges, n) if n < graph.n_edges else graph.valid for n in sizes]
    else:
        circuits = [node_circuit(graph, scores.nodes, n) for n in sizes]
    found = faithfulness(runner, np.stack(circuits))
    return Curve(np.array(fractions), found, *areas(np.array(fractions), found))


def node_circuit(graph: EdgeGraph, nodes: Float[np.ndarray, " w"], n_edges: int) -> Bool[np.ndarray, "r w"]:
    """Best nodes, as many as fit: all edges among them, the MLPs that have no score, embeddings and logits."""
    ranked: list[int] = np.argsort(-np.nan_to_num(np.abs(nodes)), kind="stable").tolist()
    order = [w for w in ranked if w >= graph.n_embeddings]
    unscored = [w for w in order if np.isnan(nodes[w])]
    best = graph.of_nodes(unscored)
    for count in range(1, len(order) + 1):
        mask = graph.of_nodes([*unscored, *(w for w in order[:count] if not np.isnan(nodes[w]))])
        if mask.sum() > n_edges:
            break
        best = mask
    return graph.valid if n_edges >= graph.n_edges else best


def areas(fractions: Float64[np.ndarray, " k"], values: Float64[np.ndarray, " k"]) -> tuple[float, float]:
    """(CPR, CMD): trapezoid areas under f and between f and 1, over the shares given."""
    return float(np.trapezoid(values, fractions)), float(np.trapezoid(np.abs(1 - values), fractions))
