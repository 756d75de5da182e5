"""A circuit: the edges that do a task, how well they do it alone on unseen prompts, and how chance does."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float

from saelab.analysis.circuits.controls import CONTROLS
from saelab.analysis.circuits.graph import EdgeGraph
from saelab.analysis.circuits.run import EdgeRunner, Setting
from saelab.analysis.circuits.scores import EdgeScores, faithfulness, node_circuit, top_edges
from saelab.core.artifacts import prepare_output, read_json, read_manifest, write_json, write_manifest
from saelab.core.errors import ConfigError
from saelab.core.result import Result

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

KIND = "circuit"
"""Kind of the folder in its manifest."""
SIZES = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)
"""Shares of edges that :func:`smallest_circuit` tries, smallest first."""

CONTROL_NAMES = {"edges": "random edges", "paths": "random paths", "parts": "random heads and MLPs"}


@dataclass(frozen=True, eq=False, repr=False)
class Circuit(Result):
    """Edges of a model that do a task."""

    model: str
    model_fingerprint: str
    task: str
    method: str
    """Method whose scores chose the edges."""
    setting: Setting
    graph: EdgeGraph
    edges: Bool[np.ndarray, "r w"]
    scores: Float[np.ndarray, "r w"]
    """Effect (or attribution) of every edge by the method; 0 where it scores only heads."""
    faithfulness_train: float
    """(m(C) - m(nothing)) / (m(model) - m(nothing)) on the prompts it was found on."""
    faithfulness: float
    """The same on held-out prompts."""
    completeness: float
    """The same of everything but the circuit, on held-out prompts: near 0 when nothing is left outside."""
    random_faithfulness: dict[str, tuple[float, ...]]
    """The same of random circuits, by control (:mod:`saelab.analysis.circuits.controls`), on held-out prompts."""
    model_score: float
    """Metric of the whole model on the held-out prompts."""
    empty_score: float
    """The same with every edge removed; near ``model_score``, faithfulness is a ratio of noise."""
    n_train: int
    n_heldout: int
    seed: int

    @property
    def n_edges(self) -> int:
        """Edges in the circuit."""
        return int(self.edges.sum())

    @property
    def share(self) -> float:
        """Share of the model's edges in the circuit."""
        return self.n_edges / self.graph.n_edges

    @property
    def heads(self) -> list[str]:
        """Heads in the circuit."""
        chosen = set(self.graph.nodes(self.edges).tolist())
        return [self.graph.writers[w] for w in self.graph.heads if w in chosen]

    @property
    def mlps(self) -> list[str]:
        """MLPs in the circuit."""
        return [self.graph.writers[w] for w in self.graph.nodes(self.edges) if self.graph.writers[w].startswith("m")]

    def control_lines(self) -> dict[str, str]:
        """Mean and best faithfulness of the random circuits, by what they have in common with this one."""
        return {
            CONTROL_NAMES[control]: f"{np.mean(values):.3f} mean, {max(values):.3f} best of {len(values)}"
            for control, values in self.random_faithfulness.items()
        }

    def judged_frame(self) -> "pd.DataFrame":
        """Faithfulness of the circuit, of all other edges, and of the random circuits (mean and best)."""
        import pandas as pd

        alone = {
            "the circuit": self.faithfulness,
            "on its own prompts": self.faithfulness_train,
            "all other edges": self.completeness,
        }
        rows = [{"of": name, "mean": value, "best": float("nan")} for name, value in alone.items()]
        for control, values in self.random_faithfulness.items():
            name = f"{len(values)} {CONTROL_NAMES[control]}"
            rows.append({"of": name, "mean": float(np.mean(values)), "best": max(values)})
        return pd.DataFrame(rows)

    def to_frame(self) -> "pd.DataFrame":
        """One row for each edge in the circuit, largest score first."""
        import pandas as pd

        names = self.graph.names(self.edges)
        frame = pd.DataFrame({"edge": names, "score": [self.scores[self.graph.edge(name)] for name in names]})
        return frame.sort_values("score", key=np.abs, ascending=False, kind="stable").reset_index(drop=True)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; :func:`load_circuit` makes the circuit from them again."""
        kept = {n: v for n, v in vars(self).items() if n not in ("setting", "graph", "edges", "scores")}
        frame = self.to_frame()
        return {
            **kept,
            "setting": asdict(self.setting),
            "graph": self.graph.to_dict(),
            "n_edges": self.n_edges,
            "share": self.share,
            "heads": self.heads,
            "mlps": self.mlps,
            "edges": [{"edge": e, "score": float(s)} for e, s in zip(frame["edge"], frame["score"], strict=True)],
        }

    def __repr__(self) -> str:
        return (
            f"Circuit({self.task} on {self.model} by {self.method}: {self.n_edges} of {self.graph.n_edges} edges, "
            f"held-out faithfulness {self.faithfulness:.3f}, "
            f"random paths {np.mean(self.random_faithfulness['paths']):.3f})"
        )

    def figures(self) -> "dict[str, tuple[Figure, pd.DataFrame]]":
        """The circuit."""
        from saelab.analysis.circuits.figure import circuit_figure

        return {"circuit": circuit_figure(self)}


def smallest_circuit(
    runner: EdgeRunner,
    heldout: EdgeRunner,
    scores: EdgeScores,
    *,
    target: float = 0.8,
    n_random: int = 20,
    seed: int = 0,
) -> Circuit:
    """Smallest circuit from a method's scores whose faithfulness is at least ``target`` on the runner's prompts.

    Sizes are tried from ``SIZES``; ``n_random`` circuits of each control are judged beside it. Raises
    :class:`ConfigError` when even all edges that lead somewhere do not reach the target.
    """
    graph = runner.graph
    sizes = [max(1, round(share * graph.n_edges)) for share in SIZES]
    if scores.edges is not None:
        tried = [top_edges(graph, scores.edges, n) for n in sizes]
    else:
        tried = [node_circuit(graph, scores.nodes, n) for n in sizes]
    found = faithfulness(runner, np.stack(tried))
    good = np.flatnonzero(found >= target)
    if not len(good):
        raise ConfigError(
            f"no circuit from {scores.method} reaches faithfulness {target}; the best has {found.max():.2f}"
        )
    mask = tried[good[0]]
    chance = {name: control(graph, mask, n_random, seed) for name, control in CONTROLS.items()}
    judged = faithfulness(heldout, np.concatenate([mask[None], (graph.valid & ~mask)[None], *chance.values()]))
    by_control = zip(chance, judged[2:].reshape(len(chance), n_random).tolist(), strict=True)
    return Circuit(
        model=runner.parts.model.name,
        model_fingerprint=runner.parts.model.fingerprint,
        task=runner.batch.name,
        method=scores.method,
        setting=runner.setting,
        graph=graph,
        edges=mask,
        scores=np.zeros(graph.valid.shape) if scores.edges is None else np.nan_to_num(scores.edges),
        faithfulness_train=float(found[good[0]]),
        faithfulness=float(judged[0]),
        completeness=float(judged[1]),
        random_faithfulness={name: tuple(values) for name, values in by_control},
        model_score=heldout.clean_score,
        empty_score=float(heldout.scores(graph.valid[None])[0]),
        n_train=len(runner.batch),
        n_heldout=len(heldout.batch),
        seed=seed,
    )


def save_circuit(circuit: Circuit, folder: str | Path, *, force: bool = False) -> Path:
    """Write a circuit folder: ``circuit.json``, ``report.html``, ``figure.json``, and a manifest."""
    from saelab.analysis.circuits.figure import write_pages
    from saelab.analysis.circuits.report import circuit_report

    folder = prepare_output(folder, force=force)
    data = circuit.to_dict()
    write_json(folder / "circuit.json", data)
    write_pages(folder, circuit_report(circuit), circuit.plot())
    summary = ("model", "model_fingerprint", "task", "method", "setting", "n_edges", "share", "faithfulness")
    write_manifest(folder, KIND, {"content": "edges", **{key: data[key] for key in summary}})
    return folder


def load_circuit(folder: str | Path) -> Circuit:
    """Read a circuit folder."""
    manifest = read_manifest(folder, KIND)
    if manifest.get("content") != "edges":
        raise ConfigError(f"{folder} holds a {manifest.get('content')} circuit, expected one of edges")
    data = read_json(Path(folder) / "circuit.json")
    graph = EdgeGraph.from_dict(data["graph"])
    edges, scores = np.zeros_like(graph.valid), np.zeros(graph.valid.shape)
    for entry in data["edges"]:
        place = graph.edge(entry["edge"])
        edges[place], scores[place] = True, entry["score"]
    plain = ("model", "model_fingerprint", "task", "method", "faithfulness_train", "faithfulness", "completeness")
    return Circuit(
        **{key: data[key] for key in (*plain, "model_score", "empty_score", "n_train", "n_heldout", "seed")},
        setting=Setting(**data["setting"]),
        graph=graph,
        edges=edges,
        scores=scores,
        random_faithfulness={name: tuple(values) for name, values in data["random_faithfulness"].items()},
    )
