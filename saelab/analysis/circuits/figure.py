"""Interactive graph of a circuit: nodes by layer and by position or head, colour by sign, width by weight."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape as escape_html
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from saelab.core.artifacts import atomic_writer
from saelab.core.errors import MissingFileError
from saelab.core.plotting import BLUE, VERMILLION, escape, figure

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

    from saelab.analysis.circuits.circuit import Circuit

WIDTHS = (0.6, 1.2, 2.0, 3.2, 5.0)
"""Line widths, of the faintest to the heaviest fifth of the largest weight (Plotly draws one width per trace)."""
MOST_EDGES = 1500
"""Edges drawn; of more, those of largest weight."""
GREY = "#8A8A8A"
SYMBOLS = {"feature": "circle", "head": "circle", "mlp": "square", "error": "triangle-up", "embedding": "square",
           "logit": "diamond"}  # fmt: skip


@dataclass(frozen=True)
class FigureNode:
    """A node to draw."""

    name: str
    x: float
    y: float
    kind: str
    """One of ``SYMBOLS``."""
    weight: float
    """Signed: colour by sign, size by magnitude; 0 is grey."""
    label: str = ""
    """Short text beside it."""
    hover: str = ""
    """Further lines of the hover box, as plain text."""


@dataclass(frozen=True)
class FigureEdge:
    """An edge to draw, between two of the nodes."""

    source: str
    target: str
    weight: float


def graph_figure(
    nodes: Sequence[FigureNode],
    edges: Sequence[FigureEdge],
    *,
    x_labels: Sequence[tuple[float, str]] = (),
    y_labels: Sequence[tuple[float, str]] = (),
    x_title: str,
    y_title: str,
    height: int = 560,
) -> "tuple[Figure, pd.DataFrame]":
    """Draw a graph; the frame holds the edges drawn. Texts from outside (tokens) are escaped here."""
    import pandas as pd

    places = {node.name: node for node in nodes}
    drawn = sorted(edges, key=lambda edge: -abs(edge.weight))[:MOST_EDGES]
    drawn_figure = figure(
        *_edge_traces(drawn, places),
        _node_trace(nodes),
        height=height,
        showlegend=False,
        hovermode="closest",
        xaxis=_axis(x_labels, x_title),
        yaxis=_axis(y_labels, y_title),
    )
    frame = pd.DataFrame(
        [(edge.source, edge.target, edge.weight) for edge in drawn], columns=["source", "target", "weight"]
    )
    return drawn_figure, frame


def _axis(labels: Sequence[tuple[float, str]], title: str) -> dict[str, Any]:
    ticks = {
        "tickmode": "array",
        "tickvals": [at for at, _ in labels],
        "ticktext": [escape(text) for _, text in labels],
    }
    return {"title": title, "showgrid": False, **ticks}


def _edge_traces(edges: Sequence[FigureEdge], places: dict[str, FigureNode]) -> list[Any]:
    from plotly import graph_objects as go

    largest = max((abs(edge.weight) for edge in edges), default=0.0) or 1.0
    groups: dict[tuple[int, bool], list[FigureEdge]] = {}
    for edge in edges:
        level = min(int(abs(edge.weight) / largest * len(WIDTHS)), len(WIDTHS) - 1)
        groups.setdefault((level, edge.weight >= 0), []).append(edge)
    traces = []
    for (level, positive), members in sorted(groups.items()):
        x: list[float | None] = []
        y: list[float | None] = []
        for edge in members:
            source, target = places[edge.source], places[edge.target]
            x += [source.x, target.x, None]
            y += [source.y, target.y, None]
        line = {"width": WIDTHS[level], "color": BLUE if positive else VERMILLION}
        traces.append(go.Scatter(x=x, y=y, mode="lines", line=line, opacity=0.25 + 0.12 * level, hoverinfo="skip"))
    if edges:  # an edge's own hover box stands at its middle
        middle = [(places[e.source], places[e.target], e) for e in edges]
        traces.append(
            go.Scatter(
                x=[(a.x + b.x) / 2 for a, b, _ in middle],
                y=[(a.y + b.y) / 2 for a, b, _ in middle],
                mode="markers",
                marker={"size": 7, "opacity": 0},
                text=[f"{escape(e.source)} → {escape(e.target)}<br>{e.weight:.4g}" for _, _, e in middle],
                hovertemplate="%{text}<extra></extra>",
            )
        )
    return traces


def _node_trace(nodes: Sequence[FigureNode]) -> Any:
    from plotly import graph_objects as go

    largest = max((abs(node.weight) for node in nodes), default=0.0) or 1.0
    colours = [GREY if node.weight == 0 else (BLUE if node.weight > 0 else VERMILLION) for node in nodes]
    hovers = [
        "<br>".join([f"<b>{escape(n.name)}</b>", f"{n.weight:.4g}", *(escape(line) for line in n.hover.splitlines())])
        for n in nodes
    ]
    return go.Scatter(
        x=[node.x for node in nodes],
        y=[node.y for node in nodes],
        mode="markers+text",
        marker={
            "color": colours,
            "symbol": [SYMBOLS[node.kind] for node in nodes],
            "size": [9 + 11 * abs(node.weight) / largest for node in nodes],
            "line": {"width": 1, "color": "rgba(255,255,255,0.7)"},
        },
        text=[escape(node.label) for node in nodes],
        textposition="top center",
        textfont={"size": 11},
        customdata=hovers,
        hovertemplate="%{customdata}<extra></extra>",
    )


def circuit_figure(circuit: "Circuit") -> "tuple[Figure, pd.DataFrame]":
    """Draw a circuit of edges: heads across, layers up; a node's weight is the sum of the scores of its outgoing edges.

    The edges of one pair of parts (into query, key and value) are drawn as one, their scores summed.
    """
    graph = circuit.graph
    totals = np.where(circuit.edges, circuit.scores, 0).sum(0)
    nodes = [FigureNode("logits", _middle(graph.n_heads), 2.0 * graph.n_layers, "logit", 0.0, "logits")]
    nodes += [
        FigureNode(name, *_place(name, graph.n_heads), _kind(name), float(totals[w]), name)
        for w, name in enumerate(graph.writers)
        if circuit.edges[:, w].any()
    ]
    shown = {node.name for node in nodes}
    sums: dict[tuple[str, str], float] = {}
    for r, w in zip(*np.nonzero(circuit.edges), strict=True):
        targets = [graph.writers[o] for o in graph.readers[r].owners] or ["logits"]
        for target in filter(shown.__contains__, targets):
            key = (graph.writers[w], target)
            sums[key] = sums.get(key, 0.0) + float(circuit.scores[r, w])
    edges = [FigureEdge(source, target, weight) for (source, target), weight in sums.items()]
    levels = [(2.0 * layer, f"heads {layer}") for layer in range(graph.n_layers)]
    levels += [(2.0 * layer + 1, f"MLP {layer}") for layer in range(graph.n_layers)]
    return graph_figure(
        nodes,
        edges,
        x_labels=[(h, str(h)) for h in range(graph.n_heads)],
        y_labels=[(-1.0, "input"), *levels, (2.0 * graph.n_layers, "output")],
        x_title="head",
        y_title="layer",
    )


def _middle(n_heads: int) -> float:
    return (n_heads - 1) / 2


def _place(name: str, n_heads: int) -> tuple[float, float]:
    if name.startswith("a"):
        layer, head = name[1:].split(".h")
        return float(head), 2.0 * int(layer)
    if name.startswith("m"):
        return _middle(n_heads), 2.0 * int(name[1:]) + 1
    return _middle(n_heads) + (0.75 if name == "pos" else -0.75), -1.0


def _kind(name: str) -> str:
    return {"a": "head", "m": "mlp"}.get(name[0], "embedding")


def page(title: str, figure: "Figure", sections: Sequence[tuple[str, str]]) -> str:
    """Return one self-contained HTML page: a title, a figure (Plotly's script is inside), and sections of HTML."""
    body = figure.to_html(full_html=False, include_plotlyjs="inline", config={"displaylogo": False, "responsive": True})
    parts = "".join(f"<h2>{escape_html(name)}</h2>{html}" for name, html in sections)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width,initial-scale=1"><title>{escape_html(title)}</title><style>{_STYLE}</style></head>'
        f"<body><h1>{escape_html(title)}</h1>{body}{parts}</body></html>\n"
    )


def write_pages(folder: Path, html: str, figure: "Figure") -> None:
    """Write ``report.html`` and ``figure.json``, which :func:`read_figure` reads."""
    with atomic_writer(folder / "report.html") as file:
        file.write(html.encode())
    with atomic_writer(folder / "figure.json") as file:
        file.write(str(figure.to_json()).encode())


def read_figure(folder: str | Path) -> "Figure":
    """Return the figure of a circuit folder of any content."""
    from plotly import io

    path = Path(folder) / "figure.json"
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist; is {folder} a circuit folder, written completely?")
    figure: Figure = io.from_json(path.read_text(encoding="utf-8"))
    return figure


def table_html(frame: Any) -> str:
    """A frame as an HTML table, numbers short and texts escaped."""
    found: str = frame.to_html(index=False, border=0, escape=True, float_format=lambda value: f"{value:.4g}")
    return found


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem;color:#1b1b1b;"
    "background:#fff}h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}table{border-collapse:collapse}"
    "td,th{padding:.2rem .9rem .2rem 0;text-align:left;font-variant-numeric:tabular-nums}th{color:#555}"
)
