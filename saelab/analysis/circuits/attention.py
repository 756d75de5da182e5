"""What an SAE on attention outputs lets one read off: which head, and which source position, made a latent fire.

Kissane et al. 2024 (arXiv 2406.17759). The SAE reads the heads' outputs side by side, before W_O (``attn.hook_z``).
Attention is linear once its pattern is given, so a latent's pre-activation at position t is a sum over heads k and
source positions s, ``A_k(t, s) v_k(s) . r_k`` with ``r_k`` the latent's read direction at head k, plus a constant. That
is an identity of the forward pass (direct feature attribution, DFA), grouped-query attention and rotary positions
included.
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from saelab.core.errors import SiteError
from saelab.features.protocols import Dictionary
from saelab.models.components import Components

_SITE = re.compile(r"blocks\.(\d+)\.attn\.hook_z$")


@dataclass(frozen=True, eq=False)
class LayerState:
    """What one block saw on a prompt."""

    residual: Float[Tensor, "b t d"]
    """Residual stream that the block reads."""
    pattern: Float[Tensor, "h b t s"]
    """Attention, after the softmax."""
    values: Float[Tensor, "h b t e"]
    """Values per query head, biases included."""
    z: Float[Tensor, "b t he"]
    """Heads' outputs side by side: the site ``attn.hook_z``."""
    attention: Float[Tensor, "b t d"]
    """What attention adds to the residual stream, bias included."""
    mlp_input: Float[Tensor, "b t d"]
    """Normalised residual stream that the MLP reads."""
    mlp: Float[Tensor, "b t d"]
    """What the MLP adds."""


@torch.no_grad()
def layer_states(parts: Components, tokens: Int[Tensor, "b t"]) -> list[LayerState]:
    """Run the model and keep what its blocks saw."""
    residual = sum(parts.embed(tokens).values(), torch.zeros(()))
    found = []
    for layer in parts.layers:
        x = layer.norm1(residual)
        pattern, v = parts.pattern(layer, x, x), parts.values(layer, x).repeat_interleave(layer.group, 0)
        z = pattern @ v
        attention = torch.einsum("hbte,hed->btd", z, layer.W_O) + layer.b_O
        middle = residual + attention
        mlp_input = layer.norm2(residual if parts.parallel else middle)
        mlp = layer.mlp(mlp_input)
        flat = z.permute(1, 2, 0, 3).flatten(2)
        found.append(LayerState(residual, pattern, v, flat, attention, mlp_input, mlp))
        residual = middle + mlp
    return found


def attention_layer(site: str) -> int:
    """Block of an ``attn.hook_z`` site; :class:`SiteError` for another site."""
    found = _SITE.match(site)
    if found is None:
        raise SiteError(f"the SAE reads {site}; heads and source positions are read off an SAE at blocks.N.attn.hook_z")
    return int(found[1])


def head_weights(sae: Dictionary, n_heads: int) -> Float[Tensor, "f h"]:
    """Share of each head in the norm of a latent's write direction; rows sum to 1."""
    norms = rearrange(sae.W_dec.detach().float(), "f (h e) -> f h e", h=n_heads).norm(dim=2)
    shares: Tensor = norms / norms.sum(1, keepdim=True).clamp_min(1e-30)
    return shares


def read_direction(sae: Dictionary, feature: int, n_heads: int) -> Float[Tensor, "h e"]:
    """A latent's read direction on raw activations, by head."""
    scale = float(getattr(sae, "input_scale", 1.0))
    reads: Tensor = rearrange(sae.W_enc.detach().float()[:, feature], "(h e) -> h e", h=n_heads) * scale
    return reads


def constant(sae: Dictionary, feature: int) -> float:
    """What a latent's pre-activation is at activation 0: ``b_enc - center . W_enc``."""
    found = float(getattr(sae, "b_enc", torch.zeros(sae.d_sae))[feature])
    centre = getattr(sae, "center", None)
    return found if centre is None else found - float(centre @ sae.W_enc[:, feature])


def head_activation(state: LayerState, sae: Dictionary, feature: int, n_heads: int) -> Float[Tensor, "b t h"]:
    """Share of each head in a latent's pre-activation at each position; their sum + :func:`constant` is that."""
    by_head = rearrange(state.z.float(), "b t (h e) -> b t h e", h=n_heads)
    terms: Tensor = (by_head * read_direction(sae, feature, n_heads)).sum(-1)
    return terms


