"""Figure and report of a feature circuit."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from saelab.analysis.circuits.features.edges import OUTPUT
from saelab.analysis.circuits.figure import FigureEdge, FigureNode, graph_figure, page, table_html

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

    from saelab.analysis.circuits.features.circuit import FeatureCircuit

Describe = Callable[[str, int], str]
"""(site, latent) -> what to show of it, its top tokens for one."""


def feature_figure(circuit: "FeatureCircuit", describe: Describe | None = None) -> "tuple[Figure, pd.DataFrame]":
    """Draw nodes by position (or side by side where positions are summed) and site; the metric stands on top."""
    rows = {site: float(i) for i, site in enumerate(circuit.sites)}
    aligned = any(node.address.position is not None for node in circuit.nodes)
    counts: dict[tuple[str, int | None], int] = {}
    nodes: list[FigureNode] = []
    for node in circuit.nodes:
        a = node.address
        place = counts.setdefault((a.site, a.position), 0)
        counts[a.site, a.position] += 1
        x = (a.position or 0) + 0.16 * place if aligned else float(place)
        exact = "" if node.exact is None else f"measured {node.exact:.4g}"
        about = describe(a.site, a.index) if describe is not None and a.index != "error" else ""
        kind = "error" if a.index == "error" else "feature"
        label = "" if a.index == "error" else str(a.index)
        nodes.append(
            FigureNode(str(a), x, rows[a.site], kind, node.effect, label, "\n".join(filter(None, [exact, about])))
        )
    middle = float(np.mean([node.x for node in nodes])) if nodes else 0.0
    nodes.append(FigureNode(str(OUTPUT), middle, float(len(rows)), "logit", 0.0, circuit.metric))
    edges = [FigureEdge(str(u), str(d), w) for (u, d), w in circuit.edges.items()]
    labels = [(y, site.removeprefix("blocks.").replace("hook_", "")) for site, y in rows.items()]
    return graph_figure(
        nodes,
        edges,
        y_labels=[*labels, (float(len(rows)), "metric")],
        x_title="position" if aligned else "nodes of a site, largest effect first",
        y_title="site",
    )


def feature_report(circuit: "FeatureCircuit", describe: Describe | None = None) -> str:
    """Return a self-contained HTML page about a feature circuit."""
    about = (
        f"<p>{circuit.task} on {circuit.model}: metric {circuit.metric}, effects by {circuit.method}, other values "
        f"{circuit.patch}, errors {circuit.errors}; {circuit.n_prompts} prompts, judged on {circuit.n_heldout} "
        "held-out ones. Nodes outside a circuit have their mean over corrupted prompts. Triangles are SAE errors.</p>"
    )
    frame = circuit.to_frame()
    if describe is not None:
        frame["about"] = [
            "" if i == "error" else describe(s, int(i)) for s, i in zip(frame["site"], frame["index"], strict=True)
        ]
    sections = [
        ("Faithfulness", about + table_html(circuit.curve_frame())),
        ("Nodes", table_html(frame.drop(columns=["site", "position", "index"]))),
    ]
    return page(f"{circuit.task}: features of {circuit.model}", feature_figure(circuit, describe)[0], sections)
