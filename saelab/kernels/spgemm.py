"""Products of a code with itself, ``C^T C``: on how many tokens two features are active together, and how strongly.

Entry (i, j) is ``sum over tokens t of f_ti f_tj`` (or their number). With L0 active features per token there are
``N L0^2`` pairs to add up, while the dense product would take ``N d_sae^2``. A general sparse product (row-wise, into a
hash table or a list of what is there) also has to find out where its result is not zero; here the result is nearly full
wherever it matters, so rows of it are kept dense and each pair is one addition into a row that fits in a core's cache:

    for each feature i:   row_i[ features of all tokens on which i is active ] += 1

Tokens' features are stored as *pieces*, rows of a matrix of fixed width, so that fetching them is copying whole cache
lines. Rows come block by block: memory is the code itself plus a block, never d_sae^2.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from saelab.core.code import SparseCode
from saelab.kernels.dispatch import Impl, use_sparse
from saelab.kernels.segments import group_by

BLOCK_ELEMENTS = 1 << 22
"""Entries of a block of the result: 16 MiB of counts."""
PIECES_AT_A_TIME = 512
"""Pieces fetched at a time: what a core's cache holds."""


class RowBlock(NamedTuple):
    """Some neighbouring rows of the product."""

    start: int
    """Feature of the first row."""
    values: Shaped[Tensor, "rows d_sae"]
    """int32 counts, or float64 sums of products."""


class TopPairs(NamedTuple):
    """For each feature, those most active together with it; -1 and 0 where there are fewer."""

    features: Int[Tensor, "d_sae n"]
    values: Shaped[Tensor, "d_sae n"]


class _Pieces(NamedTuple):
    columns: Int[Tensor, "n_pieces width"]
    """Features of a token, int32; d_sae where there is none."""
    values: Float[Tensor, "n_pieces width"] | None
    """Their values, float64; 0 where there is none."""
    piece: Int[Tensor, " visits"]
    """Pieces to visit, feature by feature."""
    factor: Float[Tensor, " visits"] | None
    """Value of the feature on the piece's token."""
    offsets: Int[Tensor, " d_sae_plus_1"]
    """First visit of each feature."""