def source_attribution(state: LayerState, sae: Dictionary, feature: int) -> Float[Tensor, "h b t s"]:
    """DFA of a latent: term of each head and source position at each position.

    Summed over heads and sources, plus :func:`constant`, it is the pre-activation.
    """
    reads = read_direction(sae, feature, state.pattern.shape[0])
    return state.pattern * torch.einsum("hbse,he->hbs", state.values.float(), reads)[:, :, None]


@dataclass(frozen=True, eq=False)
class HeadReport:
    """How alike the latents are that a head writes most of."""

    head: int
    features: Int[np.ndarray, " n"]
    """Latents with the largest share of this head."""
    shares: Float[np.ndarray, " n"]
    similarity: float
    """Mean overlap (Jaccard) of pairs of their top-token sets: 1 one role, 0 nothing in common."""


def head_reports(
    sae: Dictionary, n_heads: int, top_tokens: dict[int, set[int]] | dict[int, set[str]], n: int = 10
) -> list[HeadReport]:
    """For each head its n latents of largest share, of those with known top tokens, and how alike these are.

    An automatic stand-in for a person's judgement of whether a head has one role: a low similarity says "polysemantic".
    """
    shares = head_weights(sae, n_heads).cpu().numpy()
    known = np.array(sorted(top_tokens), np.int64)
    found = []
    for head in range(n_heads):
        best = known[np.argsort(-shares[known, head], kind="stable")[:n]] if len(known) else known
        sets = [top_tokens[int(i)] for i in best]
        pairs = [len(a & b) / max(len(a | b), 1) for i, a in enumerate(sets) for b in sets[:i]]
        similarity = float(np.mean(pairs)) if pairs else float("nan")
        found.append(HeadReport(head, best, shares[best, head], similarity))
    return found


@torch.no_grad()
def prefix_induction(
    parts: Components,
    *,
    longest: int = 6,
    length: int = 64,
    rows: int = 32,
    vocabulary: Int[Tensor, " v"] | None = None,
    first: Int[Tensor, " bos"] | None = None,
    seed: int = 0,
) -> Float[Tensor, "layers heads prefix"]:
    """Induction scores of every head by the length of the repeated prefix.

    Random tokens hold the same prefix of n tokens twice, with different tokens before. The score is the attention from
    the second prefix's last token to the token after the first. A head that needs one matching token has its full score
    at n = 1 ("short prefix"), one that needs two or more only later ("long prefix").
    """
    generator = torch.Generator().manual_seed(seed)
    words = torch.arange(1, parts.model.d_vocab) if vocabulary is None else vocabulary
    start = torch.zeros(0, dtype=torch.int64) if first is None else first
    scores = []
    for n in range(1, longest + 1):
        drawn = (
            torch.stack([words[torch.randperm(len(words), generator=generator)[:length]] for _ in range(rows)])
            if len(words) >= length
            else words[torch.randint(len(words), (rows, length), generator=generator)]
        )
        place = length // 4
        drawn[:, -n:] = drawn[:, place : place + n]
        tokens = torch.cat([start.expand(rows, -1), drawn], 1).to(parts.model.device)
        target = len(start) + place + n
        states = layer_states(parts, tokens)
        scores.append(torch.stack([state.pattern[:, :, -1, target].mean(1) for state in states]))
    return torch.stack(scores, -1)


def prefix_kind(scores: Float[Tensor, " prefix"], least: float = 0.3) -> str:
    """Name a head by its scores: ``short`` prefix, ``long`` prefix (under half its best at n = 1), or ``none``."""
    best = float(scores.max())
    if best < least:
        return "none"
    return "short" if float(scores[0]) >= 0.5 * best else "long"


def top_sources(attribution: Float[Tensor, "h b t s"], row: int, position: int) -> Any:
    """Frame of a latent's attribution at one position: one row per head and source, largest first."""
    import pandas as pd

    terms = attribution[:, row, position, : position + 1].double().cpu().numpy()
    heads, sources = np.indices(terms.shape)
    frame = pd.DataFrame({"head": heads.ravel(), "source": sources.ravel(), "term": terms.ravel()})
    return frame.sort_values("term", key=np.abs, ascending=False, kind="stable").reset_index(drop=True)
