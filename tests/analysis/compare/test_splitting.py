"""Split and novel features of a planted pair."""

import numpy as np
import pytest
from scipy import sparse

from saelab.analysis.compare import CodeMatrix
from saelab.analysis.compare.splitting import splitting
from tests.analysis.compare.planted import sparse_codes, unit


@pytest.fixture
def planted():
    """Small: 6 features. Large: feature 0 split by a gate, 1 to 4 kept, 5 missing, and three new ones."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((32, 32)))[0].T
    small = basis[:6]
    near = basis[0] + 0.3 * basis[20:22]
    large = np.concatenate([near, basis[1:5], basis[10:13]])
    matrix = sparse_codes(8000, 9)
    gate = rng.random(8000) < 0.5
    first = matrix[:, 0].toarray()[:, 0]
    halves = sparse.csc_matrix(np.stack([first * gate, first * ~gate], 1))
    codes = (CodeMatrix(matrix[:, :6]), CodeMatrix(sparse.hstack([halves, matrix[:, 1:5], matrix[:, 6:9]])))
    return small, large, codes


def test_planted_split_and_novel(planted):
    small, large, codes = planted
    found = splitting(small, large, name="a", codes=codes)
    assert [len(group) for group in found.groups] == [2, 1, 1, 1, 1, 0]
    assert found.split.tolist() == [True] + [False] * 5
    assert found.r2_group[0] == pytest.approx(1)
    assert found.r2_single[0] == pytest.approx(0.5, abs=0.05)
    assert found.r2_single[1:5] == pytest.approx(np.ones(4))
    assert np.isnan(found.r2_single[5])
    assert found.novel.tolist() == [False] * 6 + [True] * 3
    summary = found.summary()
    assert (summary["split"], summary["novel"], summary["with_none"]) == (1, 3, 1)


def test_two_near_directions_alone_are_no_split(planted):
    """Both near features carry the whole activation: the second adds nothing, so the feature is doubled, not split."""
    small, large, codes = planted
    doubled = codes[1].columns.tolil()
    doubled[:, 0] = codes[0].columns[:, 0]
    doubled[:, 1] = codes[0].columns[:, 0]
    found = splitting(small, large, name="a", codes=(codes[0], CodeMatrix(doubled)))
    assert len(found.groups[0]) == 2
    assert not found.split[0]
    assert splitting(small, large, name="a").split[0]  # by directions alone it cannot be told


def test_dead_features_are_neither(planted):
    small, large, codes = planted
    silent = codes[1].columns.tolil()
    silent[:, 8] = 0
    found = splitting(small, large, name="a", codes=(codes[0], CodeMatrix(silent)))
    assert np.isnan(found.largest_cosine[8])
    assert found.novel.tolist() == [False] * 6 + [True] * 2 + [False]


def test_random_directions_are_novel():
    rng = np.random.default_rng(0)
    found = splitting(unit(20, 64, rng), unit(40, 64, rng), name="b")
    assert found.summary()["novel_share"] == 1.0
    assert found.summary()["small"] == "b"
