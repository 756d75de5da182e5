"""Edge attribution patching: all edges' effects from gradients.

EAP (Syed, Rager, Conmy 2023, arXiv 2310.10348): ``score(w -> r) = (other_w - clean_w) . dm/d(input of r)``, summed over
positions and width, mean over prompts; two forward passes and one backward. EAP-IG (Hanna, Pezzelle, Belinkov 2024,
arXiv 2403.17806) averages the gradient over runs whose embeddings lie between the two runs'; here at the midpoints
``(k + 1/2) / steps``, whose error is of second order (the authors' code takes left endpoints). A score predicts
``m(edge removed) - m(model)``, sign included.
"""

import time

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saelab.analysis.circuits.graph import EdgeGraph
from saelab.analysis.circuits.metrics import at_readout
from saelab.analysis.circuits.run import EdgeRunner
from saelab.analysis.circuits.scores import EdgeScores
from saelab.core.errors import ConfigError


def eap(runner: EdgeRunner, steps: int = 1) -> EdgeScores:
    """EAP for ``steps = 1``, where the gradient is the clean run's; EAP-IG with that many midpoints above."""
    if steps < 1:
        raise ConfigError(f"steps is {steps}, expected at least 1")
    if steps == 1 and runner.setting.metric == "kl":
        raise ConfigError("the gradient of kl is zero at the clean run: take EAP-IG or another metric")
    began = time.perf_counter()
    shares = [0.0] if steps == 1 else [(k + 0.5) / steps for k in range(steps)]
    total = np.zeros(runner.graph.valid.shape)
    for share in shares:
        total += edge_gradients(runner, share)
    scores = np.where(runner.graph.valid, total / len(shares), np.nan)
    nodes = runner.graph.node_scores(np.nan_to_num(scores))
    method = "eap" if steps == 1 else "eap-ig"
    seconds = time.perf_counter() - began
    return EdgeScores(method, runner.graph, runner.setting, scores, nodes, seconds, len(runner.batch), {"steps": steps})


def edge_gradients(runner: EdgeRunner, share: float) -> Float[np.ndarray, "r w"]:
    """First-order effect of each edge, by gradients ``share`` of the way from the clean to the other embeddings."""
    graph, n = runner.graph, runner.graph.n_embeddings
    start = (runner.clean[:n] + share * (runner.other[:n] - runner.clean[:n])).requires_grad_()
    inputs: dict[tuple[int, str], Tensor] = {}
    with torch.enable_grad():
        logits = runner.forward(runner.batch.clean, embeddings=start, inputs=inputs)
        metric = runner.metric(at_readout(logits, runner.batch.readout)).double().mean()
        gradients = torch.autograd.grad(metric, list(inputs.values()), allow_unused=True)
    step = (runner.other - runner.clean) * runner.where
    return _contract(graph, step, dict(zip(inputs, gradients, strict=True)))


def _contract(
    graph: EdgeGraph, step: Float[Tensor, "w b t d"], gradients: dict[tuple[int, str], Tensor | None]
) -> Float[np.ndarray, "r w"]:
    """Inner products of writers' changes and readers' gradients."""
    scores = np.zeros(graph.valid.shape)
    for (layer, slot), gradient in gradients.items():
        if gradient is None:
            continue
        where = graph.slots(layer, slot)
        used = graph.readers[where.start].n_writers
        found = gradient.flatten(1).double() @ step[:used].flatten(1).double().T
        scores[where, :used] = found.cpu().numpy()
    return scores
