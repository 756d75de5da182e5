"""What the weights alone say of each feature: norms, nearest neighbour, and the tokens it writes for."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.core.progress import progress
from saelab.features.protocols import Dictionary, Model
from saelab.features.ragged import Array

LOGIT_TOKENS = 10
"""Most promoted and most suppressed tokens kept for each feature."""
NEAREST_UP_TO = 32_768
"""The nearest neighbour costs d_sae^2 d_in; above this many features it is left out unless asked for."""
BLOCK = 1 << 24
"""Numbers of a product matrix held at once."""
RESIDUAL = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "hook_embed")
"""Sites whose activations are vectors of the residual stream, which the unembedding reads."""


@torch.no_grad()
def weight_columns(model: Model, sae: Dictionary, site: str, nearest: bool | None) -> dict[str, Array]:
    """Summary columns that need no text.

    ``site`` is the one that decoder rows write to. ``decoder_norm``; ``encoder_decoder_cosine`` (nan where a transcoder
    reads and writes different widths); ``nearest`` and ``nearest_cosine``: the other feature whose decoder row is
    closest (see ``NEAREST_UP_TO``); and, for sites in the residual stream of a model that shows its unembedding,
    ``logit_top_ids``, ``logit_top``, ``logit_bottom_ids``, ``logit_bottom`` of shape (d_sae, ``LOGIT_TOKENS``).
    """
    decoder = sae.W_dec.detach().float()
    norm = decoder.norm(dim=1)
    unit = decoder / norm.clamp_min(1e-30)[:, None]
    encoder = sae.W_enc.detach().float().T
    one_space = encoder.shape == decoder.shape
    columns = {
        "decoder_norm": norm,
        "encoder_decoder_cosine": (
            torch.cosine_similarity(encoder, decoder, dim=1) if one_space else torch.full_like(norm, torch.nan)
        ),
    }
    if nearest if nearest is not None else sae.d_sae <= NEAREST_UP_TO:
        columns |= _nearest(unit)
    to_logits = unembedding(model, site, decoder.shape[1])
    if to_logits is not None:
        columns |= _logit_weights(decoder, to_logits.to(decoder))
    return {name: column.cpu().numpy() for name, column in columns.items()}


def _nearest(unit: Float[Tensor, "d_sae d_in"]) -> dict[str, Tensor]:
    d_sae = unit.shape[0]
    number = torch.full((d_sae,), -1, dtype=torch.int32)
    cosine = torch.zeros(d_sae)
    if d_sae > 1:
        step = max(1, BLOCK // d_sae)
        with progress("neighbours", d_sae, unit="features") as bar:
            for i in range(0, d_sae, step):
                product = unit[i : i + step] @ unit.T
                product.diagonal(i).fill_(-torch.inf)
                best = product.max(1)
                number[i : i + step], cosine[i : i + step] = best.indices.int().cpu(), best.values.cpu()
                bar.advance(len(product))
    return {"nearest": number, "nearest_cosine": cosine}


def unembedding(model: Model, site: str, d_in: int) -> Float[Tensor, "d_in d_vocab"] | None:
    """From a residual vector to logits, as far as it is linear: the final norm's weight (and centring), then W_U.

    None when the site is not in the residual stream or the model does not show its unembedding.
    """
    bridge: Any = getattr(model, "bridge", None)
    weight = getattr(bridge, "W_U", None)
    if not site.endswith(RESIDUAL) or weight is None or weight.shape[0] != d_in:
        return None
    weight = weight.detach().float()
    final = getattr(bridge, "ln_final", None)
    scale = getattr(final, "weight", None)
    if isinstance(scale, Tensor) and scale.shape == (d_in,):
        weight = scale.detach().float()[:, None] * weight
        if isinstance(getattr(final, "bias", None), Tensor):  # LayerNorm, which takes off the mean; RMSNorm does not
            weight = weight - weight.mean(0)
    # A constant over the vocabulary changes no probability.
    centred: Tensor = weight - weight.mean(1, keepdim=True)
    return centred


def _logit_weights(decoder: Float[Tensor, "d_sae d_in"], to_logits: Float[Tensor, "d_in d_vocab"]) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {}
    k = min(LOGIT_TOKENS, to_logits.shape[1])
    step = max(1, BLOCK // to_logits.shape[1])
    with progress("logits", decoder.shape[0], unit="features") as bar:
        for i in range(0, decoder.shape[0], step):
            logits = decoder[i : i + step] @ to_logits
            for name, sign in (("top", True), ("bottom", False)):
                best = logits.topk(k, largest=sign)
                found.setdefault(f"logit_{name}_ids", []).append(best.indices.int())
                found.setdefault(f"logit_{name}", []).append(best.values)
            bar.advance(len(logits))
    return {name: torch.cat(parts) for name, parts in found.items()}
