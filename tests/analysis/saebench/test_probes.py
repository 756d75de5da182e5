"""Probes: known directions are found, chance is chance, and sparse and dense inputs agree."""

import numpy as np
import pytest
from scipy import sparse

from saelab.analysis.saebench.probes import balanced, f1_score, fit_probe, mean_difference, top_k


def test_direction_and_accuracy():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((600, 5)) * [1, 3, 1, 1, 1] + [0, 0, 50, 0, 0]
    y = x[:, 0] + (x[:, 2] - 50) > 0
    probe = fit_probe(x[:400], y[:400])
    assert probe.accuracy(x[400:], y[400:]) > 0.97
    scaled = np.abs(probe.weight * x.std(0))
    assert scaled[[0, 2]].min() > 5 * scaled[[1, 3, 4]].max()
    shuffled = fit_probe(x[:400], rng.permutation(y[:400]))
    assert shuffled.accuracy(x[400:], rng.permutation(y[400:])) == pytest.approx(0.5, abs=0.1)


def test_agrees_with_scikit_learn():
    model = pytest.importorskip("sklearn.linear_model").LogisticRegression(C=1.0, tol=1e-10, max_iter=1000)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((200, 3)) * [1, 3, 0.2] + 1
    y = x[:, 0] + 0.5 * rng.standard_normal(200) > 1
    scale = np.sqrt(x.var(0).mean())
    standard = (x - x.mean(0)) / scale
    theirs = model.fit(standard, y)
    ours = fit_probe(x, y)
    np.testing.assert_allclose(ours.weight * scale, theirs.coef_[0], rtol=2e-3)
    np.testing.assert_allclose(ours.logits(x), theirs.decision_function(standard), atol=5e-3)


def test_sparse_input_and_dead_columns():
    rng = np.random.default_rng(0)
    x = (rng.random((300, 6)) < 0.3) * rng.random((300, 6))
    x[:, 5] = 0
    y = x[:, 1] > 0
    probe = fit_probe(sparse.csr_matrix(x), y)
    assert probe.weight[5] == 0
    assert probe.accuracy(x, y) > 0.95
    np.testing.assert_allclose(probe.logits(sparse.csr_matrix(x)), probe.logits(x))
    np.testing.assert_allclose(mean_difference(sparse.csr_matrix(x), y), mean_difference(x, y))


def test_helpers():
    assert f1_score(np.array([1, 1, 0, 0], bool), np.array([1, 0, 1, 0], bool)) == 0.5
    assert f1_score(np.zeros(3, bool), np.ones(3, bool)) == 0
    assert top_k(np.array([1.0, 3, 3, 2]), 3).tolist() == [1, 2, 3]
    rows = balanced(np.arange(100) < 10, 50, np.random.default_rng(0))
    assert len(rows) == 20
    assert (rows < 10).sum() == 10
