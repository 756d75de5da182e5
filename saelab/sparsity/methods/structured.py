"""Whole neurons and heads go: what is left is a smaller dense matrix, fast on any device.

The score of a neuron (head) is the mean norm of what it adds to the residual stream over the calibration tokens,
E|a_j| ||W_out_j|| for a neuron. Which inputs of which layer belong together is a property of the layer that writes to
the residual stream: its inputs are the MLP's neurons, or the heads' outputs side by side. Heads that share keys and
values (grouped-query attention) go together.

A smaller MLP, and in Llama's kind fewer heads, can be said in a model's config, so the folder holds smaller matrices.
GPT-2's config cannot say fewer heads of the same width: there they are zeroed, and ``harvest --sparse auto`` cuts them
out of the running model.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from saelab.core.config import Config
from saelab.core.errors import ModelError
from saelab.sparsity.layers import Layer, linear_layers


class Structured(Config):
    """Drop the neurons and heads that add least; they are cut out where the model's config can say so, else zeroed."""

    name: Literal["structured"] = "structured"
    neurons: float = Field(default=0.25, ge=0, lt=1)
    """Share of each MLP's neurons that go."""
    heads: float = Field(default=0.0, ge=0, lt=1)
    """Share of each attention's heads that go."""


@dataclass(frozen=True)
class Branch:
    """One MLP or attention of one block."""

    kind: str
    """``neurons`` or ``heads``."""
    block: int
    out: Layer
    """The layer that writes to the residual stream; its inputs are the units."""
    into: tuple[Layer, ...]
    """The layers whose outputs are the units' own, so that they can shrink too."""
    unit: int
    """Inputs of ``out`` per unit: 1, or the width of the heads that share keys and values."""

    @property
    def units(self) -> int:
        """Number of units."""
        return self.out.shape[1] // self.unit


