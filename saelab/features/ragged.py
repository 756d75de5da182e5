"""Order statistics of many lists of positive float32 values at once.

Lists lie one after another in one array; list i is ``values[offsets[i]:offsets[i + 1]]``. Positive floats order
as their bit patterns do, so sorting (list << 32 | bits) as one array of integers sorts every list, with no
loop over lists.
"""

import numpy as np
from jaxtyping import Float32, Int64, Shaped

Array = np.ndarray


def list_of_each(offsets: Int64[np.ndarray, " lists_plus_1"]) -> Int64[np.ndarray, " n"]:
    """Number of the list that each value is in."""
    return np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))


def sorted_within(
    offsets: Int64[np.ndarray, " lists_plus_1"], values: Float32[np.ndarray, " n"]
) -> Float32[np.ndarray, " n"]:
    """Every list sorted, rising."""
    keys = list_of_each(offsets).astype(np.uint64)
    keys <<= np.uint64(32)
    keys |= np.ascontiguousarray(values).view(np.uint32)
    keys.sort()
    ordered: Array = keys.astype(np.uint32).view(np.float32)
    return ordered


def quantile_positions(counts: Int64[np.ndarray, " lists"], q: float) -> Int64[np.ndarray, " lists"]:
    """Position, in a sorted list of n values, of the quantile: ``floor(q (n - 1))``, always one of the values."""
    positions: Array = np.floor(q * np.maximum(counts - 1, 0)).astype(np.int64)
    return positions


def top_entries(
    offsets: Int64[np.ndarray, " lists_plus_1"],
    values: Float32[np.ndarray, " n"],
    k: int,
    in_order: Float32[np.ndarray, " n"] | None = None,
) -> tuple[Int64[np.ndarray, " lists_plus_1"], Int64[np.ndarray, " kept"]]:
    """Offsets and positions (in ``values``) of the k largest of each list, largest first, ties in order of position.

    ``in_order`` is ``sorted_within(offsets, values)`` when the caller has it already.
    """
    counts = np.diff(offsets)
    kept = np.minimum(counts, k)
    if in_order is None:
        in_order = sorted_within(offsets, values)
    full = kept > 0
    least = np.full(len(counts), np.inf, np.float32)
    least[full] = in_order[(offsets[1:] - kept)[full]]
    lists = list_of_each(offsets)
    candidates = np.flatnonzero(values >= least[lists])
    candidates = candidates[np.lexsort((-values[candidates], lists[candidates]))]  # stable: ties stay in order
    where = lists[candidates]
    rank = np.arange(len(where)) - np.searchsorted(where, where)
    return np.concatenate([[0], np.cumsum(kept)]), candidates[rank < k]


def runs(*columns: Array) -> Int64[np.ndarray, " runs"]:
    """Return where runs of equal neighbours (equal in all columns) start."""
    if not len(columns[0]):
        return np.zeros(0, np.int64)
    change = np.zeros(len(columns[0]), np.bool_)
    change[0] = True
    for column in columns:
        change[1:] |= column[1:] != column[:-1]
    return np.flatnonzero(change)


def largest_of_runs(starts: Int64[np.ndarray, " runs"], values: Shaped[np.ndarray, " n"]) -> Int64[np.ndarray, " runs"]:
    """Position of the largest value of each run, the first of equals."""
    if not len(starts):
        return starts
    number = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(values)))
    hits = np.flatnonzero(values == np.maximum.reduceat(values, starts)[number])
    first: Array = hits[runs(number[hits])]
    return first
