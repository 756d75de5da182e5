"""All methods on one task and model, side by side: AUC, F1, faithfulness, CPR, CMD, seconds.

Truth is a known circuit where there is one. Otherwise it is activation patching itself: edges whose removal alone moves
the metric by more than ``reference_share`` of what removing everything does; the result says which. Scores come from
one split of the prompts, faithfulness from the other.
"""

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Bool

from saelab.analysis.circuits.acdc import acdc
from saelab.analysis.circuits.code_sae import CodesConfig
from saelab.analysis.circuits.codes import discrete_codes
from saelab.analysis.circuits.direct import dfa_scores
from saelab.analysis.circuits.eap import eap
from saelab.analysis.circuits.exact import patch_edges, patch_nodes
from saelab.analysis.circuits.metrics import accuracy
from saelab.analysis.circuits.run import EdgeRunner, Setting
from saelab.analysis.circuits.scores import EdgeScores, best_f1, curve, roc_auc
from saelab.analysis.circuits.tasks import TaskBatch
from saelab.analysis.circuits.truth import Truth
from saelab.core.errors import ConfigError, nearest
from saelab.core.result import Result
from saelab.models.components import Components

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

Method = Literal["codes", "patching", "patching-nodes", "acdc", "eap", "eap-ig", "dfa"]
METHODS: tuple[Method, ...] = ("codes", "patching", "patching-nodes", "acdc", "eap", "eap-ig", "dfa")
RANDOM_SEED = 0


