"""Choosing the M largest pre-activations of a whole batch (Mutual-Choice, BatchTopK), exactly, without gradient.

``topk`` over all N x d_sae entries at once would need them all in memory and costs more than the encoder's product.
Here the first rows give a bound that about 1.3 M entries should exceed; each tile gives its entries above the bound to
a pool; when the pool passes 2 M entries it is cut to its M largest, and the least of these is a new, proven bound. If
the pool ends with fewer than M entries, the first bound was too high and the tiles are gone through again without it.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.kernels.dispatch import Impl, use_sparse, use_triton
from saelab.kernels.product import product
from saelab.kernels.segments import entry_dots, pick
from saelab.kernels.select import BF16_MARGIN, Precision, row_topk, tile_rows
from saelab.kernels.select_above import Entries, entries_at, positions_from

SAMPLE_ROWS = 128
"""Rows that the first bound is taken from."""
SAMPLE_MARGIN = 1.3
"""The first bound is set for this many times the budget."""


@torch.no_grad()
def select_budget(
    x: Float[Tensor, "n d_in"],
    w_enc_t: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    budget: int,
    *,
    precision: Precision = "f32",
    impl: Impl = "auto",
) -> Entries:
    """Select the ``budget`` largest of ``z = x @ w_enc_t.T + b_enc`` over all tokens and features.

    Exactly ``min(budget, n * d_sae)`` entries: among equals, those of earlier tokens are taken. Entries may be negative
    when fewer than ``budget`` are positive. ``precision="bf16"`` chooses ``budget + 8 n`` candidates from a bfloat16
    product and recomputes them, as :func:`~saelab.kernels.select.select_topk` does; the reference ignores it.
    """
    n, d_sae = x.shape[0], w_enc_t.shape[0]
    budget = min(budget, n * d_sae)
    if not use_sparse(impl):
        pre = (x @ w_enc_t.T + b_enc).view(-1)
        place = pre.topk(budget).indices.sort().values
        return entries_at(place, pre[place], n, d_sae)
    half = precision == "bf16"
    wanted = min(budget + BF16_MARGIN * n, n * d_sae) if half else budget
    if wanted == 0:
        return entries_at(torch.zeros(0, dtype=torch.int64, device=x.device), x.new_zeros(0), n, d_sae)
    left, right, bias = (t.to(torch.bfloat16) if half else t for t in (x, w_enc_t, b_enc))
    place, values = _largest_of_tiles(left, right, bias, wanted, impl, guess=True)
    if place.numel() < wanted:
        place, values = _largest_of_tiles(left, right, bias, wanted, impl, guess=False)
    if half:
        rows = place.div(d_sae, rounding_mode="floor")
        indices = place - rows * d_sae
        place, values = keep_largest(
            place, entry_dots(x, w_enc_t, indices, rows, impl=impl) + pick(b_enc, indices), budget, impl
        )
    return entries_at(place, values, n, d_sae)


def keep_largest(
    place: Int[Tensor, " found"], values: Float[Tensor, " found"], count: int, impl: Impl = "auto"
) -> tuple[Int[Tensor, " kept"], Float[Tensor, " kept"]]:
    """Return the ``count`` largest with their places, in the order given; of equals the first are kept."""
    found = values.numel()
    if found <= count:
        return place, values
    if use_triton(impl, values.device) and count:
        from saelab.kernels import triton_kth

        least = triton_kth.kth_largest(values, count)
    else:
        least = values.kthvalue(found - count + 1).values if count else values.new_full((), math.inf)
    keep, equal = values > least, values == least
    spare = count - keep.sum()
    keep |= equal & (equal.cumsum(0) <= spare)
    kept = keep.nonzero().squeeze(1)
    return pick(place, kept), pick(values, kept)


def _largest_of_tiles(
    x: Float[Tensor, "n d_in"],
    w_enc_t: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    wanted: int,
    impl: Impl,
    *,
    guess: bool,
) -> tuple[Int[Tensor, " found"], Float[Tensor, " found"]]:
    """Return places and values of the ``wanted`` largest; fewer when the guessed bound was too high."""
    n, d_sae = x.shape[0], w_enc_t.shape[0]
    rows = tile_rows(n, d_sae)
    buffer = torch.empty(rows, d_sae, dtype=x.dtype, device=x.device)
    group = _group_size(d_sae, wanted / n)
    bound = torch.full((), -math.inf, dtype=x.dtype, device=x.device)
    places, values, held = [], [], 0
    for start in range(0, n, rows):
        tile = product(x[start : start + rows], w_enc_t, b_enc, out=buffer[: min(rows, n - start)])
        if guess and start == 0:
            bound = _sampled_bound(tile[:SAMPLE_ROWS], wanted / n, bound, impl)
        found = positions_from(tile, bound, group, impl)
        values.append(pick(tile.view(-1), found))
        places.append(found.add_(start * d_sae))
        held += found.numel()
        if held > 2 * wanted:
            place, value = keep_largest(torch.cat(places), torch.cat(values), wanted, impl)
            places, values, held, bound = [place], [value], wanted, value.min()
    return keep_largest(torch.cat(places), torch.cat(values), wanted, impl)


def _sampled_bound(
    sample: Float[Tensor, "n_sample d_sae"], per_row: float, lowest: Float[Tensor, ""], impl: Impl
) -> Float[Tensor, ""]:
    """Return a bound that about ``SAMPLE_MARGIN * per_row`` entries per row of the sample exceed."""
    rows, d_sae = sample.shape
    wanted = math.ceil(SAMPLE_MARGIN * per_row * rows)
    # More than four times the mean number in one row only makes the bound lower, which is safe.
    wide = min(d_sae, math.ceil(4 * per_row) + 8)
    if wanted > rows * wide:
        return lowest
    return row_topk(sample, wide, impl)[0].reshape(-1).topk(wanted).values[-1]


def _group_size(d_sae: int, per_row: float) -> int:
    """Return the size of the groups of columns whose maxima are looked at: about sqrt(d_sae / k)."""
    return int(1 << max(1, min(6, round(math.log2(max(d_sae / max(per_row, 1e-9), 1.0)) / 2))))
