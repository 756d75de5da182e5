"""Many-to-many: a rotated block is one mixed cluster, though no two of its features correspond."""

import numpy as np
import pytest
from scipy import sparse

from saelab.analysis.compare import CodeMatrix
from saelab.analysis.compare.matching import match
from saelab.analysis.compare.similarity import Correlation
from saelab.analysis.compare.spectral import _cut, cluster_summary, clusters
from tests.analysis.compare.planted import codes, sparse_codes, unit


def rotated(n=16):
    """A, and B with its first four features rotated among themselves, and a decoder for each."""
    rng = np.random.default_rng(5)
    # A Hadamard rotation: every new feature is half each old one, up to sign.
    turn = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    matrix = sparse_codes(6000, n)
    block = sparse.csc_matrix(matrix[:, :4].toarray() @ turn)
    a, b = CodeMatrix(matrix), CodeMatrix(sparse.hstack([block, matrix[:, 4:]]))
    w_a = unit(n, 32, rng)
    return a, b, w_a, np.concatenate([turn.T @ w_a[:4], w_a[4:]])


def test_rotated_block_is_one_mixed_cluster():
    a, b, w_a, w_b = rotated()
    matched = match(Correlation(a, b))
    assert matched.best_b_value[:4].max() < 0.62
    assert matched.best_b_value[4:].min() > 0.999
    found = clusters(a, b, decoders=(w_a, w_b))
    summary = cluster_summary(found)
    assert summary["pair"]["clusters"] == 12
    assert summary["mixed"] == {"clusters": 1, "features_a": 4, "features_b": 4}
    mixed = found[0]
    assert mixed.kind == "mixed"
    assert mixed.a.tolist() == mixed.b.tolist() == [0, 1, 2, 3]
    assert mixed.canonical == pytest.approx(np.ones(4))
    assert mixed.angles == pytest.approx(np.ones(4))


def test_unrelated_features_stand_alone():
    found = cluster_summary(clusters(codes(6000, 12, seed=1), codes(6000, 12, seed=2)))
    assert found["alone"]["clusters"] == found["clusters"] == 24
    assert np.isnan(found["mixed_mean_canonical"])


def test_large_component_is_cut_where_it_is_thin():
    """Four cliques of 12 joined by weak single edges: spectral clustering gives the cliques back."""
    graph = np.kron(np.eye(4), np.full((12, 12), 0.8))
    for k in range(3):
        graph[12 * k, 12 * (k + 1)] = graph[12 * (k + 1), 12 * k] = 0.2
    np.fill_diagonal(graph, 0)
    parts = _cut(sparse.csr_matrix(graph), np.arange(48), 16, np.random.default_rng(0))
    assert sorted(sorted(part.tolist()) for part in parts) == [list(range(12 * k, 12 * k + 12)) for k in range(4)]
