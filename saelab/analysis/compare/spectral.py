"""Many-to-many: groups of features of A and B that span the same thing though no two of them correspond.

The affinity of two features, of either SAE, is the absolute correlation of their activations (kept where it is at
least ``edge``, and for each feature the strongest ``neighbours``). Its connected components are taken apart first:
they are what the zero eigenvalues of the Laplacian stand for. A component larger than ``largest`` is cut by
normalised spectral clustering (Ng, Jordan and Weiss 2002: k-means on the rows of the first eigenvectors of the
normalised Laplacian, rows at norm 1), as in Li et al. 2015, arXiv:1511.07543, section 5.
"""

from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64
from scipy import sparse

from saelab.analysis.compare.codes import CodeMatrix, correlation, pair_statistics
from saelab.analysis.compare.similarity import tile_rows, unit_rows

EDGE, NEIGHBOURS, LARGEST, MOST_CUTS = 0.2, 8, 32, 64


@dataclass(frozen=True, eq=False)
class Cluster:
    """Features that belong together."""

    a: Int64[np.ndarray, " n_a"]
    """Features of A."""
    b: Int64[np.ndarray, " n_b"]
    """Features of B."""
    canonical: Float64[np.ndarray, " k"]
    """Canonical correlations between the activations of the two sides, falling (empty unless both have members)."""
    angles: Float64[np.ndarray, " m"]
    """Cosines of the principal angles between the spans of their decoder rows, falling (empty where not shared)."""

    @property
    def kind(self) -> str:
        """``pair`` (1 and 1), ``split`` (1 and several), ``mixed`` (several and several) or ``alone`` (one side)."""
        small, large = sorted((len(self.a), len(self.b)))
        if small == 0:
            return "alone"
        return "mixed" if small > 1 else "pair" if large == 1 else "split"


def clusters(
    a: CodeMatrix,
    b: CodeMatrix,
    *,
    decoders: tuple[np.ndarray, np.ndarray] | None = None,
    seed: int = 0,
    edge: float = EDGE,
    neighbours: int = NEIGHBOURS,
    largest: int = LARGEST,
) -> list[Cluster]:
    """Return the clusters of all features that vary, largest first; ``decoders`` are those of A and B in one space."""
    affinity = _affinity(a, b, edge, neighbours)
    found: list[np.ndarray] = []
    varies = np.concatenate([a.varies, b.varies])
    count, label = sparse.csgraph.connected_components(affinity, directed=False)
    order = np.argsort(label, kind="stable")
    for members in np.split(order, np.cumsum(np.bincount(label, minlength=count))[:-1]):
        if varies[members].all():
            found += _cut(affinity, members, largest, np.random.default_rng([seed, int(members[0])]))
    found.sort(key=lambda members: (-len(members), int(members[0])))
    sides = [_sides(a, members) for members in found]
    # Most clusters are pairs: those all at once.
    of_a, of_b = (
        np.array([side[k][0] for side in sides if len(side[0]) == len(side[1]) == 1], np.int64) for k in (0, 1)
    )
    correlations = iter(np.abs(pair_statistics(a, of_a, b, of_b)["correlation"]))
    cosines = iter(np.abs(_cosines(decoders, of_a, of_b)))
    result = []
    for left, right in sides:
        if len(left) == len(right) == 1:
            result.append(Cluster(left, right, np.array([next(correlations)]), np.array(list(islice(cosines, 1)))))
        else:
            result.append(_describe(a, b, decoders, left, right))
    return result


def cluster_summary(found: list[Cluster]) -> dict[str, Any]:
    """Number of clusters of each kind, the features in them, and how far the mixed ones share their subspaces."""
    result: dict[str, Any] = {"clusters": len(found)}
    for kind in ("pair", "split", "mixed", "alone"):
        chosen = [c for c in found if c.kind == kind]
        result[kind] = {
            "clusters": len(chosen),
            "features_a": sum(len(c.a) for c in chosen),
            "features_b": sum(len(c.b) for c in chosen),
        }
    mixed = [c for c in found if c.kind == "mixed"]
    result["mixed_mean_canonical"] = _mean([float(c.canonical.mean()) for c in mixed])
    result["mixed_mean_angle_cosine"] = _mean([float(c.angles.mean()) for c in mixed if len(c.angles)])
    return result


def _affinity(a: CodeMatrix, b: CodeMatrix, edge: float, neighbours: int) -> Any:
    """Symmetric sparse |correlation| over the joint features, A's first."""
    n = a.n_features + b.n_features
    rows, columns, values = [], [], []
    for left, at in ((a, 0), (b, a.n_features)):
        for of in tile_rows((left.n_features, n)):
            tile = np.abs(np.concatenate([correlation(left, of, a), correlation(left, of, b)], 1))
            tile[np.isnan(tile)] = 0.0
            tile[np.arange(len(of)), at + of] = 0.0
            q = min(neighbours, n)
            best = np.argpartition(tile, -q, axis=1)[:, -q:]
            value = np.take_along_axis(tile, best, 1)
            keep = value >= edge
            rows.append(np.broadcast_to((at + of)[:, None], best.shape)[keep])
            columns.append(best[keep])
            values.append(value[keep])
    graph = sparse.csr_matrix((np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))), shape=(n, n))
    return graph.maximum(graph.T)


