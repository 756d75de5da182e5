"""Who corresponds to whom: one-to-one (Hungarian) and many-to-one (semi-matching), from one pass over the tiles.

Li et al. 2015, arXiv:1511.07543, section 3. The maximum-weight one-to-one matching is exact up to ``exact_up_to``
features; above that it is the best one among each feature's strongest ``candidates`` partners (by row and by column),
and says so. Features without similarity (dead, constant) take no part.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from saelab.analysis.compare.similarity import Similarity, tile_rows

EXACT_UP_TO = 4096
CANDIDATES = 16
_NONE = -np.inf


@dataclass(frozen=True, eq=False)
class Matching:
    """Correspondences between n_a features of A and n_b of B under one similarity."""

    best_b: Int64[np.ndarray, " n_a"]
    """Semi-matching: the most similar feature of B for each of A; -1 for a feature without similarity."""
    best_b_value: Float64[np.ndarray, " n_a"]
    """Its similarity (NaN without)."""
    best_a: Int64[np.ndarray, " n_b"]
    """The same from B to A."""
    best_a_value: Float64[np.ndarray, " n_b"]
    """Its similarity."""
    pair_a: Int64[np.ndarray, " pairs"]
    """One-to-one matching: features of A ..."""
    pair_b: Int64[np.ndarray, " pairs"]
    """... and their partners in B."""
    pair_value: Float64[np.ndarray, " pairs"]
    """Similarity of each pair."""
    exact: bool
    """Whether the one-to-one matching is the best there is, or the best among ``candidates`` per feature."""

    @property
    def live_a(self) -> int:
        """Features of A that took part."""
        return int((self.best_b >= 0).sum())

    @property
    def live_b(self) -> int:
        """Features of B that took part."""
        return int((self.best_a >= 0).sum())

    @property
    def mutual(self) -> int:
        """Pairs that are each other's most similar feature."""
        partner = np.where(self.best_b >= 0, self.best_a[self.best_b], -1)
        return int(((partner == np.arange(len(partner))) & (self.best_b >= 0)).sum())

    def summary(self) -> dict[str, Any]:
        """Means and shares: of best similarities (MMCS, where the similarity is the cosine) and of matched ones."""
        return {
            "mean_best_a_to_b": _mean(self.best_b_value),
            "mean_best_b_to_a": _mean(self.best_a_value),
            "mean_matched": _mean(self.pair_value),
            "matched": len(self.pair_value),
            "mutual": self.mutual,
            "exact": self.exact,
            **{f"share_best_a_over_{t}": _share(self.best_b_value, t) for t in (0.5, 0.7, 0.9)},
            **{f"share_best_b_over_{t}": _share(self.best_a_value, t) for t in (0.5, 0.7, 0.9)},
            **{f"share_matched_over_{t}": _share(self.pair_value, t) for t in (0.5, 0.7, 0.9)},
            "live_a": self.live_a,
            "live_b": self.live_b,
        }


def match(similarity: Similarity, *, exact_up_to: int = EXACT_UP_TO, candidates: int = CANDIDATES) -> Matching:
    """Match the features of A and B, reading each tile of the similarity once."""
    n_a, n_b = similarity.shape
    exact = max(n_a, n_b) <= exact_up_to
    whole = np.full((n_a, n_b), _NONE, np.float32) if exact else None
    by_row, by_column = _Edges(), _ColumnTop(n_b, candidates)
    best_b, value_b = np.full(n_a, -1, np.int64), np.full(n_a, np.nan)
    for of in tile_rows((n_a, n_b)):
        tile = similarity.tile(of)
        tile[np.isnan(tile)] = _NONE
        where = tile.argmax(1)
        value = tile[np.arange(len(of)), where]
        found = value > _NONE
        best_b[of[found]], value_b[of[found]] = where[found], value[found]
        by_column.update(of, tile, 1 if exact else candidates)
        if whole is not None:
            whole[of] = tile
        else:
            by_row.add(of, tile, candidates)
    top_rows, top_values = by_column.ids[0], by_column.values[0].astype(np.float64)
    best_a = np.where(top_values > _NONE, top_rows, -1)
    value_a = np.where(top_values > _NONE, top_values, np.nan)
    edges = () if exact else (*by_row.all(), *by_column.edges())
    pairs = _assign_sparse(n_a, n_b, *edges) if whole is None else _assign_dense(whole)
    return Matching(best_b, value_b, best_a, value_a, *pairs, exact=exact)