@torch.no_grad()
def co_activation(code: SparseCode, *, weighted: bool = False, impl: Impl = "auto") -> Iterator[RowBlock]:
    """Yield the rows of ``C^T C`` in order, in blocks: counts of tokens, or with ``weighted`` sums of ``f_ti f_tj``.

    Every stored entry counts as active: give ``code.positive()`` if zeros are stored. Works on the CPU, with as many
    threads as torch has; counts are exact and sums are added up in the same order every time.
    """
    d_sae = code.d_sae
    if not use_sparse(impl):
        dense = code.to_dense().double() if weighted else _pattern(code).to_dense()
        yield RowBlock(0, dense.T @ dense if weighted else (dense.T @ dense).to(torch.int32))
        return
    pieces = _pieces(code, weighted)
    rows = max(1, min(BLOCK_ELEMENTS // d_sae, d_sae))
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for start in range(0, d_sae, rows):
            block = torch.zeros(min(rows, d_sae - start), d_sae + 1, dtype=torch.float64 if weighted else torch.int32)
            workers = [
                pool.submit(_fill, block, start, range(first, len(block), torch.get_num_threads()), pieces)
                for first in range(torch.get_num_threads())
            ]
            for worker in workers:
                worker.result()
            yield RowBlock(start, block[:, :d_sae])


def co_activation_matrix(
    code: SparseCode, *, weighted: bool = False, impl: Impl = "auto"
) -> Shaped[Tensor, "d_sae d_sae"]:
    """Return the whole of ``C^T C``: d_sae^2 numbers of 4 bytes (counts) or 8; see :func:`co_activation`."""
    out = torch.empty(code.d_sae, code.d_sae, dtype=torch.float64 if weighted else torch.int32)
    for block in co_activation(code, weighted=weighted, impl=impl):
        out[block.start : block.start + len(block.values)] = block.values
    return out


def top_co_active(code: SparseCode, n: int, *, weighted: bool = False, impl: Impl = "auto") -> TopPairs:
    """Return for each feature the ``n`` others with the largest entries of ``C^T C``, the largest first.

    Of equals those with the smaller number come first. Memory: the code and a block of the product.
    """
    n = min(n, code.d_sae)
    features = torch.full((code.d_sae, n), -1, dtype=torch.int64)
    values = torch.zeros(code.d_sae, n, dtype=torch.float64 if weighted else torch.int32)
    for block in co_activation(code, weighted=weighted, impl=impl):
        here = torch.arange(block.start, block.start + len(block.values))
        block.values[torch.arange(len(here)), here] = 0
        value, feature = block.values.sort(dim=1, descending=True, stable=True)
        value, feature = value[:, :n], feature[:, :n]
        values[here] = value
        features[here] = torch.where(value > 0, feature, -1)
    return TopPairs(features, values)


def _pattern(code: SparseCode) -> SparseCode:
    """Return the code with 1 for every entry."""
    return SparseCode(code.indices, torch.ones_like(code.values, dtype=torch.float64), code.offsets, code.d_sae)


def _pieces(code: SparseCode, weighted: bool) -> _Pieces:
    """Lay out tokens as pieces, and list for each feature the pieces of the tokens on which it is active."""
    indices, offsets = code.indices.cpu(), code.offsets.cpu()
    counts = offsets.diff()
    width = _width(indices.numel(), code.n_tokens)
    per_token = (counts + width - 1).div(width, rounding_mode="floor")
    first = torch.cat([counts.new_zeros(1), per_token.cumsum(0)])
    rows = torch.repeat_interleave(torch.arange(code.n_tokens), counts, output_size=indices.numel())
    slot = torch.arange(indices.numel()).sub_(offsets[:-1][rows]).add_(first[:-1][rows] * width)
    columns = torch.full((int(first[-1]) * width,), code.d_sae, dtype=torch.int32)
    columns[slot] = indices.to(torch.int32)
    values = None
    if weighted:
        values = torch.zeros(columns.numel(), dtype=torch.float64)
        values[slot] = code.values.detach().cpu().double()
    del slot
    groups = group_by(indices.to(torch.int32), code.d_sae)
    token = rows[groups.order]
    del rows
    piece, repeats = first[token], per_token[token]
    factor = code.values.detach().cpu().double()[groups.order] if weighted else None
    ends = groups.offsets
    if bool((per_token > 1).any()):
        visits = torch.cat([repeats.new_zeros(1), repeats.cumsum(0)])
        within = torch.arange(int(visits[-1])) - torch.repeat_interleave(visits[:-1], repeats)
        piece = torch.repeat_interleave(piece, repeats) + within
        factor = None if factor is None else torch.repeat_interleave(factor, repeats)
        ends = visits[ends]
    return _Pieces(columns.view(-1, width), None if values is None else values.view(-1, width), piece, factor, ends)


def _width(nnz: int, n_tokens: int) -> int:
    """Return the width of a piece: the mean number of entries of a token, rounded up to a power of 2, 4 to 64."""
    mean = nnz / max(n_tokens, 1)
    return int(min(64, max(4, 1 << max(0, int(mean - 1e-9)).bit_length())))


def _fill(block: Tensor, start: int, rows: range, pieces: _Pieces) -> None:
    """Add up some rows of a block; a row belongs to one thread."""
    ones = torch.ones(1, dtype=torch.int32)
    bounds = pieces.offsets[start : start + len(block) + 1].tolist()
    with torch.no_grad():
        for row in rows:
            for begin in range(bounds[row], bounds[row + 1], PIECES_AT_A_TIME):
                visits = slice(begin, min(begin + PIECES_AT_A_TIME, bounds[row + 1]))
                piece = pieces.piece[visits]
                columns = pieces.columns.index_select(0, piece).view(-1)
                if pieces.values is None or pieces.factor is None:
                    block[row].index_add_(0, columns, ones.expand(columns.numel()))
                else:
                    products = pieces.values.index_select(0, piece) * pieces.factor[visits].unsqueeze(1)
                    block[row].index_add_(0, columns, products.view(-1))
