"""Choosing the entries of a code: the k largest pre-activations of each token, tile by tile, without gradient."""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.kernels.dispatch import Impl, use_sparse, use_triton
from saelab.kernels.product import product
from saelab.kernels.segments import entry_dots, pick

Precision = Literal["f32", "bf16"]
"""``bf16``: candidates are chosen from a bfloat16 product and recomputed in the dtype of ``x``."""

BF16_MARGIN = 8
"""Candidates beyond k that are chosen in bfloat16 and then compared exactly."""

TILE_ELEMENTS = 1 << 21
"""Pre-activations held at a time (8 MiB in float32): less than what a CPU's caches hold."""


class TopK(NamedTuple):
    """The k largest pre-activations of each token, in no particular order within a token."""

    indices: Int[Tensor, "n k"]
    values: Float[Tensor, "n k"]


def tile_rows(n: int, d_sae: int) -> int:
    """Return how many tokens make a tile: at least 128, so that the product stays compute-bound."""
    return max(1, min(n, max(128, TILE_ELEMENTS // d_sae)))


@torch.no_grad()
def select_topk(
    x: Float[Tensor, "n d_in"],
    w_enc_t: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    k: int,
    *,
    precision: Precision = "f32",
    impl: Impl = "auto",
) -> TopK:
    """Select the ``k`` largest of ``x @ w_enc_t.T + b_enc`` for each token.

    ``precision="bf16"`` does the product in bfloat16, takes ``k + 8`` candidates, recomputes them exactly and
    keeps the best ``k``: the values are exact, while the selection may miss an entry whose rank is close to ``k``
    (the tests bound how often). The reference ignores ``precision``. Ties are broken in a fixed but unspecified way.
    """
    if not use_sparse(impl):
        values, indices = (x @ w_enc_t.T + b_enc).topk(k, dim=1)
        return TopK(indices, values)
    n, d_sae = x.shape[0], w_enc_t.shape[0]
    half = precision == "bf16"
    wanted = min(k + BF16_MARGIN, d_sae) if half else k
    left, right, bias = (t.to(torch.bfloat16) if half else t for t in (x, w_enc_t, b_enc))
    indices = torch.empty(n, wanted, dtype=torch.int64, device=x.device)
    values = torch.empty(n, wanted, dtype=left.dtype, device=x.device)
    rows = tile_rows(n, d_sae)
    buffer = torch.empty(rows, d_sae, dtype=left.dtype, device=x.device)
    for start in range(0, n, rows):
        piece = slice(start, min(start + rows, n))
        tile = product(left[piece], right, bias, out=buffer[: piece.stop - start])
        values[piece], indices[piece] = row_topk(tile, wanted, impl)
    if half:
        indices, values = _refine(x, w_enc_t, b_enc, indices, k, impl)
    return TopK(indices, values)


def row_topk(
    tile: Float[Tensor, "n d_sae"], k: int, impl: Impl = "auto"
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """Return values and columns of the k largest entries of each row of a contiguous matrix: exact, in any order.

    Columns are dealt into ``d_sae / b`` groups of b; the k largest entries of a row lie in the k groups with the
    largest maxima, so only k b candidates are compared instead of d_sae. With b = sqrt(d_sae / k) the two selections
    cost alike, and a vectorised maximum is all that touches the whole row. ``torch.topk`` takes somewhat longer at
    d_sae = 8192 and twice as long at 131072 (``benchmarks/kernels.py``).
    """
    if use_triton(impl, tile.device):
        from saelab.kernels import triton_row_topk

        return triton_row_topk.row_topk(tile, k)
    n, d_sae = tile.shape
    b = 1 << max(0, round(math.log2(d_sae / k) / 2))
    groups = d_sae // b
    if b < 4 or groups < 2 * k:
        values, columns = tile.topk(k, dim=1, sorted=False)
        return values, columns
    # Group i holds columns i, i + groups, i + 2 groups ...; the few columns left over are candidates anyway.
    maxima = tile.as_strided((n, b, groups), (d_sae, groups, 1)).amax(1)
    best = maxima.topk(k, dim=1, sorted=False).indices
    members = torch.arange(b, device=tile.device).mul_(groups)
    candidates = (best.unsqueeze(2) + members).view(n, k * b)
    if rest := d_sae - b * groups:
        left_over = torch.arange(d_sae - rest, d_sae, device=tile.device).expand(n, rest)
        candidates = torch.cat([candidates, left_over], dim=1)
    starts = torch.arange(0, n * d_sae, d_sae, device=tile.device).unsqueeze(1)
    values, position = (
        pick(tile.view(-1), (candidates + starts).view(-1)).view(candidates.shape).topk(k, dim=1, sorted=False)
    )
    return values, candidates.gather(1, position)


def _refine(  # noqa: PLR0917
    x: Float[Tensor, "n d_in"],
    w_enc_t: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    candidates: Int[Tensor, "n wanted"],
    k: int,
    impl: Impl,
) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
    """Recompute the candidates in full precision and keep the k largest."""
    n, wanted = candidates.shape
    flat = candidates.reshape(-1)
    rows = torch.arange(n, device=x.device).repeat_interleave(wanted)
    exact = (entry_dots(x, w_enc_t, flat, rows, impl=impl) + pick(b_enc, flat)).view(n, wanted)
    values, position = exact.topk(k, dim=1, sorted=False)
    return candidates.gather(1, position), values
