"""Streaming counts in numpy: histograms, distributions of integers, the k largest. No torch is imported here.

Like all accumulators of :mod:`saelab.core.statistics`: ``update`` with a batch, ``merge`` with another's, ``result``.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64


@dataclass(frozen=True, eq=False)
class HistogramResult:
    """Counts of values in bins."""

    edges: Float64[np.ndarray, " bins_plus_1"]
    """Bin edges; bin b holds ``edges[b] <= v < edges[b + 1]``, the last bin its upper edge too."""
    counts: Int64[np.ndarray, " bins"]
    """Number of values in each bin."""
    below: int
    """Number of values under the first edge."""
    above: int
    """Number of values over the last edge."""


class Histogram:
    """Counts of a stream of numbers in fixed bins."""

    def __init__(self, edges: Float64[np.ndarray, " bins_plus_1"]) -> None:
        assert len(edges) > 1, "two edges at least"
        assert bool((np.diff(edges) > 0).all()), "edges must rise"
        self.edges = edges
        self._counts = np.zeros(len(edges) + 1, np.int64)

    @staticmethod
    def linear(low: float, high: float, bins: int) -> "Histogram":
        """``bins`` bins of equal width."""
        return Histogram(np.linspace(low, high, bins + 1))

    @staticmethod
    def log(low: float, high: float, bins: int) -> "Histogram":
        """``bins`` bins of equal ratio; ``low`` must be positive."""
        return Histogram(np.geomspace(low, high, bins + 1))

    def update(self, values: np.ndarray) -> None:
        """Take in an array of any shape and real dtype."""
        values = np.asarray(values, np.float64).ravel()
        bins = np.searchsorted(self.edges, values, side="right")
        bins[values == self.edges[-1]] -= 1
        self._counts += np.bincount(bins, minlength=len(self._counts))

    def merge(self, other: "Histogram") -> None:
        """Take in everything that ``other``, of the same edges, has seen."""
        assert np.array_equal(self.edges, other.edges), "histograms of different edges"
        self._counts += other._counts

    def result(self) -> HistogramResult:
        """Return the counts so far."""
        return HistogramResult(self.edges, self._counts[1:-1].copy(), int(self._counts[0]), int(self._counts[-1]))


class IntegerCounts:
    """Exact distribution of a stream of small non-negative integers (features per token, say)."""

    def __init__(self) -> None:
        self.counts: Int64[np.ndarray, " values"] = np.zeros(1, np.int64)
        """How often 0, 1, 2, ... came."""

    def update(self, values: np.ndarray) -> None:
        """Take in an array of integers >= 0."""
        self._add(np.bincount(np.asarray(values).ravel()))

    def merge(self, other: "IntegerCounts") -> None:
        """Take in everything that ``other`` has seen."""
        self._add(other.counts)

    def _add(self, counts: np.ndarray) -> None:
        if len(counts) > len(self.counts):
            self.counts = np.pad(self.counts, (0, len(counts) - len(self.counts)))
        self.counts[: len(counts)] += counts

    @property
    def n(self) -> int:
        """Number of integers seen."""
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        """Their mean (nan when there are none)."""
        return float(self.counts @ np.arange(len(self.counts))) / self.n if self.n else float("nan")

    @property
    def std(self) -> float:
        """Their standard deviation (divided by n)."""
        squares = np.square(np.arange(len(self.counts)) - self.mean)
        return float(np.sqrt(self.counts @ squares / self.n)) if self.n else float("nan")

    def percentile(self, q: float) -> int:
        """Return the smallest value that at least ``q`` percent of the integers do not exceed."""
        assert self.n > 0, "percentile of nothing"
        rank = max(1, int(np.ceil(self.n * q / 100)))
        return int(np.searchsorted(np.cumsum(self.counts), rank))


class TopK:
    """The k largest of a stream of (value, id) pairs; equal values go to the smaller id."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.values: np.ndarray = np.empty(0, np.float32)
        """Largest values so far, descending."""
        self.ids: Int64[np.ndarray, " kept"] = np.empty(0, np.int64)
        """Their ids."""

    def update(self, values: np.ndarray, ids: np.ndarray) -> None:
        """Take in one value for each id; an id is given once over the whole stream."""
        if not self.k:
            return
        if len(self.values) == self.k:
            hopeful = values >= self.values[-1]
            values, ids = values[hopeful], ids[hopeful]
        elif len(values) > self.k:
            hopeful = values >= np.partition(values, len(values) - self.k)[len(values) - self.k]
            values, ids = values[hopeful], ids[hopeful]
        values = np.concatenate([self.values, np.asarray(values, np.float32)])
        ids = np.concatenate([self.ids, np.asarray(ids, np.int64)])
        order = np.lexsort((ids, -values))[: self.k]
        self.values, self.ids = values[order], ids[order]

    def merge(self, other: "TopK") -> None:
        """Take in everything that ``other`` has kept."""
        self.update(other.values, other.ids)
