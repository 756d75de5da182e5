"""Recursive DFA: from a latent of an attention SAE down to the tokens, as a tree whose parts sum to their parent.

A latent at position t is a sum over source positions s (:mod:`saelab.analysis.circuits.attention`). What a source gives
is linear in the residual stream at s, with attention pattern and norm scale held, and the residual stream is a sum of
embeddings, earlier attention layers (latents and error of their SAE, or heads) and MLPs (latents and error of their
transcoder, or whole), and biases. Earlier attention latents are expanded in turn.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.analysis.circuits.attention import LayerState, constant, layer_states, read_direction
from saelab.analysis.circuits.attribution.frozen import TranscoderSite
from saelab.features.protocols import Dictionary
from saelab.models.components import Components


@dataclass(frozen=True)
class TreeNode:
    """A part of its parent's value."""

    kind: str
    """``latent``, ``source``, ``embed``, ``pos``, ``attention latent``, ``attention error``, ``head``, ``mlp``,
    ``mlp latent``, ``mlp error``, ``bias``."""
    label: str
    value: float
    """What it adds to the parent's value (the root: the latent's pre-activation)."""
    layer: int | None = None
    position: int | None = None
    index: int | None = None
    children: tuple["TreeNode", ...] = field(default=())
    """Parts that sum to ``total``; empty where the tree ends."""
    total: float | None = None
    """What the children sum to: the latent's own pre-activation, not scaled by its share in the parent."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "children": [child.to_dict() for child in self.children]}

    def lines(self, indent: int = 0) -> list[str]:
        """The tree as indented text."""
        own = f"{'  ' * indent}{self.value:+9.4f}  {self.label}"
        return [own, *(line for child in self.children for line in child.lines(indent + 1))]


class TreeBuilder:
    """Builds trees on one prompt."""

    def __init__(
        self,
        parts: Components,
        tokens: Int[Tensor, "1 t"],
        attention_saes: Mapping[int, Dictionary],
        transcoders: Mapping[int, TranscoderSite] | None = None,
        *,
        n_parts: int = 8,
        n_sources: int = 2,
    ) -> None:
        """``n_parts`` largest parts and ``n_sources`` sources are shown one by one, the others as one sum."""
        self.parts, self.tokens = parts, tokens
        self.saes, self.transcoders = dict(attention_saes), dict(transcoders or {})
        self.states: list[LayerState] = layer_states(parts, tokens)
        self.n_parts, self.n_sources = n_parts, n_sources
        self._codes = {
            layer: sae.encode(self.states[layer].z[0].float()).to_dense() for layer, sae in self.saes.items()
        }
        self._mlp_codes = {
            layer: t.transcoder.encode(self._mlp_input(layer)).to_dense() for layer, t in self.transcoders.items()
        }

    @torch.no_grad()
    def latent(self, layer: int, position: int, feature: int, depth: int = 2) -> TreeNode:
        """Tree of a latent's pre-activation at a position; ``depth`` levels of latents are expanded."""
        sae, state = self.saes[layer], self.states[layer]
        reads = read_direction(sae, feature, self.parts.n_heads)
        weights = state.pattern[:, 0, position, : position + 1]
        terms = (weights * torch.einsum("hse,he->hs", state.values[:, 0, : position + 1].float(), reads)).sum(0)
        bias = constant(sae, feature)
        order = terms.abs().argsort(descending=True).tolist()
        children = [
            self._source(layer, s, weights[:, s], reads, float(terms[s]), depth) for s in order[: self.n_sources]
        ]
        rest = float(terms.double().sum() - sum(terms[s].double() for s in order[: self.n_sources]))
        if len(order) > self.n_sources:
            children.append(TreeNode("source", f"{len(order) - self.n_sources} other sources", rest))
        children.append(TreeNode("bias", "encoder bias", bias))
        value = float(terms.double().sum()) + bias
        label = f"attention {layer} latent {feature} at {position}"
        return TreeNode("latent", label, value, layer, position, feature, tuple(children), value)

    def _source(  # noqa: PLR0917
        self, layer: int, s: int, weights: Float[Tensor, " h"], reads: Float[Tensor, "h e"], value: float, depth: int
    ) -> TreeNode:
        """Expand what a latent reads at one source position."""
        block, state = self.parts.layers[layer], self.states[layer]
        # Gradient of the latent with respect to the value input at s.
        W_V = block.W_V.repeat_interleave(block.group, 0)
        direction = torch.einsum("h,hde,he->d", weights, W_V, reads)
        scale = block.norm1.scale(state.residual[0, s])

        def term(x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
            return block.norm1.linear(x, scale) @ direction

        named = self._residual_parts(layer, s)
        values = term(torch.stack([vector for _, vector in named])).double()
        constants = torch.einsum("h,he,he->", weights, block.b_V.repeat_interleave(block.group, 0), reads)
        if block.norm1.bias is not None:
            constants = constants + block.norm1.bias @ direction
        children = [_leaf(node, float(v)) for (node, _), v in zip(named, values, strict=True)]
        children.sort(key=lambda child: -abs(child.value))
        shown, rest = children[: self.n_parts], children[self.n_parts :]
        shown = [self._expand(child, depth) for child in shown]
        if rest:
            shown.append(TreeNode("bias", f"{len(rest)} other parts", sum(child.value for child in rest)))
        shown.append(TreeNode("bias", "value and norm biases", float(constants)))
        return TreeNode("source", f"source {s}", value, layer, s, None, tuple(shown), value)

    def _expand(self, node: TreeNode, depth: int) -> TreeNode:
        if node.kind != "attention latent" or depth < 2:
            return node
        assert node.layer is not None, "a latent without a layer"
        assert node.position is not None, "a latent without a position"
        assert node.index is not None, "a latent without a number"
        below = self.latent(node.layer, node.position, node.index, depth - 1)
        label = f"{node.label} = {below.value:.4f} times its write"
        return TreeNode(
            node.kind, label, node.value, node.layer, node.position, node.index, below.children, below.value
        )

    def _residual_parts(self, layer: int, s: int) -> list[tuple[TreeNode, Float[Tensor, " d"]]]:
        """Everything that has written to the residual stream at s before a block."""
        found: list[tuple[TreeNode, Tensor]] = []
        for name, vector in self.parts.embed(self.tokens).items():
            found.append((TreeNode(name, f"{name} at {s}", 0.0, position=s), vector[0, s]))
        for below in range(layer):
            found += self._attention_parts(below, s)
            found += self._mlp_parts(below, s)
        return found

    def _mlp_input(self, layer: int) -> Float[Tensor, "t d"]:
        """What the transcoder of a layer sees."""
        state = self.states[layer]
        before = state.residual if self.parts.parallel else state.residual + state.attention
        return self.transcoders[layer].input(self.parts.layers[layer].norm2, before[0]).float()

    def _attention_parts(self, layer: int, s: int) -> list[tuple[TreeNode, Float[Tensor, " d"]]]:
        block, state = self.parts.layers[layer], self.states[layer]
        z = state.z[0, s]
        bias = TreeNode("bias", f"attention {layer} bias", 0.0, layer, s)
        if layer not in self.saes:
            heads = torch.einsum("he,hed->hd", z.view(self.parts.n_heads, -1), block.W_O)
            nodes = [(TreeNode("head", f"head {layer}.{h} at {s}", 0.0, layer, s, h), v) for h, v in enumerate(heads)]
            return [*nodes, (bias, block.b_O)]
        sae, W_O = self.saes[layer], block.W_O.flatten(0, 1)
        code = self._codes[layer][s]
        found = []
        scale = float(getattr(sae, "input_scale", 1.0))
        for i in code.nonzero()[:, 0].tolist():
            node = TreeNode("attention latent", f"attention {layer} latent {i} at {s}", 0.0, layer, s, i)
            found.append((node, (code[i] * sae.W_dec[i] / scale) @ W_O))
        rebuilt = sae.decode(sae.encode(z[None].float()))[0]
        found.append(
            (TreeNode("attention error", f"attention {layer} error at {s}", 0.0, layer, s), (z - rebuilt) @ W_O)
        )
        offset = (rebuilt - (code / scale) @ sae.W_dec) @ W_O
        return [*found, (bias, offset + block.b_O)]

    def _mlp_parts(self, layer: int, s: int) -> list[tuple[TreeNode, Float[Tensor, " d"]]]:
        out = self.states[layer].mlp[0, s]
        if layer not in self.transcoders:
            return [(TreeNode("mlp", f"MLP {layer} at {s}", 0.0, layer, s), out)]
        transcoder, code = self.transcoders[layer].transcoder, self._mlp_codes[layer][s]
        scale = float(getattr(transcoder, "input_scale", 1.0))
        found = []
        for i in code.nonzero()[:, 0].tolist():
            node = TreeNode("mlp latent", f"MLP {layer} latent {i} at {s}", 0.0, layer, s, i)
            found.append((node, code[i] * transcoder.W_dec[i] / scale))
        written = (code / scale) @ transcoder.W_dec
        full: Any = transcoder
        rebuilt = full(self._mlp_input(layer)[s : s + 1])[0]
        found.append((TreeNode("mlp error", f"MLP {layer} error at {s}", 0.0, layer, s), out - rebuilt))
        return [*found, (TreeNode("bias", f"MLP {layer} bias", 0.0, layer, s), rebuilt - written)]


def _leaf(node: TreeNode, value: float) -> TreeNode:
    return TreeNode(node.kind, node.label, value, node.layer, node.position, node.index)
