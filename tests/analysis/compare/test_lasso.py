"""One-to-many: planted sums are found, and the solution is that of another solver."""

import numpy as np
import pytest
from scipy import sparse

from saelab.analysis.compare import CodeMatrix
from saelab.analysis.compare.lasso import one_to_many
from tests.analysis.compare.planted import sparse_codes

TINY = (0.3, 0.1, 0.01, 0.001, 1e-5)


def gated(n_tokens=20_000, n=24):
    """A, and B: the same with latent 0 split by a gate into two halves (its first two features)."""
    matrix = sparse_codes(n_tokens, n)
    gate = np.random.default_rng(7).random(n_tokens) < 0.5
    first = matrix[:, 0].toarray()[:, 0]
    halves = sparse.csc_matrix(np.stack([first * gate, first * ~gate], 1))
    return CodeMatrix(matrix), CodeMatrix(sparse.hstack([halves, matrix[:, 1:]]))


def test_split_latent_is_the_sum_of_its_halves():
    a, b = gated()
    found = one_to_many(b, a, np.array([0, 3]), lambdas=TINY)
    assert found.needed.tolist() == [2, 1]
    assert set(found.predictors[0, :2]) == {0, 1}
    assert found.nonzero[:, -1].tolist() == [2, 1]
    assert found.r2[:, -1] == pytest.approx([1, 1], abs=1e-6)
    assert found.best_single[0] == pytest.approx(0.5, abs=0.05)
    assert found.violations == 0
    # The weights of the penalty at which 90 % are reached are shrunk; at the smallest penalty they are 1.
    last = one_to_many(b, a, np.array([0, 3]), lambdas=(1e-5,))
    assert last.weights[0, :2] == pytest.approx([1, 1], abs=1e-3)
    assert last.weights[1, 0] == pytest.approx(1, abs=1e-3)
    assert (last.predictors[:, 2:] == -1).all()


def test_agrees_with_scikit_learn():
    """More predictors than candidates at first, so that the optimality rounds have work."""
    lasso = pytest.importorskip("sklearn.linear_model").Lasso
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((3000, 20))
    predictors = np.maximum(hidden @ rng.standard_normal((20, 90)) - 3, 0)
    targets = np.maximum(hidden @ rng.standard_normal((20, 5)) - 3, 0)
    a, b = (CodeMatrix(sparse.csr_matrix(x)) for x in (predictors, targets))
    x, y = ((m - m.mean(0)) / m.std(0) for m in (predictors, targets))
    lambdas = (0.2, 0.05, 0.01)
    found = one_to_many(a, b, np.arange(5), lambdas=lambdas)
    assert found.violations == 0
    for k, penalty in enumerate(lambdas):
        for t in range(5):
            w = lasso(alpha=penalty, fit_intercept=False, tol=1e-10, max_iter=100_000).fit(x, y[:, t]).coef_
            r2 = 1 - np.square(y[:, t] - x @ w).mean()
            assert found.r2[t, k] == pytest.approx(r2, abs=3e-3)
            assert abs(found.nonzero[t, k] - (np.abs(w) > 1e-8).sum()) <= 3


def test_unpredictable_target_needs_none():
    a = CodeMatrix(sparse_codes(5000, 10, seed=1))
    b = CodeMatrix(sparse_codes(5000, 10, seed=2))
    found = one_to_many(a, b, np.arange(4), lambdas=(0.3, 0.1))
    assert (found.nonzero == 0).all()
    assert (found.needed == 0).all()
    assert (found.r2 == 0).all()
