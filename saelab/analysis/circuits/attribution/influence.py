"""Influence of nodes on the logits, and pruning by it.

With ``N`` the absolute adjacency, rows (targets) divided by their sums, and ``v0`` the logits' probabilities on their
rows, ``influence = v0 N + v0 N^2 + ...``, which ends because the graph has no cycles. Absolute values are taken, so
paths that cancel each other look important.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64


def normalised(adjacency: Float[np.ndarray, "n n"]) -> Float64[np.ndarray, "n n"]:
    """Absolute adjacency (target, source) with rows that sum to 1 (or to 0)."""
    size = np.abs(adjacency).astype(np.float64)
    shares: np.ndarray = size / np.maximum(size.sum(1, keepdims=True), 1e-10)
    return shares


def influence(adjacency: Float[np.ndarray, "n n"], weights: Float[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """Influence of every node on the nodes with ``weights`` (the logits' probabilities), over all paths."""
    shares = normalised(adjacency)
    step = weights.astype(np.float64) @ shares
    total = np.zeros(len(weights))
    for _ in range(len(weights) + 1):
        if not step.any():
            return total
        total += step
        step = step @ shares
    raise AssertionError("the graph has a cycle")


@dataclass(frozen=True, eq=False)
class Pruned:
    """What is left of a graph."""

    nodes: Bool[np.ndarray, " n"]
    edges: Bool[np.ndarray, "n n"]


def prune(
    adjacency: Float[np.ndarray, "n n"],
    weights: Float[np.ndarray, " n"],
    keep: Bool[np.ndarray, " n"],
    *,
    node_threshold: float = 0.8,
    edge_threshold: float = 0.98,
) -> Pruned:
    """Keep the smallest set of nodes, then of edges, that holds these shares of all influence.

    ``keep`` marks nodes that stay whatever their influence (tokens and logits). Afterwards nodes without edges out, or
    (other than tokens and errors, which have none) without edges in, go, until nothing changes.
    """
    found = influence(adjacency, weights)
    nodes = _top_share(found, node_threshold) | keep
    inside = adjacency * nodes[:, None] * nodes[None]
    score = normalised(inside) * (influence(inside, weights) + weights)[:, None]
    edges = _top_share(score.ravel(), edge_threshold).reshape(score.shape) & (inside != 0)
    can_have_inputs = (adjacency != 0).any(1)
    while True:
        used = edges.any(0) | keep
        fed = edges.any(1) | keep | ~can_have_inputs
        left = nodes & used & fed
        if (left == nodes).all():
            return Pruned(nodes, edges)
        nodes = left
        edges = edges & nodes[:, None] & nodes[None]


def _top_share(values: Float[np.ndarray, " n"], share: float) -> Bool[np.ndarray, " n"]:
    """Smallest set of the largest values that holds a share of their sum; with share 1, all that are not 0."""
    if share >= 1:
        return values > 0
    order = np.argsort(-values, kind="stable")
    total = np.cumsum(values[order])
    chosen = np.zeros(len(values), bool)
    if total[-1] > 0:
        chosen[order[: int(np.searchsorted(total, share * total[-1])) + 1]] = True
    return chosen


def graph_scores(
    adjacency: Float[np.ndarray, "n n"],
    weights: Float[np.ndarray, " n"],
    tokens: Bool[np.ndarray, " n"],
    errors: Bool[np.ndarray, " n"],
) -> tuple[float, float]:
    """(replacement, completeness): how much of the influence comes from tokens and not errors, end to end and per node.

    ``replacement = tokens' influence / (tokens' + errors' influence)``; completeness is the mean share of a node's
    inputs that are no errors, nodes weighted by influence. Both are 0 when everything comes from errors.
    """
    found = influence(adjacency, weights)
    ends = found[tokens].sum() + found[errors].sum()
    share = normalised(adjacency)[:, errors].sum(1)
    has_inputs = (adjacency != 0).any(1)
    size = (found + weights) * has_inputs
    replacement = float(found[tokens].sum() / ends) if ends > 0 else 0.0
    return replacement, float(1 - (size * share).sum() / size.sum()) if size.sum() > 0 else 0.0
