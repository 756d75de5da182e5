"""Build the attribution graph of one prompt: nodes, adjacency, influence, pruning."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.analysis.circuits.attribution.frozen import FrozenModel, TranscoderSite
from saelab.analysis.circuits.attribution.influence import Pruned, graph_scores, influence, prune
from saelab.core.errors import TextError
from saelab.core.progress import progress
from saelab.core.result import Result
from saelab.models.components import Components

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

Kind = Literal["feature", "error", "token", "logit"]
TARGETS_AT_ONCE = 32


@dataclass(frozen=True)
class GraphNode:
    """A node of an attribution graph."""

    kind: Kind
    layer: int
    """Layer of a latent or error; -1 for tokens, the number of layers for logits."""
    position: int
    index: int
    """Latent, token id of the prompt, or token id of a logit; 0 for errors."""
    activation: float
    """Activation of a latent in raw units of its transcoder, probability of a logit, else 0."""

    def __str__(self) -> str:
        return f"{self.kind}/{self.layer}/{self.position}/{self.index}"


@dataclass(frozen=True, eq=False, repr=False)
class AttributionGraph(Result):
    """The graph of one prompt."""

    model: str
    prompt: str
    tokens: tuple[int, ...]
    token_texts: tuple[str, ...]
    logit_texts: tuple[str, ...]
    nodes: tuple[GraphNode, ...]
    adjacency: Float[np.ndarray, "n n"]
    """``[target, source]``: what the source adds to the target's pre-activation (or centred logit)."""
    influence: Float[np.ndarray, " n"]
    """Share of the influence on the chosen logits, over all paths."""
    pruned: Pruned
    replacement: float
    """Share of the end-to-end influence that comes from tokens and not from transcoder errors."""
    completeness: float
    """Mean share of a node's inputs that are no errors, weighted by influence."""
    constants: Float[np.ndarray, " n"]
    """What biases add to each target: row sum + constant = pre-activation (or centred logit)."""
    settings: dict[str, Any]

    def to_frame(self, pruned: bool = True) -> "pd.DataFrame":
        """One row for each node, largest influence first."""
        import pandas as pd

        frame = pd.DataFrame(
            {
                "node": [str(node) for node in self.nodes],
                "kind": [node.kind for node in self.nodes],
                "layer": [node.layer for node in self.nodes],
                "token": [self.token_texts[node.position] for node in self.nodes],
                "activation": [node.activation for node in self.nodes],
                "influence": self.influence,
            }
        )
        frame = frame[self.pruned.nodes] if pruned else frame
        return frame.sort_values("influence", ascending=False, kind="stable").reset_index(drop=True)

    def __repr__(self) -> str:
        kept = int(self.pruned.nodes.sum())
        return (
            f"AttributionGraph({self.prompt!r}: {kept} of {len(self.nodes)} nodes, replacement {self.replacement:.3f}, "
            f"completeness {self.completeness:.3f})"
        )

    def figures(self) -> "dict[str, tuple[Figure, pd.DataFrame]]":
        """The pruned graph."""
        from saelab.analysis.circuits.attribution.export import attribution_figure

        return {"graph": attribution_figure(self)}


def attribution_graph(
    parts: Components,
    tokens: Int[Tensor, " t"],
    transcoders: Mapping[int, TranscoderSite],
    *,
    prompt: str = "",
    logit_share: float = 0.95,
    most_logits: int = 10,
    most_features: int = 4000,
    node_threshold: float = 0.8,
    edge_threshold: float = 0.98,
) -> AttributionGraph:
    """Attribute the next token's logits, at the last position, to latents, errors and tokens.

    1. Run the prompt; hold patterns and scales; encode every MLP's input (:class:`FrozenModel`).
    2. Nodes: tokens, errors, active latents, and the fewest logits with ``logit_share`` of the probability.
    3. Rows of the logits' edges; then those of the latents with the largest influence seen so far, batch by batch,
       until ``most_features`` latents have theirs (the others keep their edges out but get none in).
    4. Influence, pruning, scores.
    """
    if tokens.numel() < 1:
        raise TextError("the prompt is empty")
    frozen = FrozenModel(parts, tokens[None], transcoders)
    nodes = _nodes(frozen, logit_share, most_logits)
    sources = _Sources(frozen, nodes)
    n = len(nodes)
    adjacency, constants = np.zeros((n, n), np.float64), np.zeros(n)
    weights = np.array([node.activation if node.kind == "logit" else 0.0 for node in nodes])
    logits = [i for i, node in enumerate(nodes) if node.kind == "logit"]
    waiting = {i for i, node in enumerate(nodes) if node.kind == "feature"}
    budget = min(most_features, len(waiting))
    with progress("attributing", budget + len(logits), unit="nodes") as bar:
        batch = logits
        while batch:
            rows, offsets = sources.rows(batch)
            adjacency[batch], constants[batch] = rows, offsets
            bar.advance(len(batch))
            if not budget:
                break
            seen = influence(adjacency, weights)
            batch = sorted(waiting, key=lambda i: -seen[i])[: min(TARGETS_AT_ONCE, budget)]
            waiting.difference_update(batch)
            budget -= len(batch)
    kinds = np.array([node.kind for node in nodes])
    keep: Bool[np.ndarray, " n"] = (kinds == "token") | (kinds == "logit")
    scores = graph_scores(adjacency, weights, kinds == "token", kinds == "error")
    settings = {"logit_share": logit_share, "most_logits": most_logits, "most_features": most_features,
                "node_threshold": node_threshold, "edge_threshold": edge_threshold}  # fmt: skip
    return AttributionGraph(
        model=parts.model.name,
        prompt=prompt,
        tokens=tuple(tokens.tolist()),
        token_texts=tuple(token_text(parts, int(t)) for t in tokens),
        logit_texts=tuple(token_text(parts, nodes[i].index) for i in logits),
        nodes=tuple(nodes),
        adjacency=adjacency,
        influence=influence(adjacency, weights),
        pruned=prune(adjacency, weights, keep, node_threshold=node_threshold, edge_threshold=edge_threshold),
        replacement=scores[0],
        completeness=scores[1],
        constants=constants,
        settings=settings,
    )


