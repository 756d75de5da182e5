"""Moments and correlations of sparse codes are those of the dense matrix."""

import numpy as np
import pytest
import torch
from scipy import sparse

from saelab.analysis.compare import CodeMatrix
from saelab.analysis.compare.codes import correlation, pair_statistics
from saelab.core.code import SparseCode
from saelab.core.errors import ActivationError
from tests.analysis.compare.planted import codes


def test_correlation_is_numpys():
    a, b = codes(500, 12, 0.2, seed=1), codes(500, 9, 0.3, seed=2)
    dense = np.corrcoef(a.columns.toarray().T, b.columns.toarray().T)[:12, 12:]
    np.testing.assert_allclose(correlation(a, np.arange(12), b), dense, atol=1e-12)
    np.testing.assert_allclose(correlation(a, np.array([7, 2]), b), dense[[7, 2]], atol=1e-12)


def test_features_that_do_not_vary_have_no_correlation():
    dense = np.random.default_rng(0).random((50, 3))
    dense[:, 1] = 0.0
    dense[:, 2] = 7.0
    a = CodeMatrix(sparse.csr_matrix(dense))
    found = correlation(a, np.arange(3), a)
    assert a.varies.tolist() == [True, False, False]
    assert np.isfinite(found[0, 0])
    assert np.isnan(found[1:]).all()
    assert np.isnan(found[:, 1:]).all()


def test_pair_statistics_by_hand():
    x = np.array([1.0, 2.0, 0.0, 0.0, 0.0, 3.0])
    y = np.array([2.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    a, b = (CodeMatrix(sparse.csc_matrix(v[:, None])) for v in (x, y))
    found = pair_statistics(a, np.array([0]), b, np.array([0]))
    on = (x > 0) | (y > 0)
    assert found["correlation"][0] == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert found["either"][0] == pytest.approx(np.corrcoef(x[on], y[on])[0, 1])
    assert found["jaccard"][0] == pytest.approx(2 / 4)


def test_from_codes_stacks_batches():
    dense = torch.relu(torch.randn(30, 8, generator=torch.Generator().manual_seed(0)))
    parts = [SparseCode.from_dense(dense[:10]), SparseCode.from_dense(dense[10:])]
    made = CodeMatrix.from_codes(parts)
    np.testing.assert_allclose(made.columns.toarray(), dense.numpy(), rtol=1e-6)
    np.testing.assert_array_equal(made.counts, (dense > 0).sum(0))
    np.testing.assert_allclose(made.std, dense.double().std(0, correction=0), rtol=1e-5)
    np.testing.assert_allclose(made.permuted(np.arange(29, -1, -1)).columns.toarray(), dense.flip(0), rtol=1e-6)


def test_nan_is_refused():
    with pytest.raises(ActivationError, match="NaN or infinity"):
        CodeMatrix(sparse.csr_matrix([[1.0, np.nan]]))
