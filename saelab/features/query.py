"""Questions to a feature store: contexts, samples over the range, histograms, features that fire together."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Float32, Int64, Integer

from saelab.core.counts import Histogram, HistogramResult
from saelab.core.errors import ConfigError
from saelab.features import layout
from saelab.features.ragged import Array, largest_of_runs, runs, top_entries
from saelab.features.store import FeatureStore
from saelab.features.summary import TOP

if TYPE_CHECKING:
    import pandas as pd

PIECE = 1 << 20
"""Entries of a feature looked at in one go where all are needed."""


@dataclass(frozen=True, eq=False)
class Context:
    """A stretch of text around one activation of a feature."""

    feature: int
    """The feature."""
    tokens: tuple[str, ...]
    r"""Texts of the tokens; parts of characters as ``\xe2``."""
    token_ids: Int64[np.ndarray, " n"]
    """Their ids."""
    values: Float32[np.ndarray, " n"]
    """The feature's value at each token, 0 where it does not fire."""
    peak: int
    """Index, in ``tokens``, of the activation that the context is about."""
    row: int
    """Row of text."""
    position: int
    """Position of the peak in its row."""
    start: int
    """Number, in the store, of the first token."""
    text: str
    """The tokens joined; characters that lie across tokens are whole."""

    @property
    def value(self) -> float:
        """The feature's value at the peak."""
        return float(self.values[self.peak])


@dataclass(frozen=True, eq=False)
class Interval:
    """Some activations of a feature, drawn from a part of its range."""

    low: float
    """Smallest value of the part (``by="quantile"``) or its lower edge (``by="value"``)."""
    high: float
    """Largest value, or upper edge."""
    count: int
    """Activations in this part."""
    contexts: tuple[Context, ...]
    """The drawn ones, strongest first."""


def contexts_at(
    store: FeatureStore, i: int, chosen: Integer[np.ndarray, " contexts"], before: int = 20, after: int = 10
) -> list[Context]:
    """Return the text around each of some tokens, never past its row, with the values of feature i."""
    tokens, values = store.feature(i)
    chosen = chosen.astype(np.int64)
    rows, row_starts, row_stops = store.rows_of(chosen)
    starts, stops = np.maximum(row_starts, chosen - before), np.minimum(row_stops, chosen + after + 1)
    firsts, lasts = (np.searchsorted(tokens, edges.astype(tokens.dtype)) for edges in (starts, stops))
    contexts = []
    columns = (chosen, rows, row_starts, starts, stops, firsts, lasts)
    for token, row, row_start, start, stop, first, last in zip(*(c.tolist() for c in columns), strict=True):
        dense = np.zeros(stop - start, np.float32)
        dense[tokens[first:last].astype(np.int64) - start] = values[first:last]
        ids = store.token_ids(start, stop)
        contexts.append(
            Context(
                feature=i,
                tokens=tuple(store.vocabulary.strings(ids)),
                token_ids=ids.astype(np.int64),
                values=dense,
                peak=token - start,
                row=row,
                position=token - row_start,
                start=start,
                text=store.vocabulary.text(ids),
            )
        )
    return contexts


def top_contexts(
    store: FeatureStore, i: int, n: int = 20, *, before: int = 20, after: int = 10, distinct_rows: bool = True
) -> list[Context]:
    """Return the contexts of the n strongest activations of feature i, strongest first, equals in order of the text.

    ``distinct_rows`` takes one activation, the strongest, from each row of text. Up to the 64 that are listed in the
    store, the time does not depend on the size of the text; for more, all entries of the feature are looked at.
    """
    _at_least("n", n, 0)
    _at_least("before", before, 0)
    _at_least("after", after, 0)
    tokens, values = store.feature(i)
    entries = store.strongest(i, distinct_rows)
    if n > len(entries) == TOP:
        entries = _strongest_of_all(store, tokens, values, n, distinct_rows)
    return contexts_at(store, i, tokens[entries[:n]], before, after)


def _strongest_of_all(store: FeatureStore, tokens: Array, values: Array, n: int, distinct_rows: bool) -> Array:
    values = np.array(values)
    if not distinct_rows:
        return top_entries(np.array([0, len(values)]), values, n)[1]
    rows = np.searchsorted(store.array(layout.ROW_OFFSETS), tokens, side="right")
    strongest = largest_of_runs(runs(rows), values)
    best: Array = strongest[top_entries(np.array([0, len(strongest)]), values[strongest], n)[1]]
    return best


