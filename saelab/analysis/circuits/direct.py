"""Direct attribution of the answer to heads and MLPs, and of a head's share to the positions it read (DFA).

With the final norm's scale held, the difference between the mean right and the mean wrong logit at the readout is a sum
over the writers, ``g . out_w``, plus a constant; with the attention pattern held, a head's term is a sum over source
positions: ``g . (A[t, s] v_s W_O)``. No interventions: it sees only what is written for the answer directly.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.analysis.circuits.graph import EdgeGraph
from saelab.analysis.circuits.scores import EdgeScores
from saelab.analysis.circuits.tasks import TaskBatch
from saelab.models.components import Components


@dataclass(frozen=True, eq=False)
class DirectAttribution:
    """Direct terms of the answer's logit difference, per prompt."""

    graph: EdgeGraph
    writers: Float[Tensor, "w n"]
    """Term of each writer."""
    sources: Float[Tensor, "h n s"]
    """Terms of each head (in the order of ``graph.heads``) by source position."""
    constant: Float[Tensor, " n"]
    """What the biases give."""
    total: Float[Tensor, " n"]
    """Mean right logit - mean wrong logit of the model."""


@torch.no_grad()
def direct_attribution(parts: Components, tokens: Int[Tensor, "n t"], batch: TaskBatch) -> DirectAttribution:
    """Split the answer's logit difference of each prompt over writers and, for heads, source positions."""
    graph = EdgeGraph.of(parts)
    rows = torch.arange(len(batch), device=tokens.device)
    residual = torch.zeros(())
    writers: list[Tensor] = []
    per_source: list[tuple[Tensor, Tensor]] = []
    biases = torch.zeros(parts.d_model, device=tokens.device)
    for name, value in parts.embed(tokens).items():
        assert name in graph.writers, "an embedding that is no writer"
        residual = residual + value
        writers.append(value[rows, batch.readout][None])
    for layer in parts.layers:
        x = layer.norm1(residual)
        pattern, v = parts.pattern(layer, x, x), parts.values(layer, x).repeat_interleave(layer.group, 0)
        at_end = pattern[:, rows, batch.readout]
        per_source.append((at_end[..., None] * v, layer.W_O))
        writers.append(torch.einsum("hns,hnse,hed->hnd", at_end, v, layer.W_O))
        middle = residual + parts.heads(layer, pattern, parts.values(layer, x)).sum(0) + layer.b_O
        written = layer.mlp(layer.norm2(residual if parts.parallel else middle))
        writers.append(written[rows, batch.readout][None])
        residual, biases = middle + written, biases + layer.b_O
    final = residual[rows, batch.readout]
    scale, norm = parts.final_norm.scale(final), parts.final_norm
    direction, offset = answer_direction(parts, batch)

    def term(x: Tensor) -> Tensor:
        return (norm.linear(x, scale) * direction).sum(-1)

    written = torch.cat(writers)
    sources = [term(torch.einsum("hnse,hed->shnd", z, W_O)).permute(1, 2, 0) for z, W_O in per_source]
    constant = term(biases.expand_as(final)) + offset
    if norm.bias is not None:
        constant = constant + direction @ norm.bias
    total = term(final) + offset + (0 if norm.bias is None else direction @ norm.bias)
    return DirectAttribution(graph, term(written), torch.cat(sources), constant, total)


def answer_direction(parts: Components, batch: TaskBatch) -> tuple[Float[Tensor, "n d"], Float[Tensor, " n"]]:
    """Mean unembedding of the right answers minus that of the wrong ones, and the same of the unembedding's bias."""
    weight, bias = parts.head
    sides, offsets = [], []
    for answers in (batch.right, batch.wrong):
        share = (answers >= 0).to(weight) / (answers >= 0).sum(1, keepdim=True)
        sides.append((weight[answers.clamp_min(0)] * share[..., None]).sum(1))
        offsets.append((bias[answers.clamp_min(0)] * share).sum(1) if bias is not None else share.new_zeros(len(batch)))
    return sides[0] - sides[1], offsets[0] - offsets[1]


def dfa_scores(parts: Components, batch: TaskBatch) -> EdgeScores:
    """Score heads and MLPs by their direct term on clean prompts minus that on corrupted ones, mean over prompts."""
    began = time.perf_counter()
    clean = direct_attribution(parts, batch.clean, batch)
    corrupted = direct_attribution(parts, batch.corrupted, batch)
    nodes: np.ndarray = (clean.writers - corrupted.writers).double().mean(1).cpu().numpy()
    seconds = time.perf_counter() - began
    return EdgeScores("dfa", clean.graph, None, None, nodes, seconds, len(batch))
