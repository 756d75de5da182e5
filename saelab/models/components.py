"""A decoder taken apart: embeddings, heads, MLPs and norms, as functions that can be run one by one.

A site (:mod:`saelab.models.sites`) is enough to replace an activation. A circuit needs more: the input of one head's
query alone, an attention pattern or a norm's scale held at the value of another run. :class:`Components` gives the
parts of GPT-2, Llama (also Mistral and Qwen2) and GPT-NeoX models, sharing the weights of the loaded model, and proves
on a few tokens that the parts put together again give the model's own logits.

    residual = sum of the writers' outputs;   a reader sees norm(residual)
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from saelab.core.errors import ModelError
from saelab.models.subject import SubjectModel

TOLERANCE = 2e-4
"""Largest difference of the logits allowed, as a share of their largest magnitude."""
_FAMILIES = "gpt2, gpt_neox, llama, mistral, qwen2"


@dataclass(frozen=True, eq=False)
class Norm:
    """LayerNorm (``centred``) or RMSNorm: ``y = (x - mean) / scale * weight + bias``, linear once the scale is held."""

    weight: Float[Tensor, " d"]
    bias: Float[Tensor, " d"] | None
    eps: float
    centred: bool

    def centre(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Take off the mean, in a LayerNorm."""
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def scale(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n 1"]:
        """Return ``sqrt(mean(x^2) + eps)`` of the (centred) input."""
        return (self.centre(x).square().mean(-1, keepdim=True) + self.eps).sqrt()

    def linear(self, x: Float[Tensor, "*n d"], scale: Tensor) -> Float[Tensor, "*n d"]:
        """Apply everything but the bias, with a given scale: the linear part, for one writer's share of the input."""
        return self.centre(x) / scale * self.weight

    def __call__(self, x: Float[Tensor, "*n d"], scale: Tensor | None = None) -> Float[Tensor, "*n d"]:
        """Normalise; with ``scale``, by that scale instead of x's own."""
        y = self.linear(x, self.scale(x) if scale is None else scale)
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True, eq=False)
class Layer:
    """One block: H query heads, G key-value heads (H is a multiple of G), an MLP, two norms."""

    norm1: Norm
    W_Q: Float[Tensor, "h d e"]
    b_Q: Float[Tensor, "h e"]
    W_K: Float[Tensor, "g d e"]
    b_K: Float[Tensor, "g e"]
    W_V: Float[Tensor, "g d e"]
    b_V: Float[Tensor, "g e"]
    W_O: Float[Tensor, "h e d"]
    b_O: Float[Tensor, " d"]
    norm2: Norm
    mlp: nn.Module
    """From the normalised residual to what is added to it, biases included."""

    @property
    def group(self) -> int:
        """Query heads that share a key-value head."""
        return self.W_Q.shape[0] // self.W_K.shape[0]


Rotate = Callable[[Float[Tensor, "h b t e"]], Float[Tensor, "h b t e"]]


