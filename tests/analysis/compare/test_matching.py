"""Matching recovers what was planted, whichever way it is computed."""

import numpy as np
import pytest

from saelab.analysis.compare import CodeMatrix, similarity
from saelab.analysis.compare.baseline import random_decoders, shuffled_tokens
from saelab.analysis.compare.matching import match
from saelab.analysis.compare.similarity import Correlation, Cosine
from tests.analysis.compare.planted import codes, sparse_codes, unit


@pytest.mark.parametrize(
    ("share", "mmcs", "hungarian"), [(0, 0.343, 0.327), (0.3, 0.540, 0.518), (0.7, 0.803, 0.780), (1, 1, 1)]
)
def test_shared_fraction(share, mmcs, hungarian):
    """The expected values of 256 unit features in 64 dimensions of which a share is common."""
    rng = np.random.default_rng(0)
    a, common = unit(256, 64, rng), round(share * 256)
    b = np.concatenate([a[:common], unit(256 - common, 64, rng)])[rng.permutation(256)]
    found = match(Cosine(a, b)).summary()
    assert found["mean_best_a_to_b"] == pytest.approx(mmcs, abs=0.012)
    assert found["mean_matched"] == pytest.approx(hungarian, abs=0.012)
    assert found["share_best_a_over_0.9"] == common / 256
    assert found["exact"]


def test_permutation_is_recovered():
    matrix, order = sparse_codes(4000, 24), np.random.default_rng(3).permutation(24)
    for exact_up_to in (100, 0):
        found = match(Correlation(CodeMatrix(matrix), CodeMatrix(matrix[:, order])), exact_up_to=exact_up_to)
        assert found.exact == (exact_up_to == 100)
        np.testing.assert_array_equal(order[found.pair_b], found.pair_a)
        np.testing.assert_array_equal(order[found.best_b], np.arange(24))
        np.testing.assert_array_equal(found.best_a, order)
        assert found.mutual == 24
        assert found.pair_value == pytest.approx(np.ones(24))


def test_tiles_and_candidates_change_nothing(monkeypatch):
    rng = np.random.default_rng(1)
    a, b = unit(60, 8, rng), unit(45, 8, rng)
    whole = match(Cosine(a, b))
    monkeypatch.setattr(similarity, "TILE_BYTES", 8 * 45 * 7)
    tiled = match(Cosine(a, b), exact_up_to=0, candidates=45)
    assert not tiled.exact
    for name in ("best_a", "best_b"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(tiled, name))
    assert tiled.pair_value.sum() == pytest.approx(whole.pair_value.sum(), abs=1e-5)
    few = match(Cosine(a, b), exact_up_to=0, candidates=5)
    assert whole.pair_value.sum() * 0.95 < few.pair_value.sum() <= whole.pair_value.sum() + 1e-5
    assert len(set(few.pair_a)) == len(set(few.pair_b)) == len(few.pair_a)


def test_dead_features_take_no_part():
    rng = np.random.default_rng(0)
    a = unit(10, 16, rng)
    a[3] = 0.0
    live = np.ones(10, bool)
    live[7] = False
    for exact_up_to in (100, 0):
        found = match(Cosine(a, a, live, None), exact_up_to=exact_up_to)
        assert (found.live_a, found.live_b) == (8, 9)
        assert found.best_b[3] == found.best_b[7] == -1
        assert 3 not in found.pair_a
        assert 7 not in found.pair_a
        assert found.summary()["mean_best_a_to_b"] == pytest.approx(1)


def test_chance_levels():
    rng = np.random.default_rng(0)
    vectors = random_decoders(256, 256, 64, rng, exact_up_to=4096)
    assert vectors.bound == pytest.approx(0.416, abs=5e-4)
    assert vectors.mean_best_a_to_b == pytest.approx(0.343, abs=0.012)
    assert vectors.mean_matched == pytest.approx(0.327, abs=0.012)
    assert vectors.mean_best_a_to_b < vectors.bound
    a = codes(4000, 24)
    shuffled = shuffled_tokens(a, a, rng, exact_up_to=4096)
    assert shuffled.mean_best_a_to_b < 0.08
    sampled = shuffled_tokens(a, a, rng, exact_up_to=0)
    assert sampled.mean_matched is None
    assert sampled.mean_best_b_to_a < 0.08