def interval_samples(
    store: FeatureStore,
    i: int,
    n_intervals: int = 10,
    per_interval: int = 5,
    *,
    seed: int = 0,
    by: Literal["quantile", "value"] = "quantile",
    before: int = 20,
    after: int = 10,
) -> list[Interval]:
    """Contexts drawn from each part of the range of feature i, highest part first.

    ``by="quantile"`` cuts its activations into parts of equal number, ``by="value"`` cuts 0 .. maximum into parts of
    equal width. Within a part, activations are drawn without replacement; the same seed draws the same. Parts without
    activations are there with a count of 0 (``by="value"``) or left out (fewer activations than parts).
    """
    _at_least("n_intervals", n_intervals, 1)
    _at_least("per_interval", per_interval, 0)
    if by not in ("quantile", "value"):
        raise ConfigError(f"by is '{by}', expected 'quantile' or 'value'")
    tokens, mapped = store.feature(i)
    values = np.array(mapped)
    if not len(values):
        return []
    order = np.argsort(values, kind="stable")
    if by == "quantile":
        parts = [part for part in np.array_split(order, n_intervals) if len(part)]
        edges = [(float(values[part[0]]), float(values[part[-1]])) for part in parts]
    else:
        cuts = np.linspace(0, float(values[order[-1]]), n_intervals + 1)
        parts = np.split(order, np.searchsorted(values[order], cuts[1:-1], side="left"))
        edges = list(zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True))
    generator = np.random.default_rng([seed, i])
    intervals = []
    for part, (low, high) in zip(parts, edges, strict=True):
        drawn = generator.choice(part, min(per_interval, len(part)), replace=False) if len(part) else part
        drawn = drawn[np.lexsort((drawn, -values[drawn]))]
        contexts = tuple(contexts_at(store, i, tokens[drawn], before, after))
        intervals.append(Interval(low, high, len(part), contexts))
    return intervals[::-1]


def histogram(store: FeatureStore, i: int, bins: int = 50, *, log: bool = False) -> HistogramResult:
    """Histogram of the active values of feature i: from 0 to its maximum, or, ``log``, from its minimum.

    A feature that never fires has all counts 0 over 0 .. 1.
    """
    _at_least("bins", bins, 1)
    _, values = store.feature(i)
    high = float(store.column("max")[i])
    if not len(values):
        return Histogram.linear(0, 1, bins).result()
    result = Histogram.linear(0, high, bins)
    if log:
        low = min(float(values[k : k + PIECE].min()) for k in range(0, len(values), PIECE))
        result = Histogram.log(low, high, bins) if low < high else result
    for k in range(0, len(values), PIECE):
        result.update(values[k : k + PIECE])
    return result.result()


def co_active(store: FeatureStore, i: int, n: int = 20, *, max_tokens: int = 20_000) -> "pd.DataFrame":
    """Return the n features that most often fire on the tokens where feature i fires.

    When it fires on more than ``max_tokens``, that many are taken at even distances. Columns: ``feature``, ``together``
    (tokens, of those looked at), ``share`` (of those looked at), ``lift`` (share / the feature's own density), and
    ``jaccard`` (both / either, scaled up from the share).
    """
    import pandas as pd

    _at_least("n", n, 0)
    _at_least("max_tokens", max_tokens, 1)
    tokens, _ = store.feature(i)
    looked = min(len(tokens), max_tokens)
    chosen = tokens[np.linspace(0, len(tokens) - 1, looked).astype(np.int64)].astype(np.int64)
    indptr = store.array(layout.INDPTR)
    starts, lengths = indptr[chosen], indptr[chosen + 1] - indptr[chosen]
    inside = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    together = np.bincount(store.array(layout.INDICES)[np.repeat(starts, lengths) + inside], minlength=store.n_features)
    together[i] = 0
    best = np.argsort(-together, kind="stable")[:n]
    best = best[together[best] > 0]
    count = np.array(store.column("count"))[best]
    share = together[best] / max(looked, 1)
    both = share * len(tokens)
    return pd.DataFrame(
        {
            "feature": best,
            "together": together[best],
            "share": share,
            "lift": share / (count / store.n_kept),
            "jaccard": both / np.maximum(count + len(tokens) - both, 1e-12),
        }
    )


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name} is {value}, expected at least {least}")