def branches(plain: nn.Module, kind: str) -> list[Branch]:
    """Find the MLPs (``neurons``) or attentions (``heads``) of a GPT-2- or Llama-like model."""
    layers = {layer.name: layer for layer in linear_layers(plain)}
    config: Any = plain.config
    found = []
    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        inside_attention = "attn" in parent.rpartition(".")[2]
        if kind == "neurons" and not inside_attention and last in ("c_proj", "down_proj", "fc_out", "fc2", "wo"):
            into = [layers[f"{parent}.{n}"] for n in INTO if f"{parent}.{n}" in layers]
            found.append(Branch(kind, layer.block, layer, tuple(into), 1))
        if kind == "heads" and inside_attention and last in ("c_proj", "o_proj", "out_proj"):
            heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
            into = [layers[f"{parent}.{n}"] for n in ATTENTION_INTO if f"{parent}.{n}" in layers]
            found.append(Branch(kind, layer.block, layer, tuple(into), layer.shape[1] // heads))
    if not found:
        raise ModelError(
            f"{type(plain).__name__}: no {kind} were found; saelab knows MLPs and attentions of GPT-2 and Llama kinds"
        )
    return found


INTO = ("c_fc", "up_proj", "gate_proj", "fc_in", "fc1", "wi")
"""Names of the layers that make an MLP's neurons."""
ATTENTION_INTO = ("c_attn", "q_proj", "k_proj", "v_proj")
"""Names of the layers that make queries, keys and values; ``c_attn`` makes all three, one after the other."""


class Contribution:
    """Sums, over tokens, of the norm of what each unit of a branch adds to the residual stream."""

    def __init__(self, branch: Branch) -> None:
        self._branch = branch
        self._sum = torch.zeros(branch.out.shape[1] // branch.unit, dtype=torch.float64)
        self._n = 0

    def update(self, x: Float[Tensor, "n d"]) -> None:
        """Add some tokens' inputs of the branch's last layer."""
        weight = self._branch.out.weight.float()
        if self._branch.unit == 1:
            self._sum += x.float().abs().sum(0).double() * weight.norm(dim=0).double()
        else:
            parts = rearrange(x.float(), "n (h d) -> h n d", d=self._branch.unit)
            blocks = rearrange(weight, "o (h d) -> h d o", d=self._branch.unit)
            self._sum += (parts @ blocks).norm(dim=2).sum(1).double()
        self._n += x.shape[0]

    @property
    def score(self) -> Float[Tensor, " units"]:
        """Mean norm of each unit's contribution."""
        return self._sum / max(self._n, 1)


def silence(branch: Branch, kept: Bool[Tensor, " units"]) -> None:
    """Zero what the units that go write, and what makes them, so that the shapes stay."""
    branch.out.weight.mul_(_spread(branch.out, kept, branch.out.shape[1]))
    for layer in branch.into:
        wide = _spread(layer, kept, layer.shape[0])
        layer.weight.mul_(wide[:, None])
        if (bias := getattr(layer.module, "bias", None)) is not None:
            bias.data.mul_(wide)


def shrink(plain: nn.Module, branch: Branch, kept: Bool[Tensor, " units"]) -> None:
    """Cut a branch's matrices to the units that stay; its outputs are those of :func:`silence`, up to rounding."""
    attention: Any = plain.get_submodule(branch.out.name.rpartition(".")[0])
    for layer in branch.into:
        _cut(layer, _spread(layer, kept, layer.shape[0]).nonzero()[:, 0], rows=True)
    _cut(branch.out, _spread(branch.out, kept, branch.out.shape[1]).nonzero()[:, 0], rows=False)
    if branch.kind == "heads":
        # GPT-2 splits c_attn's output at a width of its own; the heads' number follows from the shapes everywhere.
        if hasattr(attention, "split_size"):
            attention.split_size = branch.out.shape[1]
        if hasattr(attention, "num_heads"):
            attention.num_heads = attention.num_heads * int(kept.sum()) // len(kept)


def smaller(config: Any, branch: Branch, kept: int) -> dict[str, Any] | None:
    """Return the changes to a model's config that say "``kept`` units"; None when it cannot say it."""
    if not branch.into:
        return None
    if branch.kind == "neurons":
        attribute = next((a for a in ("n_inner", "intermediate_size") if hasattr(config, a)), None)
        return None if attribute is None else {attribute: kept}
    # Only a config with the heads' width in it can have fewer heads than the model's width has room for.
    if not all(hasattr(config, a) for a in ("head_dim", "num_attention_heads", "num_key_value_heads")):
        return None
    width = branch.out.shape[1] // config.num_attention_heads
    group = config.num_attention_heads // config.num_key_value_heads
    if not kept or getattr(config, "hidden_size", 0) % (kept * group):  # Llama's config refuses such a number of heads
        return None
    return {"head_dim": width, "num_attention_heads": kept * group, "num_key_value_heads": kept}


def _spread(layer: Layer, kept: Bool[Tensor, " units"], width: int) -> Bool[Tensor, " width"]:
    """Say for each input or output of a layer whether its unit stays."""
    parts = 3 if layer.name.endswith("c_attn") else 1
    wide = kept.repeat_interleave(width // parts // len(kept)).repeat(parts)
    return wide.to(layer.weight.device)


def _cut(layer: Layer, index: Tensor, rows: bool) -> None:
    module: Any = layer.module
    weight = layer.weight[index] if rows else layer.weight[:, index]
    stored = weight.T.contiguous() if layer.transposed else weight.contiguous()
    module.weight = nn.Parameter(stored, requires_grad=False)
    if rows and getattr(module, "bias", None) is not None:
        module.bias = nn.Parameter(module.bias.data[index].contiguous(), requires_grad=False)
    out, into = weight.shape
    for name, value in (("out_features", out), ("in_features", into), ("nf", out), ("nx", into)):
        if hasattr(module, name):
            setattr(module, name, value)
