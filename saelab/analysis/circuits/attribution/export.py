"""Figure of an attribution graph, and the graph JSON (schema version 1) that circuit-tracer's and Neuronpedia's read.

Their node ids are ``layer_feature_position``; theirs for an error is ``0_layer_position``, which is also a layer-0
latent's. Here an error's id begins with ``E``, so no two nodes share an id.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from saelab.analysis.circuits.attribution.graph import AttributionGraph, GraphNode
from saelab.analysis.circuits.figure import FigureEdge, FigureNode, graph_figure, page, table_html, write_pages
from saelab.core.artifacts import prepare_output, write_json, write_manifest

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

Describe = Callable[[int, int], str]
"""(layer, latent) -> what to show of it, its top tokens for one."""
_TYPES = {
    "feature": "cross layer transcoder",
    "error": "mlp reconstruction error",
    "token": "embedding",
    "logit": "logit",
}


def node_id(node: GraphNode) -> str:
    """Id of a node in the graph JSON; tokens and logits have letters for layers, as in circuit-tracer's files."""
    if node.kind == "feature":
        return f"{node.layer}_{node.index}_{node.position}"
    prefix = {"error": f"E{node.layer}", "token": "E", "logit": str(node.layer + 1)}[node.kind]
    return f"{prefix}_{node.index}_{node.position}"


def graph_json(graph: AttributionGraph, slug: str, describe: Describe | None = None) -> dict[str, Any]:
    """Return the pruned graph as the viewers' JSON."""
    kept = np.flatnonzero(graph.pruned.nodes)
    ids = {int(i): node_id(graph.nodes[i]) for i in kept}
    assert len(set(ids.values())) == len(ids), "two nodes share an id"
    logits = iter(graph.logit_texts)
    labels: dict[int, str] = {}
    for i, node in enumerate(graph.nodes):
        if node.kind == "logit":
            labels[i] = f'Output "{next(logits)}" (p={node.activation:.3f})'
        elif node.kind == "token":
            labels[i] = f'Emb: "{graph.token_texts[node.position]}"'
        elif node.kind == "error":
            labels[i] = f'Err: mlp "{graph.token_texts[node.position]}"'
        else:
            labels[i] = describe(node.layer, node.index) if describe is not None else ""
    nodes = [_node(graph, int(i), ids[int(i)], labels[int(i)]) for i in kept]
    targets, sources = np.nonzero(graph.pruned.edges)
    links = [
        {"source": ids[int(s)], "target": ids[int(t)], "weight": float(graph.adjacency[t, s])}
        for t, s in zip(targets, sources, strict=True)
        if int(s) in ids and int(t) in ids
    ]
    metadata = {
        "slug": slug,
        "scan": graph.model,
        "prompt": graph.prompt,
        "prompt_tokens": list(graph.token_texts),
        "node_threshold": graph.settings["node_threshold"],
        "schema_version": 1,
        "generation_settings": {key: graph.settings[key] for key in ("logit_share", "most_logits", "most_features")},
        "pruning_settings": {key: graph.settings[key] for key in ("node_threshold", "edge_threshold")},
        "info": {
            "creator_name": "saelab",
            "replacement_score": graph.replacement,
            "completeness_score": graph.completeness,
            "note": "attention patterns are held: the graph does not explain attention",
        },
    }
    empty: dict[str, Any] = {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}
    return {"metadata": metadata, "qParams": empty, "nodes": nodes, "links": links}


def _node(graph: AttributionGraph, i: int, name: str, label: str) -> dict[str, Any]:
    node = graph.nodes[i]
    n_layers = max(other.layer for other in graph.nodes)
    shown_layer = "E" if node.kind == "token" else str(n_layers + 1 if node.kind == "logit" else node.layer)
    return {
        "node_id": name,
        "feature": node.index,
        "layer": shown_layer,
        "ctx_idx": node.position,
        "feature_type": _TYPES[node.kind],
        "jsNodeId": f"{shown_layer}_{node.index}-{node.position}",
        "clerp": label,
        "activation": node.activation if node.kind == "feature" else None,
        "token_prob": node.activation if node.kind == "logit" else 0.0,
        "is_target_logit": node.kind == "logit",
        "influence": float(graph.influence[i]),
    }