class Components:
    """The parts of a loaded model; see the module's docstring.

    Raises :class:`ModelError` for another family, and when the parts do not give the model's logits (a config flag
    that this transcription does not know).
    """

    def __init__(self, model: SubjectModel) -> None:
        plain: Any = model.plain
        kind = plain.config.model_type
        build = {"gpt2": _gpt2, "gpt_neox": _neox, "llama": _llama, "mistral": _llama, "qwen2": _llama}.get(kind)
        if build is None:
            raise ModelError(
                f"{model.name} is a {kind} model; edges, head values and attribution graphs are made for {_FAMILIES} "
                "(reading and replacing whole sites works for it: saelab sites)"
            )
        self.model = model
        self.parallel = kind == "gpt_neox" and bool(plain.config.use_parallel_residual)
        """Whether the MLP reads the block's input, and not what attention has added to it."""
        self.embedding, self.positions, self.layers, self.final_norm, self.head = build(plain)
        self._rotary = _rotary(plain)
        self.d_model = model.d_model
        self.n_layers = len(self.layers)
        self.n_heads = self.layers[0].W_Q.shape[0]
        self.n_kv_heads = self.layers[0].W_K.shape[0]
        self.d_head = self.layers[0].W_Q.shape[2]
        self._check()

    def embed(self, tokens: Int[Tensor, "b t"]) -> dict[str, Float[Tensor, "b t d"]]:
        """Return what is written to the residual stream before the first block: ``embed``, and ``pos`` if learned."""
        found = {"embed": self.embedding[tokens]}
        if self.positions is not None:
            found["pos"] = self.positions[: tokens.shape[1]].expand(tokens.shape[0], -1, -1)
        return found

    def values(self, layer: Layer, x: Float[Tensor, "*g b t d"]) -> Float[Tensor, "g b t e"]:
        """Per key-value head: ``x W_V + b_V`` of the normalised input (one for all, or one per head in front)."""
        return _project(x, layer.W_V, layer.b_V)

    def pattern(
        self, layer: Layer, x_q: Float[Tensor, "*h b t d"], x_k: Float[Tensor, "*g b t d"]
    ) -> Float[Tensor, "h b t s"]:
        """Attention of every query head: softmax of the causal scores, as the forward pass uses it."""
        rotate = self._rotate(x_q.shape[-2], x_q)
        q = rotate(_project(x_q, layer.W_Q, layer.b_Q))
        k = rotate(_project(x_k, layer.W_K, layer.b_K)).repeat_interleave(layer.group, 0)
        scores = q @ k.transpose(-1, -2) / self.d_head**0.5
        length = scores.shape[-1]
        future = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
        attention: Tensor = scores.masked_fill(future, -torch.inf).softmax(-1)
        return attention

    def heads(
        self, layer: Layer, pattern: Float[Tensor, "h b t s"], v: Float[Tensor, "g b s e"]
    ) -> Float[Tensor, "h b t d"]:
        """What each head writes to the residual stream; the output bias ``b_O`` belongs to none of them."""
        return torch.einsum("hbte,hed->hbtd", self.mixed(layer, pattern, v), layer.W_O)

    def mixed(
        self, layer: Layer, pattern: Float[Tensor, "h b t s"], v: Float[Tensor, "g b s e"]
    ) -> Float[Tensor, "h b t e"]:
        """Each head's values averaged by its pattern: what it writes, before its ``W_O``."""
        return pattern @ v.repeat_interleave(layer.group, 0)

    def unembed(self, residual: Float[Tensor, "*n d"], scale: Tensor | None = None) -> Float[Tensor, "*n vocab"]:
        """Logits of the final residual stream, through the final norm."""
        weight, bias = self.head
        return nn.functional.linear(self.final_norm(residual, scale), weight, bias)

    def forward(self, tokens: Int[Tensor, "b t"]) -> Float[Tensor, "b t vocab"]:
        """Logits, from the parts: what ``model.logits`` gives."""
        residual = sum(self.embed(tokens).values(), torch.zeros(()))
        for layer in self.layers:
            x = layer.norm1(residual)
            attention = self.heads(layer, self.pattern(layer, x, x), self.values(layer, x)).sum(0) + layer.b_O
            middle = residual + attention
            residual = middle + layer.mlp(layer.norm2(residual if self.parallel else middle))
        return self.unembed(residual)

    def _rotate(self, length: int, like: Tensor) -> Rotate:
        if self._rotary is None:
            return lambda x: x
        places = torch.arange(length, device=like.device)[None]
        cos, sin = self._rotary(like, places)

        def rotate(x: Tensor) -> Tensor:
            n = cos.shape[-1]
            part, rest = x[..., :n], x[..., n:]
            half = torch.cat([-part[..., n // 2 :], part[..., : n // 2]], -1)
            return torch.cat([part * cos + half * sin, rest], -1)

        return rotate

    @torch.no_grad()
    def _check(self) -> None:
        tokens = (torch.arange(18).view(2, 9)[:, : self.model.n_ctx] * 7).remainder(self.model.d_vocab)
        tokens = tokens.to(self.model.device)
        own, expected = self.forward(tokens).float(), self.model.logits(tokens).float()
        tolerance = TOLERANCE if self.model.dtype == torch.float32 else 5e-2
        if not bool((own - expected).abs().max() <= tolerance * expected.abs().max().clamp_min(1e-6)):
            raise ModelError(
                f"{self.model.name}: heads and MLPs put together do not give the model's own logits (a setting of its "
                "config that saelab does not know); circuits by edges are not possible for it"
            )


def _project(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, T, d) or (H, B, T, d) times (H, d, e): one result per head."""
    spec = "btd,hde->hbte" if x.dim() == 3 else "hbtd,hde->hbte"
    return torch.einsum(spec, x, weight) + bias[:, None, None]


Parts = tuple[Tensor, Tensor | None, list[Layer], Norm, tuple[Tensor, Tensor | None]]


def _layer_norm(module: Any) -> Norm:
    return Norm(module.weight, module.bias, module.eps, True)


def _rms_norm(module: Any) -> Norm:
    return Norm(module.weight, None, module.variance_epsilon, False)


def _per_head(weight: Tensor, n: int) -> Tensor:
    """(n * e, d) of a Linear -> (n, d, e)."""
    return rearrange(weight, "(n e) d -> n d e", n=n)


def _gpt2(plain: Any) -> Parts:
    core, n = plain.transformer, plain.config.n_head
    return (
        core.wte.weight,
        core.wpe.weight,
        list(_gpt2_layers(core.h, n)),
        _layer_norm(core.ln_f),
        (plain.lm_head.weight, None),
    )


def _gpt2_layers(blocks: Any, n: int) -> Iterator[Layer]:
    for block in blocks:
        weights = block.attn.c_attn.weight.chunk(3, 1)  # a Conv1D: (d_in, d_out)
        biases = block.attn.c_attn.bias.chunk(3)
        (W_Q, b_Q), (W_K, b_K), (W_V, b_V) = (
            (w.unflatten(1, (n, -1)).transpose(0, 1), b.unflatten(0, (n, -1)))
            for w, b in zip(weights, biases, strict=True)
        )
        out = block.attn.c_proj
        W_O = out.weight.unflatten(0, (n, -1))
        norms = (_layer_norm(block.ln_1), _layer_norm(block.ln_2))
        yield Layer(norms[0], W_Q, b_Q, W_K, b_K, W_V, b_V, W_O, out.bias, norms[1], block.mlp)


def _llama(plain: Any) -> Parts:
    core, config = plain.model, plain.config
    sizes = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    layers = []
    for block in core.layers:
        attn = block.self_attn
        parts: list[Tensor] = []
        for module, n in zip((attn.q_proj, attn.k_proj, attn.v_proj), sizes, strict=True):
            bias = module.bias if module.bias is not None else module.weight.new_zeros(module.weight.shape[0])
            parts += [_per_head(module.weight, n), bias.unflatten(0, (n, -1))]
        W_O = attn.o_proj.weight.T.unflatten(0, (sizes[0], -1))
        b_O = attn.o_proj.bias if attn.o_proj.bias is not None else W_O.new_zeros(W_O.shape[2])
        norms = (_rms_norm(block.input_layernorm), _rms_norm(block.post_attention_layernorm))
        layers.append(_layer(norms, parts, W_O, b_O, block.mlp))
    return core.embed_tokens.weight, None, layers, _rms_norm(core.norm), (plain.lm_head.weight, None)


def _neox(plain: Any) -> Parts:
    core, n = plain.gpt_neox, plain.config.num_attention_heads
    layers = []
    for block in core.layers:
        joint = block.attention.query_key_value  # rows: head, then (q, k, v), then the head's width
        weight = joint.weight.unflatten(0, (n, 3, -1)).transpose(2, 3)
        bias = joint.bias if joint.bias is not None else joint.weight.new_zeros(joint.weight.shape[0])
        bias = bias.unflatten(0, (n, 3, -1))
        parts = [part for i in range(3) for part in (weight[:, i], bias[:, i])]
        dense = block.attention.dense
        W_O = dense.weight.T.unflatten(0, (n, -1))
        b_O = dense.bias if dense.bias is not None else W_O.new_zeros(W_O.shape[2])
        norms = (_layer_norm(block.input_layernorm), _layer_norm(block.post_attention_layernorm))
        layers.append(_layer(norms, parts, W_O, b_O, block.mlp))
    return (
        core.embed_in.weight,
        None,
        layers,
        _layer_norm(core.final_layer_norm),
        (plain.get_output_embeddings().weight, None),
    )


def _layer(norms: tuple[Norm, Norm], parts: list[Tensor], W_O: Tensor, b_O: Tensor, mlp: nn.Module) -> Layer:
    """A block from its norms, its (weight, bias) of q, k and v, and the rest."""
    W_Q, b_Q, W_K, b_K, W_V, b_V = parts
    return Layer(norms[0], W_Q, b_Q, W_K, b_K, W_V, b_V, W_O, b_O, norms[1], mlp)


def _rotary(plain: Any) -> Any:
    core = getattr(plain, "model", None) or getattr(plain, "gpt_neox", None)
    return getattr(core, "rotary_emb", None)
