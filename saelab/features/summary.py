"""The summary row of each feature, from its entries: quantiles, the tokens it fires on, and where it fires strongest.

Two ways to the same numbers, bit for bit: many features at once in memory, and one feature of any size in pieces.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from saelab.core.counts import TopK
from saelab.features.ragged import (
    Array,
    largest_of_runs,
    list_of_each,
    quantile_positions,
    runs,
    sorted_within,
    top_entries,
)

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
"""Quantiles of the active values kept for each feature (columns ``q10`` ...)."""
TOP = 64
"""Strongest entries listed for each feature, once over all tokens and once with one entry for each row of text."""

COLUMNS: dict[str, Any] = {
    **{f"q{round(100 * q)}": np.float32 for q in QUANTILES},
    "rows": np.int64,
    "distinct_tokens": np.int64,
    "token_entropy": np.float32,
    "top_token": np.int32,
    "top_token_share": np.float32,
}
"""Columns made here, and their dtypes."""


@dataclass(eq=False)
class Part:
    """Summary of a range of features."""

    columns: dict[str, Array]
    """One array for each of ``COLUMNS``."""
    top: tuple[Array, Array]
    """Offsets and entry numbers (within the range) of the ``TOP`` strongest entries of each feature."""
    top_rows: tuple[Array, Array]
    """The same with one entry, the strongest, for each row of text."""


def summarise(
    offsets: Int64[np.ndarray, " features_plus_1"],
    values: Float32[np.ndarray, " n"],
    rows: Int64[np.ndarray, " n"],
    ids: Array,
) -> Part:
    """Summarise many features whose entries, in token order, are in memory.

    ``rows`` and ``ids`` are the row of text and the token id of each entry.
    """
    counts = np.diff(offsets)
    columns = {name: np.zeros(len(counts), dtype) for name, dtype in COLUMNS.items()}
    columns["top_token"][:] = -1
    full = counts > 0
    in_order = sorted_within(offsets, values)
    for q in QUANTILES:
        at = offsets[:-1] + quantile_positions(counts, q)
        columns[f"q{round(100 * q)}"][full] = in_order[at[full]]
    top = top_entries(offsets, values, TOP, in_order)
    del in_order

    lists = list_of_each(offsets)
    starts = runs(lists, rows)
    strongest = largest_of_runs(starts, values)
    per_row = np.searchsorted(starts, offsets)
    row_offsets, row_positions = top_entries(per_row, values[strongest], TOP)
    columns["rows"][:] = np.diff(per_row)

    keys = (lists.astype(np.uint64) << np.uint64(32)) | ids.astype(np.uint64)
    keys.sort()
    starts = runs(keys)
    features = (keys[starts] >> np.uint64(32)).astype(np.int64)
    token_offsets = np.searchsorted(features, np.arange(len(counts) + 1))
    _token_columns(
        columns,
        np.flatnonzero(full),
        token_offsets,
        keys[starts].astype(np.uint32).astype(np.int64),
        np.diff(starts, append=len(keys)),
    )
    return Part(columns, top, (row_offsets, strongest[row_positions]))


def summarise_large(
    pieces: Iterator[tuple[Array, Array, Array, Array]], count: int, d_vocab: int
) -> tuple[Part, "HighHalves"]:
    """Summarise one feature whose entries come in pieces of (entry numbers, values, rows, ids).

    The quantiles still need a second look at the values: see :class:`HighHalves`.
    """
    columns = {name: np.zeros(1, dtype) for name, dtype in COLUMNS.items()}
    halves = HighHalves(count)
    top, top_rows = TopK(TOP), TopK(TOP)
    by_token = np.zeros(d_vocab, np.int64)
    held: tuple[Array, Array, Array] | None = None
    for entries, values, rows, ids in pieces:
        halves.first(values)
        top.update(values, entries)
        by_token += np.bincount(ids, minlength=d_vocab)
        if held is not None:
            entries, values, rows = (np.concatenate(pair) for pair in zip(held, (entries, values, rows), strict=True))  # noqa: PLW2901
        # The last row may go on in the next piece: hold its strongest entry back.
        starts = runs(rows)
        strongest = largest_of_runs(starts, values)
        columns["rows"] += len(strongest) - 1
        top_rows.update(values[strongest[:-1]], entries[strongest[:-1]])
        held = entries[strongest[-1:]], values[strongest[-1:]], rows[strongest[-1:]]
    assert held is not None, "a large feature has entries"
    columns["rows"] += 1
    top_rows.update(held[1], held[0])
    ids = np.flatnonzero(by_token)
    _token_columns(columns, np.zeros(1, np.int64), np.array([0, len(ids)]), ids, by_token[ids])
    listed = tuple((np.array([0, len(kept.ids)]), kept.ids) for kept in (top, top_rows))
    return Part(columns, listed[0], listed[1]), halves


class HighHalves:
    """Exact quantiles of positive float32 values in two passes of constant memory.

    Their bit patterns order as they do: the first pass counts the upper 16 bits, the second the lower 16 bits of the
    values that share the upper bits of a wanted quantile.
    """

    def __init__(self, count: int) -> None:
        self.ranks = [int(quantile_positions(np.array([count]), q)[0]) for q in QUANTILES]
        self._high = np.zeros(1 << 16, np.int64)
        self._low: dict[int, Array] = {}

    def first(self, values: Float32[np.ndarray, " n"]) -> None:
        """Take in values, first pass."""
        self._high += np.bincount(np.ascontiguousarray(values).view(np.uint32) >> 16, minlength=1 << 16)

    def second(self, values: Float32[np.ndarray, " n"]) -> None:
        """Take in the same values again."""
        if not self._low:
            self._below = np.cumsum(self._high) - self._high
            wanted = {int(np.searchsorted(np.cumsum(self._high), rank, side="right")) for rank in self.ranks}
            self._low = {high: np.zeros(1 << 16, np.int64) for high in wanted}
        bits = np.ascontiguousarray(values).view(np.uint32)
        for high in self._low:
            self._low[high] += np.bincount(bits[bits >> 16 == high] & 0xFFFF, minlength=1 << 16)

    def result(self) -> dict[str, Array]:
        """Return the quantile columns of the feature."""
        columns = {}
        for q, rank in zip(QUANTILES, self.ranks, strict=True):
            high = int(np.searchsorted(np.cumsum(self._high), rank, side="right"))
            low = int(np.searchsorted(np.cumsum(self._low[high]), rank - self._below[high], side="right"))
            columns[f"q{round(100 * q)}"] = np.array([(high << 16) | low], np.uint32).view(np.float32)
        return columns


def _token_columns(columns: dict[str, Array], full: Array, offsets: Array, ids: Array, counts: Array) -> None:
    """Fill in which tokens the features ``full`` fire on; ``ids`` and ``counts`` list them, feature after feature."""
    if not len(full):
        return
    starts = offsets[full]
    total = np.add.reduceat(counts, starts)
    entropy = np.log(total) - np.add.reduceat(counts * np.log(counts), starts) / total
    best = largest_of_runs(starts, counts)
    columns["distinct_tokens"][full] = np.diff(offsets)[full]
    columns["token_entropy"][full] = np.maximum(entropy, 0)
    columns["top_token"][full] = ids[best]
    columns["top_token_share"][full] = counts[best] / total
