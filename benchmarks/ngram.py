"""A strong byte-level n-gram model, as a baseline: adaptive PPM-like mixing of orders 0 to 7, vectorised in numpy.

Counts come from the training text and, for each held-out file, from the bytes of that file already seen (weighted,
since a file repeats itself more than it repeats others). Orders are interpolated by Witten and Bell's rule (method C of
Bell, Cleary & Witten 1990, "Text Compression"):

    p_k(b | c) = (n(cb) + t(c) p_{k-1}(b | c')) / (n(c) + t(c)),   p_{-1} = 1/256

with ``n`` the count and ``t(c)`` the number of different bytes seen after context ``c``.
"""

import numpy as np

MAX_ORDER = 7  # context and byte together fit 64 bits, so keys are exact and need no hashing


def ngram_bits_per_byte(train: bytes, heldout: list[bytes], order: int, own_weight: float) -> float:
    """Bits per byte of the held-out files; ``own_weight`` is what a count from the file itself is worth."""
    assert 0 <= order <= MAX_ORDER
    text = np.frombuffer(b"".join(heldout), np.uint8).astype(np.uint64)
    file = np.repeat(np.arange(len(heldout)), [len(data) for data in heldout])
    start = np.repeat(np.cumsum([0] + [len(data) for data in heldout[:-1]]), [len(data) for data in heldout])
    within = np.arange(len(text)) - start
    source = np.frombuffer(train, np.uint8).astype(np.uint64)
    probability = np.full(len(text), 1 / 256)
    for k in range(order + 1):
        known = Counts(_keys(source, k)[k:])
        key = _keys(text, k)
        at = np.flatnonzero(within >= k)
        keys, files = key[at], file[at]
        full = _rank(keys, files)
        n_full = known.full(keys) + own_weight * full
        first_time = (known.full(keys) == 0) & (full == 0)
        n_context = known.context(keys >> np.uint64(8)) + own_weight * _rank(keys >> np.uint64(8), files)
        types = known.types(keys >> np.uint64(8)) + _rank(keys >> np.uint64(8), files, first_time)
        seen = n_context > 0
        mixed = (n_full + types * probability[at]) / np.where(seen, n_context + types, 1)
        probability[at] = np.where(seen, mixed, probability[at])
    return float(-np.log2(probability).mean())


class Counts:
    """Counts of (context, byte) keys, of contexts, and of different bytes per context."""

    def __init__(self, keys: np.ndarray) -> None:
        self.keys, self.counts = np.unique(keys, return_counts=True)
        contexts = self.keys >> np.uint64(8)
        self.contexts, first, self.n_types = np.unique(contexts, return_index=True, return_counts=True)
        self.totals = np.add.reduceat(self.counts, first)

    def full(self, keys: np.ndarray) -> np.ndarray:
        """Count of each key (0 where unknown)."""
        return _look_up(self.keys, self.counts, keys)

    def context(self, contexts: np.ndarray) -> np.ndarray:
        """Count of each context."""
        return _look_up(self.contexts, self.totals, contexts)

    def types(self, contexts: np.ndarray) -> np.ndarray:
        """Number of different bytes after each context."""
        return _look_up(self.contexts, self.n_types, contexts)


def _keys(text: np.ndarray, order: int) -> np.ndarray:
    """For each position the byte there (lowest 8 bits) and the ``order`` bytes before it, as one integer."""
    keys = text.copy()
    for back in range(1, order + 1):
        keys[back:] |= text[:-back] << np.uint64(8 * back)
    return keys


def _look_up(known: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return np.where(known[at] == wanted, values[at], 0)


def _rank(keys: np.ndarray, files: np.ndarray, marked: np.ndarray | None = None) -> np.ndarray:
    """How often each key occurred earlier in the same file (only marked occurrences, if given)."""
    order = np.lexsort((keys, files))  # stable: equal keys of a file stay in the order of the text
    sorted_keys, sorted_files = keys[order], files[order]
    new = np.r_[True, (sorted_keys[1:] != sorted_keys[:-1]) | (sorted_files[1:] != sorted_files[:-1])]
    weight = np.ones(len(keys), np.int64) if marked is None else marked[order].astype(np.int64)
    before = np.cumsum(weight) - weight
    group = np.maximum.accumulate(np.where(new, np.arange(len(keys)), 0))
    rank = np.empty(len(keys), np.int64)
    rank[order] = before - before[group]
    return rank