class _Edges:
    """Strongest partners of each row."""

    def __init__(self) -> None:
        self.parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, of: np.ndarray, tile: np.ndarray, q: int) -> None:
        q = min(q, tile.shape[1])
        columns = np.argpartition(tile, -q, axis=1)[:, -q:]
        values = np.take_along_axis(tile, columns, 1)
        self.parts.append((np.repeat(of, q), columns.ravel(), values.ravel()))

    def all(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows, columns, values = (np.concatenate(column) for column in zip(*self.parts, strict=True))
        return rows, columns, values


class _ColumnTop:
    """Strongest rows of each column so far, strongest first; equal values go to the smaller row."""

    def __init__(self, n: int, q: int) -> None:
        self.q = q
        self.values = np.full((1, n), _NONE, np.float32)
        self.ids = np.full((1, n), -1, np.int64)

    def update(self, of: np.ndarray, tile: np.ndarray, q: int) -> None:
        if q == 1:
            where = tile.argmax(0)
            value = tile[where, np.arange(tile.shape[1])]
            better = value > self.values[0]
            self.values[0, better], self.ids[0, better] = value[better], of[where[better]]
            return
        q_tile = min(q, tile.shape[0])
        rows = np.argpartition(tile, -q_tile, axis=0)[-q_tile:]
        values = np.concatenate([self.values, np.take_along_axis(tile, rows, 0).astype(np.float32)])
        ids = np.concatenate([self.ids, of[rows]])
        order = np.argsort(-values, axis=0, kind="stable")[:q]
        self.values, self.ids = np.take_along_axis(values, order, 0), np.take_along_axis(ids, order, 0)

    def edges(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        columns = np.broadcast_to(np.arange(self.ids.shape[1]), self.ids.shape)
        return self.ids.ravel(), columns.ravel(), self.values.ravel()


def _assign_dense(whole: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Maximum-weight matching of all live rows with live columns (as many pairs as the smaller side has)."""
    from scipy.optimize import linear_sum_assignment

    rows = np.flatnonzero((whole > _NONE).any(1))
    columns = np.flatnonzero((whole > _NONE).any(0))
    live = whole[np.ix_(rows, columns)].astype(np.float64)
    i, j = linear_sum_assignment(live, maximize=True)
    return rows[i].astype(np.int64), columns[j].astype(np.int64), live[i, j]


def _assign_sparse(n_a: int, n_b: int, *edges: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Maximum-weight matching among given edges; a feature whose candidates are all taken stays without a partner."""
    from scipy import sparse
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    rows, columns, values = (np.concatenate(edges[k::3]) for k in range(3))
    kept = values > _NONE
    rows, columns, values = rows[kept], columns[kept], values[kept].astype(np.float64)
    keys, first = np.unique(rows * n_b + columns, return_index=True)
    rows, columns, values = keys // n_b, keys % n_b, values[first]
    # SciPy wants every row matched: each gets a partner of its own, cheaper than any real one, to stay alone with.
    alone = np.arange(n_a)
    graph = sparse.csr_matrix(
        (
            np.concatenate([values + 2.0, np.full(n_a, 0.01)]),
            (np.concatenate([rows, alone]), np.concatenate([columns, n_b + alone])),
        ),
        shape=(n_a, n_b + n_a),
    )
    i, j = min_weight_full_bipartite_matching(graph, maximize=True)
    real = j < n_b
    i, j = i[real].astype(np.int64), j[real].astype(np.int64)
    return i, j, np.asarray(graph[i, j], np.float64).ravel() - 2.0


def _mean(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else float("nan")


def _share(values: np.ndarray, threshold: float) -> float:
    values = values[np.isfinite(values)]
    return float((values > threshold).mean()) if len(values) else float("nan")
