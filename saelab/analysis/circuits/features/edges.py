"""Edges between kept nodes of a feature circuit: gradient of the later node along the direct path, times the change.

``w(u -> d) = dm/dd (dd/du) (u' - u)``, where only the direct path from u to d counts: every site between them that has
an SAE is held fixed. One forward pass makes the activation at each site a leaf of its own, which cuts all paths that
pass through another site; a backward pass from a later node's value then gives its edges from all earlier sites at
once. The read-off of an active latent is linear in its activation; an inactive latent has no gradient, so no edges.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.analysis.circuits.features.effects import Effects, FeatureRunner
from saelab.analysis.circuits.nodes import NodeAddress, SiteDictionary

OUTPUT = NodeAddress("logits", None, 0)
"""The metric, as a node."""
EdgeWeights = dict[tuple[NodeAddress, NodeAddress], float]


def feature_edges(
    runner: FeatureRunner, effects: Effects, nodes: Sequence[NodeAddress], threshold: float
) -> EdgeWeights:
    """Weights of the direct edges among nodes and to the metric, mean over prompts, above a threshold in magnitude."""
    incoming, leaves, total = _leaves(runner)
    order = [d.site for d in runner.dictionaries]
    found: EdgeWeights = {}
    targets = [node for node in nodes if node.site in order]
    for n, node in enumerate([*targets, OUTPUT]):
        last = n == len(targets)
        later = order if last else order[: order.index(node.site)]
        if not later:
            continue
        if last:
            gradients = torch.autograd.grad(
                total, [leaves[s] for s in later], retain_graph=True, materialize_grads=True
            )
        else:
            direction = _read_direction(runner, effects, node)
            gradients = torch.autograd.grad(
                incoming[node.site],
                [leaves[s] for s in later],
                direction.to(incoming[node.site].dtype),
                retain_graph=True,
                materialize_grads=True,
            )
        for site, gradient in zip(later, gradients, strict=True):
            for source in (u for u in nodes if u.site == site):
                weight = _weight(runner, source, gradient.float())
                if abs(weight) > threshold:
                    found[source, node] = weight
    return found


def _leaves(runner: FeatureRunner) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Run with a leaf at every site: what comes in (from earlier leaves), the leaves, the summed metric."""
    incoming: dict[str, Tensor] = {}
    leaves: dict[str, Tensor] = {}

    def cut(site: str) -> Any:
        def visit(x: Tensor) -> Tensor:
            incoming[site] = x
            leaves[site] = x.detach().clone().requires_grad_()
            return leaves[site]

        return visit

    with torch.enable_grad():
        logits = runner.logits({d.site: cut(d.site) for d in runner.dictionaries}, grad=True)
        total = runner.metric(logits).sum()
    return incoming, leaves, total


def _dictionary(runner: FeatureRunner, site: str) -> SiteDictionary:
    return next(d for d in runner.dictionaries if d.site == site)


def _at(runner: FeatureRunner, node: NodeAddress) -> Float[Tensor, "b t 1"]:
    where = runner.valid
    if node.position is None:
        return where
    only = torch.zeros_like(where)
    only[:, node.position] = where[:, node.position]
    return only


def _read_direction(runner: FeatureRunner, effects: Effects, node: NodeAddress) -> Float[Tensor, "b t d"]:
    """Gradient of ``dm/dd * d`` with respect to the activation at the node's site."""
    d = _dictionary(runner, node.site)
    gradient = effects.sites[node.site].gradient
    active = (runner.clean[node.site].latents > 0).float()
    if node.index == "error":
        # The error is x minus what the latents explain of it: what of the gradient the active latents do not pass on.
        passed = ((gradient @ d.rows.T) * active) @ d.reads
        return (gradient - passed) * _at(runner, node)
    slope = gradient @ d.rows[node.index] * active[..., node.index]
    return slope[..., None] * d.reads[node.index] * _at(runner, node)


def _weight(runner: FeatureRunner, node: NodeAddress, gradient: Float[Tensor, "b t d"]) -> float:
    """Inner product of a node's change with a gradient at its site, mean over prompts."""
    d, clean, other = _dictionary(runner, node.site), runner.clean[node.site], runner.other[node.site]
    if node.index == "error":
        terms = ((other.error - clean.error) * gradient).sum(-1, keepdim=True)
    else:
        change = other.latents[..., node.index] - clean.latents[..., node.index]
        terms = (change * (gradient @ d.rows[node.index]))[..., None]
    return float((terms * _at(runner, node)).double().sum()) / len(runner.batch)