def _cut(affinity: Any, members: np.ndarray, largest: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Cut a connected component until no part is larger than ``largest``."""
    if len(members) <= largest:
        return [members]
    most = min(MOST_CUTS, max(2, -(-len(members) // (largest // 2))))
    least = min(most, max(2, len(members) // (8 * largest)))
    label = _spectral_labels(affinity[members][:, members], least, most, rng)
    parts = [members[label == value] for value in np.unique(label)]
    if len(parts) == 1:  # nothing to tell its members apart by
        return parts
    return [smaller for part in parts for smaller in _cut(affinity, part, largest, rng)]


def _spectral_labels(graph: Any, least: int, most: int, rng: np.random.Generator) -> np.ndarray:
    """Labels of normalised spectral clustering into as many clusters as the widest gap between eigenvalues says."""
    from scipy.cluster.vq import kmeans2
    from scipy.sparse.linalg import eigsh

    degree = np.asarray(graph.sum(1)).ravel()
    scale = 1 / np.sqrt(np.maximum(degree, 1e-12))
    normal = sparse.diags(scale) @ graph @ sparse.diags(scale)
    n = graph.shape[0]
    if n <= 512 or most + 1 >= n - 1:
        values, vectors = np.linalg.eigh(normal.toarray())
    else:
        values, vectors = eigsh(normal, k=most + 1, which="LA", v0=rng.standard_normal(n), tol=1e-3)
    order = np.argsort(-values)
    values = values[order]
    k = least + int(np.argmax(values[least - 1 : most] - values[least : most + 1]))
    vectors = vectors[:, order[:k]]
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    start = vectors[_spread(vectors, k, rng)]
    _, label = kmeans2(vectors, start, iter=30, minit="matrix", missing="warn")
    result: np.ndarray = label
    return result


def _spread(points: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """Starting points far from one another (k-means++)."""
    chosen = [int(rng.integers(len(points)))]
    distance = ((points - points[chosen[0]]) ** 2).sum(1)
    while len(chosen) < k and distance.max() > 1e-12:
        chosen.append(int(rng.choice(len(points), p=distance / distance.sum())))
        distance = np.minimum(distance, ((points - points[chosen[-1]]) ** 2).sum(1))
    return np.array(chosen)


def _sides(a: CodeMatrix, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features of A and of B among joint ones."""
    of_a = np.sort(members[members < a.n_features]).astype(np.int64)
    of_b = np.sort(members[members >= a.n_features]).astype(np.int64) - a.n_features
    return of_a, of_b


def _cosines(decoders: tuple[np.ndarray, np.ndarray] | None, of_a: np.ndarray, of_b: np.ndarray) -> np.ndarray:
    """Cosines of pairs of decoder rows (none where the space is not shared)."""
    if decoders is None:
        return np.zeros(0)
    rows_a, rows_b = unit_rows(decoders[0][of_a]), unit_rows(decoders[1][of_b])
    cosines: np.ndarray = (rows_a * rows_b).sum(1).astype(np.float64)
    return cosines


def _describe(
    a: CodeMatrix,
    b: CodeMatrix,
    decoders: tuple[np.ndarray, np.ndarray] | None,
    of_a: np.ndarray,
    of_b: np.ndarray,
) -> Cluster:
    none = np.zeros(0)
    if not len(of_a) or not len(of_b):
        return Cluster(of_a, of_b, none, none)
    left, right = (_white(x, of) for x, of in ((a, of_a), (b, of_b)))
    cross = _gram(a, of_a, b, of_b)
    canonical = np.clip(np.linalg.svd(left @ cross @ right.T, compute_uv=False), 0, 1)
    angles = none
    if decoders is not None:
        bases = [np.linalg.qr(w[of].T.astype(np.float64))[0] for w, of in zip(decoders, (of_a, of_b), strict=True)]
        angles = np.clip(np.linalg.svd(bases[0].T @ bases[1], compute_uv=False), 0, 1)
    return Cluster(of_a, of_b, canonical, angles)


def _gram(a: CodeMatrix, of_a: np.ndarray, b: CodeMatrix, of_b: np.ndarray) -> np.ndarray:
    """Correlations among a few features."""
    product = (a.columns[:, of_a].T @ b.columns[:, of_b]).toarray() / a.n_tokens
    product -= np.outer(a.mean[of_a], b.mean[of_b])
    result: np.ndarray = product / np.outer(a.std[of_a], b.std[of_b])
    return result


def _white(a: CodeMatrix, of: np.ndarray) -> np.ndarray:
    """Rows that make some features uncorrelated with variance 1; directions without variance are left out."""
    value, vector = np.linalg.eigh(_gram(a, of, a, of))
    keep = value > 1e-8 * value.max()
    result: np.ndarray = (vector[:, keep] / np.sqrt(value[keep])).T
    return result


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else float("nan")