@dataclass(frozen=True)
class MethodResult:
    """One row of the comparison."""

    method: str
    edge_auc: float
    """ROC AUC over all edges (nan for methods that score heads only)."""
    edge_f1: float
    """Largest F1 = 2PR/(P+R) over thresholds, over all edges."""
    node_auc: float
    """ROC AUC over the heads and MLPs that the method scores."""
    node_f1: float
    """Largest F1 over thresholds, over the same."""
    faithfulness: float
    """Of the circuit of ``fraction`` of the edges, on held-out prompts."""
    cpr: float
    """Area under faithfulness over the share of edges (larger is better)."""
    cmd: float
    """Area between faithfulness and 1 (smaller is better)."""
    seconds: float
    """Wall time of the scoring."""
    cpu_seconds: float
    """Processor time of the scoring, summed over threads: what other work on the machine hardly changes."""
    runs: int
    """Runs of the model (forward passes over the batch; a backward counts as one)."""


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(Result):
    """All methods on one task and model."""

    model: str
    task: str
    setting: Setting
    truth: str
    """Where the true edges and nodes come from."""
    n_true_edges: int
    n_edges: int
    n_true_nodes: int
    fraction: float
    """Share of edges at which ``faithfulness`` is given."""
    accuracy: float
    """Share of held-out prompts that the whole model answers right (most likely token)."""
    n_train: int
    """Prompts that scores come from (for ``codes``: as many positives and as many negatives)."""
    n_heldout: int
    seed: int
    rows: tuple[MethodResult, ...]
    scores: dict[str, EdgeScores]

    def to_frame(self) -> "pd.DataFrame":
        """One row for each method."""
        import pandas as pd

        return pd.DataFrame([asdict(row) for row in self.rows])

    def __repr__(self) -> str:
        aucs = ", ".join(f"{row.method} {row.node_auc:.3f}" for row in self.rows)
        return f"Comparison({self.task} on {self.model}: node AUC {aucs})"

    def figures(self) -> "dict[str, tuple[Figure, pd.DataFrame]]":
        """ROC AUC of each method, over edges and over heads and MLPs."""
        from plotly import graph_objects as go

        from saelab.core.plotting import BLUE, ORANGE, figure

        frame = self.to_frame()
        columns = (("edges", "edge_auc", BLUE), ("heads and MLPs", "node_auc", ORANGE))
        bars = [
            go.Bar(x=frame["method"], y=frame[column], name=name, marker={"color": colour})
            for name, column, colour in columns
        ]
        axes = {"xaxis": {"title": "method"}, "yaxis": {"title": "ROC AUC", "range": [0, 1]}}
        return {"auc": (figure(*bars, barmode="group", **axes), frame)}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without the scores themselves."""
        kept = {name: value for name, value in vars(self).items() if name not in ("rows", "scores", "setting")}
        return {**kept, "setting": asdict(self.setting), "rows": [asdict(row) for row in self.rows]}


def compare(
    parts: Components,
    train: TaskBatch,
    heldout: TaskBatch,
    setting: Setting,
    codes: CodesConfig,
    *,
    truth: Truth | None = None,
    methods: tuple[str, ...] = METHODS,
    tau: float = 0.01,
    steps: int = 5,
    fraction: float = 0.1,
    reference_share: float = 0.02,
    seed: int = 0,
) -> Comparison:
    """Run the methods on ``train``, judge them against the truth and, by ablation, on ``heldout``."""
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise ConfigError(
            f"no circuit method '{unknown[0]}'{nearest(unknown[0], METHODS)} (known: {', '.join(METHODS)})"
        )
    runner = EdgeRunner(parts, train, setting)
    found: dict[str, EdgeScores] = {}
    cpu: dict[str, float] = {}
    for name in methods:
        began = time.process_time()
        found[name] = run_method(name, parts, runner, codes, tau=tau, steps=steps)
        cpu[name] = time.process_time() - began
    if truth is None:
        reference = found.get("patching") or patch_edges(runner)
        edges, source = _reference(runner, reference, reference_share)
        nodes = np.asarray(edges.any(0))
    else:
        edges, nodes, source = truth.edges, truth.nodes, f"{truth.name}: {truth.source}"
    judge = EdgeRunner(parts, heldout, setting)
    rows = [
        _judge(score, edges, nodes, judge, fraction=fraction, cpu_seconds=cpu[name]) for name, score in found.items()
    ]
    return Comparison(
        model=parts.model.name,
        task=train.name,
        setting=setting,
        truth=source,
        n_true_edges=int(edges.sum()),
        n_edges=runner.graph.n_edges,
        n_true_nodes=int(nodes[runner.graph.n_embeddings :].sum()),
        fraction=fraction,
        accuracy=accuracy(judge.clean_logits, heldout),
        n_train=len(train),
        n_heldout=len(heldout),
        seed=seed,
        rows=tuple(rows),
        scores=found,
    )


def run_method(
    name: str, parts: Components, runner: EdgeRunner, codes: CodesConfig, *, tau: float, steps: int
) -> EdgeScores:
    """Run one method by its name."""
    if name == "codes":
        return discrete_codes(parts, runner.batch, codes).node_scores()
    if name == "patching":
        return patch_edges(runner)
    if name == "patching-nodes":
        return patch_nodes(runner)
    if name == "acdc":
        return acdc(runner, tau)
    if name == "dfa":
        return dfa_scores(parts, runner.batch)
    return eap(runner, 1 if name == "eap" else steps)


def _reference(runner: EdgeRunner, scores: EdgeScores, share: float) -> tuple[Bool[np.ndarray, "r w"], str]:
    assert scores.edges is not None, "activation patching scores edges"
    everything = abs(float(runner.scores(runner.graph.valid[None])[0]) - runner.clean_score)
    edges: np.ndarray = np.nan_to_num(np.abs(scores.edges)) > share * everything
    return edges, f"activation patching: edges that move {runner.setting.metric} by more than {share:.0%} of all"


def _judge(
    scores: EdgeScores,
    edges: Bool[np.ndarray, "r w"],
    nodes: Bool[np.ndarray, " w"],
    judge: EdgeRunner,
    *,
    fraction: float,
    cpu_seconds: float,
) -> MethodResult:
    graph = judge.graph
    edge_auc = edge_f1 = float("nan")
    if scores.edges is not None and edges.any():
        flat = np.abs(scores.edges[graph.valid])
        edge_auc, edge_f1 = roc_auc(flat, edges[graph.valid]), best_f1(flat, edges[graph.valid])
    scored = ~np.isnan(scores.nodes)
    scored[: graph.n_embeddings] = False
    magnitude, truth = np.abs(scores.nodes[scored]), nodes[scored]
    measured = curve(judge, scores)
    at = int(np.abs(measured.fractions - fraction).argmin())
    runs = {
        "codes": 2,
        "patching": graph.n_edges,
        "patching nodes": len(graph.writers),
        "acdc": int(scores.details.get("runs", 0)),
        "dfa": 2,
    }.get(scores.method, 2 + 2 * int(scores.details.get("steps", 1)))
    return MethodResult(
        scores.method,
        edge_auc,
        edge_f1,
        roc_auc(magnitude, truth),
        best_f1(magnitude, truth),
        float(measured.faithfulness[at]),
        measured.cpr,
        measured.cmd,
        scores.seconds,
        cpu_seconds,
        runs,
    )