def attribution_figure(graph: AttributionGraph, describe: Describe | None = None) -> "tuple[Figure, pd.DataFrame]":
    """Draw the pruned graph: positions across, layers up, latents beside one another."""
    shown: list[FigureNode] = []
    crowd: dict[tuple[int, int], int] = {}
    logits = iter(graph.logit_texts)
    texts = [next(logits) if node.kind == "logit" else "" for node in graph.nodes]
    for i in np.flatnonzero(graph.pruned.nodes):
        node = graph.nodes[i]
        at = crowd.setdefault((node.layer, node.position), 0)
        crowd[node.layer, node.position] += 1
        kind = {"token": "embedding", "feature": "feature", "error": "error", "logit": "logit"}[node.kind]
        about = describe(node.layer, node.index) if describe is not None and node.kind == "feature" else ""
        token = graph.token_texts[node.position]
        hover = "\n".join(
            filter(None, [f"token {token!r}", about, texts[i] and f"{texts[i]!r} p={node.activation:.3f}"])
        )
        label = {"feature": str(node.index), "logit": texts[i], "token": "", "error": ""}[node.kind]
        x = node.position + 0.12 * (at % 7)
        y = 2.0 * node.layer + 0.22 * (at // 7) + (0.0 if node.kind != "error" else 0.5)
        shown.append(FigureNode(str(node), x, y, kind, float(graph.influence[i]), label, hover))
    names = {node.name for node in shown}
    targets, sources = np.nonzero(graph.pruned.edges)
    edges = [
        FigureEdge(str(graph.nodes[s]), str(graph.nodes[t]), float(graph.adjacency[t, s]))
        for t, s in zip(targets, sources, strict=True)
        if str(graph.nodes[s]) in names and str(graph.nodes[t]) in names
    ]
    layers = sorted({node.layer for node in graph.nodes})
    labels = [(2.0 * n, "tokens" if n < 0 else ("logits" if n == layers[-1] else f"MLP {n}")) for n in layers]
    positions = [(float(p), text) for p, text in enumerate(graph.token_texts)]
    axes = {"x_title": "token of the prompt", "y_title": "layer"}
    return graph_figure(shown, edges, x_labels=positions, y_labels=labels, height=640, **axes)


def save_graph(
    graph: AttributionGraph, folder: str | Path, slug: str, describe: Describe | None = None, *, force: bool = False
) -> Path:
    """Write ``graph.json``, ``report.html`` and a manifest of kind ``circuit`` (content ``attribution``)."""
    folder = prepare_output(folder, force=force)
    slug = re.sub(r"[^a-z0-9-]+", "-", slug.lower()).strip("-") or "graph"
    write_json(folder / "graph.json", graph_json(graph, slug, describe))
    note = (
        f"<p>Replacement {graph.replacement:.3f}, completeness {graph.completeness:.3f} (1: everything through tokens "
        "and latents, 0: everything through transcoder errors). Attention patterns are held at the prompt's values: "
        "the graph does not explain attention. Influence takes absolute values, so cancelling paths look important.</p>"
    )
    html = page(f"{graph.model}: {graph.prompt!r}", attribution_figure(graph, describe)[0],
                [("Scores", note), ("Nodes", table_html(graph.to_frame().head(200)))])  # fmt: skip
    write_pages(folder, html, attribution_figure(graph, describe)[0])
    summary: Mapping[str, Any] = {
        "content": "attribution",
        "model": graph.model,
        "prompt": graph.prompt,
        "n_nodes": int(graph.pruned.nodes.sum()),
        "n_edges": int(graph.pruned.edges.sum()),
        "replacement": graph.replacement,
        "completeness": graph.completeness,
    }
    write_manifest(folder, "circuit", summary)
    return folder
