"""The text of a feature store as windows that do not overlap, in two halves that share no row of text.

Every row of text is cut into windows of ``length`` tokens. Whole rows belong to one half: *explain* windows may be
shown to an explainer, *score* windows to a scorer, and no explanation is ever scored on text it was made from.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

from saelab.core.errors import StoreError
from saelab.features import layout
from saelab.features.store import FeatureStore

NONE = -1
"""Window of a token that is in none: at the end of a row, in a rest shorter than half a window."""


@dataclass(frozen=True, eq=False)
class Windows:
    """All windows of a store."""

    length: int
    """Tokens in a window; the last of a row may have fewer, at least half as many."""
    starts: Int64[np.ndarray, " windows"]
    """First token of each."""
    stops: Int64[np.ndarray, " windows"]
    """Token after the last."""
    rows: Int64[np.ndarray, " windows"]
    """Row of text of each."""
    scored: Bool[np.ndarray, " windows"]
    """True in the score half, False in the explain half."""
    of_token: Int32[np.ndarray, " tokens"]
    """Window of each token of the store, ``NONE`` for none."""

    def __len__(self) -> int:
        return len(self.starts)


def cut_windows(store: FeatureStore, length: int = 32, seed: int = 0) -> Windows:
    """Cut the text of a store into windows and its rows into halves.

    Raises :class:`StoreError` when there are fewer than two rows, or none long enough.
    """
    offsets = np.asarray(store.array(layout.ROW_OFFSETS), np.int64)
    lengths = np.diff(offsets)
    per_row = np.where(lengths % length >= (length + 1) // 2, lengths // length + 1, lengths // length)
    if len(lengths) < 2 or np.count_nonzero(per_row) < 2:
        raise StoreError(
            f"{store.path} holds {len(lengths)} rows of text, of which {np.count_nonzero(per_row)} have a window of "
            f"{length} tokens; at least two are needed, one to explain and one to score: build it on more text"
        )
    rows = np.repeat(np.arange(len(lengths)), per_row)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(per_row) - per_row, per_row)
    starts = offsets[rows] + within * length
    stops = np.minimum(starts + length, offsets[rows + 1])
    of_token = np.full(store.n_tokens, NONE, np.int32)
    sizes = stops - starts
    places = np.repeat(starts - (np.cumsum(sizes) - sizes), sizes) + np.arange(int(sizes.sum()))
    of_token[places] = np.repeat(np.arange(len(rows), dtype=np.int32), sizes)
    usable = np.flatnonzero(per_row)
    half = np.zeros(len(lengths), np.bool_)
    half[np.random.default_rng([seed, 0]).permutation(usable)[: len(usable) // 2]] = True
    return Windows(length, starts, stops, rows, half[rows], of_token)


def window_maxima(
    store: FeatureStore, windows: Windows, feature: int
) -> tuple[Int64[np.ndarray, " fired"], Float32[np.ndarray, " fired"]]:
    """Return the windows in which a feature fires, in order of the text, and its largest value in each."""
    tokens, values = store.feature(feature)
    where = windows.of_token[tokens]
    if not len(where):
        return np.zeros(0, np.int64), np.zeros(0, np.float32)
    change = np.flatnonzero(np.diff(where, prepend=where[0] - 1))
    fired, largest = where[change].astype(np.int64), np.maximum.reduceat(values, change)
    inside = fired != NONE
    return fired[inside], largest[inside].astype(np.float32, copy=False)


def window_matrix(
    store: FeatureStore, windows: Windows, feature: int, chosen: Int64[np.ndarray, " n"]
) -> Float32[np.ndarray, "n length"]:
    """Values of a feature at each token of some windows, 0 where it does not fire (and past a short window's end)."""
    tokens, values = store.feature(feature)
    dense = np.zeros((len(chosen), windows.length), np.float32)
    starts, stops = windows.starts[chosen], windows.stops[chosen]
    first = np.searchsorted(tokens, starts.astype(tokens.dtype))
    counts = np.searchsorted(tokens, stops.astype(tokens.dtype)) - first
    entries = np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(int(counts.sum()))
    which = np.repeat(np.arange(len(chosen)), counts)
    dense[which, np.asarray(tokens[entries], np.int64) - starts[which]] = values[entries]
    return dense
