"""Saved circuits as the browser shows them, whatever they are made of: a figure, numbers, a table of parts."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saelab.core.artifacts import read_json, read_manifest
from saelab.core.errors import CorruptError
from saelab.workflows.browse import CIRCUIT

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

    from saelab.analysis.circuits.figure import FigureEdge, FigureNode

MOST_EDGES = 400
"""Edges of an attribution graph that are drawn; of more, those of largest weight."""
HELP = "saelab circuits --help"
"""Names the commands that find circuits."""


@dataclass(frozen=True, eq=False)
class ShownCircuit:
    """One circuit."""

    title: str
    """What it is a circuit of."""
    about: str
    """Model, method, prompts: one line."""
    numbers: dict[str, tuple[str, str]]
    """Title to (number as text, meaning)."""
    figure: "Figure"
    """The graph; points that stand for features of SAEs carry ``[site, feature]`` as their custom data."""
    table: "pd.DataFrame"
    """Its parts, strongest first; features of SAEs have columns ``site`` and ``feature``."""


def open_circuit(folder: Path) -> ShownCircuit:
    """Read a circuit folder of any content. Raises :class:`CorruptError` and the like."""
    content = str(read_manifest(folder, CIRCUIT).get("content"))
    if content not in _READERS:
        raise CorruptError(f"{folder} holds a circuit of '{content}', which this version cannot draw; update saelab")
    try:
        return _READERS[content](folder)
    except KeyError as error:
        why = f"it has no entry '{error.args[0]}', so it is of another version of saelab or damaged"
    except (TypeError, ValueError, AttributeError, IndexError):
        why = "it is damaged, or of another version of saelab"
    raise CorruptError(f"{folder} is not a circuit that this version can read: {why}; make it again (saelab circuits)")


def _edges(folder: Path) -> ShownCircuit:
    from saelab.analysis.circuits.circuit import load_circuit

    circuit = load_circuit(folder)
    chance = {control: max(values, default=float("nan")) for control, values in circuit.random_faithfulness.items()}
    numbers = {
        "edges": (f"{circuit.n_edges:,}", f"Edges in the circuit: {circuit.share:.1%} of the model's."),
        "heads": (f"{len(circuit.heads)}", "Attention heads that something in the circuit reads."),
        "faithfulness": (
            f"{circuit.faithfulness:.3f}",
            "Share of the task that the circuit does alone, on prompts it was not found on: 1 is the whole model.",
        ),
        "by chance": (
            f"{chance['paths']:.3f}",
            "The best random circuit of as many edges on paths from the embeddings to the logits; of as many heads and "
            f"MLPs with all the edges among them: {chance['parts']:.3f}.",
        ),
        "left outside": (
            f"{circuit.completeness:.3f}",
            "Share of the task that everything but the circuit does: near 0 when nothing is left outside.",
        ),
    }
    about = f"{circuit.model}, by {circuit.method}; {circuit.n_heldout:,} unseen prompts"
    return ShownCircuit(circuit.task, about, numbers, circuit.plot(), circuit.to_frame())


def _features(folder: Path) -> ShownCircuit:
    """Read a circuit of SAE features; errors of SAEs are nodes too."""
    from saelab.analysis.circuits.figure import FigureEdge, FigureNode

    data = _object(folder / "circuit.json")
    sites = list(data["sites"])
    nodes: list[FigureNode] = []
    rows: list[dict[str, Any]] = []
    counts = dict.fromkeys(sites, 0)
    for node in data["nodes"]:
        site, where, index = str(node["node"]).split("/")
        at = counts[site] if where == "all" else int(where) + 0.16 * (counts[site] % 6)
        counts[site] += 1
        kind = "error" if index == "error" else "feature"
        effect, exact = float(node["effect"]), node["exact"]
        says = str(node.get("tokens", ""))
        hover = "\n".join(filter(None, ["" if exact is None else f"measured {exact:.4g}", says]))
        label = "" if kind == "error" else index
        nodes.append(FigureNode(str(node["node"]), float(at), float(sites.index(site)), kind, effect, label, hover))
        feature = None if kind == "error" else int(index)
        where_it_is = {"site": site, "feature": feature, "kind": kind, "position": where}
        rows.append({**where_it_is, "effect": effect, "measured": exact, "tokens": says})
    known = {node.name for node in nodes}
    ends = {str(edge["target"]) for edge in data["edges"]} - known
    middle = sum(node.x for node in nodes) / max(len(nodes), 1)
    nodes += [FigureNode(end, middle, float(len(sites)), "logit", 0.0, str(data["metric"])) for end in sorted(ends)]
    known |= ends
    edges = [
        FigureEdge(str(e["source"]), str(e["target"]), float(e["weight"]))
        for e in data["edges"]
        if e["source"] in known
    ]
    labels = [(float(k), site) for k, site in enumerate(sites)]
    axes: dict[str, Any] = {"y_labels": labels, "x_title": "nodes of a site, largest effect first", "y_title": "site"}
    figure = _clickable(nodes, edges, [(row["site"], row["feature"]) for row in rows], **axes)
    within = [point for point in data["curve"] if point["n_nodes"] <= len(rows)]
    judged = max(within or data["curve"], key=lambda point: point["n_nodes"], default=None)
    numbers = {
        "nodes": (f"{len(rows):,}", f"Of {data['n_candidates']:,} with any effect."),
        "edges": (f"{len(data['edges']):,}", "Edges between them."),
    }
    if judged is not None:
        meaning = f"Share of the task that the {judged['n_nodes']:,} nodes of largest effect do alone, unseen prompts."
        numbers["faithfulness"] = (f"{judged['faithfulness']:.3f}", meaning)
        numbers["by chance"] = (
            f"{judged['random']:.3f}",
            "Random sets of as many nodes at each site; as many that change most between the prompts: "
            f"{judged['changed']:.3f}.",
        )
    about = f"{data['model']}, effects by {data['method']} on {data['metric']}; {data['n_heldout']:,} unseen prompts"
    return ShownCircuit(str(data["task"]), about, numbers, figure, _table(rows))


def _attribution(folder: Path) -> ShownCircuit:
    """Read an attribution graph: one prompt, transcoders in place of MLPs."""
    from saelab.analysis.circuits.figure import FigureEdge, FigureNode

    data, about = _object(folder / "graph.json"), read_manifest(folder, CIRCUIT)
    tokens = data["metadata"]["prompt_tokens"]
    layers = sorted({-1 if n["layer"] == "E" else int(n["layer"]) for n in data["nodes"]})
    kinds = {"cross layer transcoder": "feature", "mlp reconstruction error": "error", "embedding": "embedding"}
    nodes: list[FigureNode] = []
    rows: list[dict[str, Any]] = []
    crowd: dict[tuple[int, int], int] = {}
    named: set[tuple[int, int]] = set()  # of each layer and token, the feature of largest influence has its number
    for node in sorted(data["nodes"], key=lambda n: -float(n["influence"])):
        layer = -1 if node["layer"] == "E" else int(node["layer"])
        kind, position = kinds.get(node["feature_type"], "logit"), int(node["ctx_idx"])
        at = crowd.setdefault((layer, position), 0)
        crowd[layer, position] += 1
        label = str(node["feature"]) if kind == "feature" and (layer, position) not in named else ""
        if label:
            named.add((layer, position))
        place = (position + 0.12 * (at % 7), 2.0 * layers.index(layer) + 0.22 * (at // 7))
        hover = f"token {tokens[position]!r}\n{node['clerp']}".strip()
        nodes.append(FigureNode(str(node["node_id"]), *place, kind, float(node["influence"]), label, hover))
        feature = int(node["feature"]) if kind == "feature" else None
        rows.append(
            {
                **{"kind": kind, "site": f"blocks.{layer}.mlp" if kind == "feature" else "", "feature": feature},
                **{"token": repr(tokens[position]), "influence": float(node["influence"]), "says": str(node["clerp"])},
            }
        )
    edges = [FigureEdge(str(e["source"]), str(e["target"]), float(e["weight"])) for e in data["links"]]
    drawn = sorted(edges, key=lambda edge: -abs(edge.weight))[:MOST_EDGES]
    names = ["tokens" if n < 0 else "logits" if n == layers[-1] else f"MLP {n}" for n in layers]
    labels = [(2.0 * k, name) for k, name in enumerate(names)]
    targets = [(row["site"], row["feature"]) for row in rows]
    positions = [(float(k), str(token)) for k, token in enumerate(tokens)]
    figure = _clickable(nodes, drawn, targets, y_labels=labels, x_labels=positions, x_title="token", y_title="layer")
    numbers = {
        "nodes": (f"{len(nodes):,}", "After pruning."),
        "edges": (f"{len(edges):,}", f"After pruning; the {len(drawn):,} of largest weight are drawn."),
        "replacement": (f"{about['replacement']:.3f}", "Share of the influence from tokens, not from errors."),
        "completeness": (f"{about['completeness']:.3f}", "Mean share of a node's inputs that are no errors."),
    }
    table = _table(rows).sort_values("influence", ascending=False, kind="stable").reset_index(drop=True)
    return ShownCircuit(f"{about['prompt']!r}", f"{about['model']}, attribution graph", numbers, figure, table)


_READERS: dict[str, Callable[[Path], ShownCircuit]] = {
    "edges": _edges,
    "features": _features,
    "attribution": _attribution,
}


def _object(path: Path) -> dict[str, Any]:
    data = read_json(path)
    if not isinstance(data, dict):
        raise CorruptError(f"{path} must hold a mapping; make the circuit again")
    return data


def _table(rows: list[dict[str, Any]]) -> "pd.DataFrame":
    """Rows as a frame whose ``feature`` is empty where a part is none; columns that say nothing are left out."""
    import pandas as pd

    frame = pd.DataFrame(rows)
    if len(frame):
        frame["feature"] = frame["feature"].astype("Int64")
    return frame.drop(columns=[name for name in ("tokens", "says") if name in frame and not frame[name].any()])


def _clickable(
    nodes: "list[FigureNode]", edges: "list[FigureEdge]", targets: list[tuple[str, int | None]], **axes: Any
) -> Any:
    """Draw a graph whose first points carry their targets, so that a click can open a feature."""
    from saelab.analysis.circuits.figure import graph_figure

    figure, _ = graph_figure(nodes, edges, **axes)
    points = figure.data[-1]
    points.hovertext, points.hovertemplate = points.customdata, "%{hovertext}<extra></extra>"
    clicks = [[site, -1 if feature is None else feature] for site, feature in targets]
    points.customdata = clicks + [["", -1]] * (len(nodes) - len(targets))
    return figure


def feature_of(point: Any) -> tuple[str, int] | None:
    """Return site and feature of a clicked point of the figure, None when it stands for something else."""
    if isinstance(point, list | tuple) and len(point) >= 2 and isinstance(point[0], str):
        try:
            return (point[0], int(point[1])) if int(point[1]) >= 0 else None
        except (TypeError, ValueError):
            return None
    return None


def is_site(pattern: str, about: dict[str, Any]) -> bool:
    """Whether a feature store, by its manifest, is of a site; ``blocks.2.mlp`` stands for a transcoder's MLP."""
    sites = [str(about.get(key) or "") for key in ("site", "target_site")]
    block, _, part = pattern.rpartition(".")
    return pattern in sites or (part == "mlp" and any(s.startswith(block + ".") and "mlp" in s for s in sites))
