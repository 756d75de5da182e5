"""The local replacement model: MLPs are transcoder latents and an error, attention patterns and norm scales are held.

Ameisen et al. 2025 ("Circuit Tracing"); the steps are those of the circuit-tracer library. On one prompt, with patterns
and scales at their values and every MLP's output a constant (plus a transcoder's linear skip path), the model is linear
from what is written to the residual stream to what is read: the input of each MLP and the logits. A gradient through
that linear model is therefore not an approximation but the edge itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.analysis.circuits.attention import LayerState, layer_states
from saelab.core.errors import ConfigError
from saelab.features.protocols import Dictionary
from saelab.models.components import Components, Norm


@dataclass(frozen=True)
class TranscoderSite:
    """A transcoder and where it reads."""

    transcoder: Dictionary
    reads: Literal["normalised", "standardised", "residual"]
    """``normalised``: what the MLP reads (``ln2.hook_out``); ``standardised``: the same before the norm's weight and
    bias (``ln2.hook_normalized``); ``residual``: before the norm (``hook_resid_mid``)."""

    def sees(self, norm: Norm, residual: Float[Tensor, "*n d"], scale: Tensor) -> Float[Tensor, "*n d"]:
        """Linear part of what the transcoder sees of the residual stream before the MLP's norm."""
        if self.reads == "residual":
            return residual
        return norm.linear(residual, scale) if self.reads == "normalised" else norm.centre(residual) / scale

    def input(self, norm: Norm, residual: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """What the transcoder sees in the running model."""
        if self.reads == "normalised":
            return norm(residual)
        return self.sees(norm, residual, norm.scale(residual))


class FrozenModel:
    """The local replacement model of one prompt (one row of T tokens)."""

    def __init__(
        self, parts: Components, tokens: Int[Tensor, "1 t"], transcoders: Mapping[int, TranscoderSite]
    ) -> None:
        missing = [layer for layer in range(parts.n_layers) if layer not in transcoders]
        if missing:
            raise ConfigError(
                f"an attribution graph needs a transcoder for every MLP; none was given for layer {missing[0]} "
                f"(of {parts.n_layers})"
            )
        self.parts, self.tokens = parts, tokens
        self.transcoders = dict(transcoders)
        with torch.no_grad():
            self.states: list[LayerState] = layer_states(parts, tokens)
            self._hold()

    def _hold(self) -> None:
        """Values, scales, codes and errors of the prompt."""
        parts = self.parts
        self.embedding: Float[Tensor, "t d"] = sum(parts.embed(self.tokens).values(), torch.zeros(()))[0]
        self.before: list[Tensor] = []
        """Residual stream that each MLP reads, before its norm."""
        self.codes: list[Tensor] = []
        """Dense codes (T, F), in the transcoder's units."""
        self.errors: list[Tensor] = []
        """What the MLP adds and the transcoder does not (T, d)."""
        self.scales1, self.scales2 = [], []
        for n, layer in enumerate(parts.layers):
            state, t = self.states[n], self.transcoders[n]
            before = (state.residual if parts.parallel else state.residual + state.attention)[0]
            self.before.append(before)
            self.scales1.append(layer.norm1.scale(state.residual[0]))
            self.scales2.append(layer.norm2.scale(before))
            x = t.input(layer.norm2, before)
            full: Any = t.transcoder
            self.codes.append(t.transcoder.encode(x.float()).positive().to_dense())
            self.errors.append(state.mlp[0] - full(x.float()))
        final = self.states[-1].residual[0] + self.states[-1].attention[0] + self.states[-1].mlp[0]
        self.final_scale = parts.final_norm.scale(final)
        self.logits: Float[Tensor, "t v"] = parts.unembed(final)

    def scale_of(self, layer: int) -> float:
        """``input_scale`` of a transcoder."""
        return float(getattr(self.transcoders[layer].transcoder, "input_scale", 1.0))

    def writes(self, layer: int) -> Float[Tensor, "f d"]:
        """What one unit of each latent adds to the residual stream."""
        return self.transcoders[layer].transcoder.W_dec.detach() / self.scale_of(layer)

    def reads(self, layer: int) -> Float[Tensor, "f d"]:
        """Gradient of each latent's pre-activation with respect to what its transcoder reads."""
        return self.transcoders[layer].transcoder.W_enc.detach().T * self.scale_of(layer)

    def forward(
        self, writes: Float[Tensor, "sites k t d"]
    ) -> tuple[list[Float[Tensor, "k t d"]], Float[Tensor, "k t d"]]:
        """Linear part of the model: what the MLPs' transcoders and the final norm see of things written.

        ``writes[0]`` is added to the embeddings and ``writes[1 + layer]`` to the MLP's output; biases are left out.
        Returns the transcoders' inputs and the final norm's output.
        """
        parts = self.parts
        residual = writes[0]
        seen = []
        for n, layer in enumerate(parts.layers):
            x = layer.norm1.linear(residual, self.scales1[n])
            v = torch.einsum("ktd,hde->khte", x, layer.W_V.repeat_interleave(layer.group, 0))
            z = torch.einsum("hts,khse->khte", self.states[n].pattern[:, 0], v)
            middle = residual + torch.einsum("khte,hed->ktd", z, layer.W_O)
            before = residual if parts.parallel else middle
            t = self.transcoders[n]
            x = t.sees(layer.norm2, before, self.scales2[n])
            seen.append(x)
            skip = getattr(t.transcoder, "W_skip", None)
            residual = middle + writes[1 + n]
            if skip is not None:
                residual = residual + x @ skip.detach()
        return seen, _linear(parts.final_norm, residual, self.final_scale)

    def gradients(
        self, layers: Int[Tensor, " k"], positions: Int[Tensor, " k"], directions: Float[Tensor, "k d"]
    ) -> Float[Tensor, "sites k t d"]:
        """Gradient of k targets with respect to everything written.

        Target i is ``directions[i]`` times what the transcoder of ``layers[i]`` (or, for ``n_layers``, the unembedding)
        sees at ``positions[i]``.
        """
        k, (t, d) = len(layers), self.embedding.shape
        leaf = self.embedding.new_zeros(self.parts.n_layers + 1, k, t, d).requires_grad_()
        with torch.enable_grad():
            seen, final = self.forward(leaf)
            stacked = torch.stack([*seen, final])
            rows = torch.arange(k)
            value = (stacked[layers, rows, positions] * directions).sum()
            return torch.autograd.grad(value, leaf)[0]


def _linear(norm: Norm, x: Float[Tensor, "k t d"], scale: Tensor) -> Float[Tensor, "k t d"]:
    return norm.linear(x, scale)