def token_text(parts: Components, token: int) -> str:
    """A token as text, or its number for models without a tokenizer."""
    from saelab.core.errors import ModelError

    try:
        return str(parts.model.tokenizer.decode([token]))
    except ModelError:
        return str(token)


def _nodes(frozen: FrozenModel, share: float, most: int) -> list[GraphNode]:
    """Tokens, then errors, then active latents, then logits; a layer without active latents is no special case."""
    t, layers = frozen.embedding.shape[0], frozen.parts.n_layers
    ids = frozen.tokens[0].tolist()
    found = [GraphNode("token", -1, p, ids[p], 0.0) for p in range(t)]
    found += [GraphNode("error", layer, p, 0, 0.0) for layer in range(layers) for p in range(t)]
    for layer, code in enumerate(frozen.codes):
        for p, i in code.nonzero().tolist():
            found.append(GraphNode("feature", layer, p, i, float(code[p, i]) / frozen.scale_of(layer)))
    probabilities = frozen.logits[-1].float().softmax(-1)
    best = probabilities.sort(descending=True)
    n = min(most, int((best.values.cumsum(0) < share).sum()) + 1)
    found += [GraphNode("logit", layers, t - 1, int(best.indices[i]), float(best.values[i])) for i in range(n)]
    return found


class _Sources:
    """Everything that writes, as vectors, and the rows of the adjacency that they give."""

    def __init__(self, frozen: FrozenModel, nodes: list[GraphNode]) -> None:
        self.frozen, self.nodes = frozen, nodes
        self.vectors = torch.stack([self._vector(node) for node in nodes])
        site = [0 if node.kind == "token" else min(node.layer, frozen.parts.n_layers - 1) + 1 for node in nodes]
        self.sites, self.places = torch.tensor(site), torch.tensor([node.position for node in nodes])
        self.writing = torch.tensor([node.kind != "logit" for node in nodes])
        weight, bias = frozen.parts.head
        self.mean = weight.mean(0)
        self.unembedding, self.bias = weight, bias

    def _vector(self, node: GraphNode) -> Float[Tensor, " d"]:
        """What a source writes to the residual stream."""
        frozen = self.frozen
        if node.kind == "token":
            return frozen.embedding[node.position]
        if node.kind == "error":
            return frozen.errors[node.layer][node.position]
        if node.kind == "feature":
            return frozen.codes[node.layer][node.position, node.index] * frozen.writes(node.layer)[node.index]
        return torch.zeros_like(frozen.embedding[0])

    def direction(self, node: GraphNode) -> Float[Tensor, " d"]:
        """Read vector of a target: an encoder row, or an unembedding row minus the mean one."""
        if node.kind == "logit":
            return self.unembedding[node.index] - self.mean
        return self.frozen.reads(node.layer)[node.index]

    def rows(self, targets: list[int]) -> tuple[Float[np.ndarray, "k n"], Float[np.ndarray, " k"]]:
        """Edges of some targets from all sources, and what biases add to them."""
        chosen = [self.nodes[i] for i in targets]
        layers = torch.tensor([node.layer for node in chosen])
        places = torch.tensor([node.position for node in chosen])
        directions = torch.stack([self.direction(node) for node in chosen])
        gradient = self.frozen.gradients(layers, places, directions)
        found = torch.einsum("nd,nkd->kn", self.vectors, gradient[self.sites, :, self.places]) * self.writing
        rows = found.double().cpu().numpy()
        values = np.array([self._value(node) for node in chosen])
        return rows, values - rows.sum(1)

    def _value(self, node: GraphNode) -> float:
        """Pre-activation (of its read-off alone, in activation units) or centred logit of a target."""
        frozen = self.frozen
        if node.kind == "logit":
            logits = frozen.logits[node.position].double()
            return float(logits[node.index] - logits.mean())
        t = frozen.transcoders[node.layer]
        x = t.input(frozen.parts.layers[node.layer].norm2, frozen.before[node.layer][node.position])
        return float(x.double() @ frozen.reads(node.layer)[node.index].double())
