"""Choosing the k entries of each token with the largest z (1 + beta |<w_dec, g>|), tile by tile, without gradient."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.kernels.dispatch import Impl, use_sparse
from saelab.kernels.product import product
from saelab.kernels.segments import entry_dots
from saelab.kernels.select import BF16_MARGIN, Precision, TopK, row_topk, tile_rows


class Scored(NamedTuple):
    """What :func:`select_scored` finds."""

    chosen: TopK
    """Features, and their pre-activations z (not scores)."""
    influence: Float[Tensor, " d_sae"]
    """Mean over tokens of ``|<w_dec[i], g>|``; 0 without tokens."""


@torch.no_grad()
def select_scored(  # noqa: PLR0917
    x: Float[Tensor, "n d_in"],
    w_enc_t: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    gradient: Float[Tensor, "n d_in"],
    w_dec: Float[Tensor, "d_sae d_in"],
    k: int,
    beta: float,
    *,
    precision: Precision = "f32",
    impl: Impl = "auto",
) -> Scored:
    """Select the k entries per token with the largest ``z (1 + beta |g @ w_dec.T|)``, ``z = x @ w_enc_t.T + b_enc``.

    The factor is at least 1, so every positive z ranks above every negative one. Costs two matrix products.
    ``precision="bf16"`` chooses ``k + 8`` candidates from bfloat16 products and recomputes both factors of theirs.
    """
    n, d_sae = x.shape[0], w_enc_t.shape[0]
    sparse = use_sparse(impl)
    half = precision == "bf16" and sparse
    wanted = min(k + BF16_MARGIN, d_sae) if half else k
    tensors = (x, w_enc_t, b_enc, gradient, w_dec)
    left, encoder, bias, g, decoder = (t.to(torch.bfloat16) if half else t for t in tensors)
    indices = torch.empty(n, wanted, dtype=torch.int64, device=x.device)
    values = torch.empty(n, wanted, dtype=x.dtype, device=x.device)
    total = torch.zeros(d_sae, dtype=x.dtype, device=x.device)
    rows = tile_rows(n, d_sae) if sparse else max(n, 1)
    buffers = torch.empty(2, rows if sparse else 0, d_sae, dtype=left.dtype, device=x.device)
    for start in range(0, n, rows):
        piece = slice(start, start + rows)
        if sparse:
            size = min(rows, n - start)
            z = product(left[piece], encoder, bias, out=buffers[0, :size])
            score = product(g[piece], decoder, out=buffers[1, :size]).abs_()
        else:
            z, score = left @ encoder.T + bias, (g @ decoder.T).abs()
        total += score.sum(0, dtype=x.dtype)
        score.mul_(beta).add_(1).mul_(z)
        indices[piece] = row_topk(score, wanted, impl)[1] if sparse else score.topk(wanted, dim=1).indices
        values[piece] = z.gather(1, indices[piece]).to(x.dtype)
    if half:
        flat, tokens = indices.view(-1), torch.arange(n, device=x.device).repeat_interleave(wanted)
        values = (entry_dots(x, w_enc_t, flat, tokens, impl=impl) + b_enc[flat]).view(n, wanted)
        weight = 1 + beta * entry_dots(gradient, w_dec, flat, tokens, impl=impl).abs().view(n, wanted)
        best = (values * weight).topk(k, dim=1, sorted=False).indices
        indices, values = indices.gather(1, best), values.gather(1, best)
    return Scored(TopK(indices, values), total / max(n, 1))
