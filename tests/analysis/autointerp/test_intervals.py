"""Intervals against what is known of them."""

import numpy as np
import pytest
from scipy.stats import pearsonr

from saelab.analysis.autointerp.intervals import auc, balanced, correlation, mean, proportion


def test_wilson():
    found = proportion(8, 10)
    assert (found.value, found.low, found.high) == pytest.approx((0.8, 0.490162, 0.943318), abs=1e-5)
    assert proportion(10, 10).high == 1.0
    assert 0 < proportion(10, 10).low < 1
    assert np.isnan(proportion(0, 0).value)


def test_balanced_covers_its_truth():
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        found = balanced(generator.binomial(50, 0.9), 50, generator.binomial(50, 0.5), 50)
        inside += found.low <= 0.7 <= found.high
    assert 0.92 <= inside / 400 <= 0.99


def test_auc():
    truth = np.array([True, True, False, False])
    assert auc(np.array([4.0, 3, 2, 1]), truth).value == 1.0
    assert auc(np.array([4.0, 3, 2, 1]), truth).low < 1
    assert auc(np.zeros(4), truth).value == 0.5
    assert auc(np.array([4.0, 1, 2, 2]), truth).value == 0.5
    assert np.isnan(auc(np.zeros(2), np.array([True, True])).value)
    generator = np.random.default_rng(1)
    inside = 0
    for _ in range(300):
        x = np.concatenate([generator.normal(1, 1, 50), generator.normal(0, 1, 50)])
        found = auc(x, np.arange(100) < 50)
        inside += found.low <= 0.7602 <= found.high  # Phi(1 / sqrt 2)
    assert 0.91 <= inside / 300 <= 0.99


def test_correlation():
    x = np.random.default_rng(0).normal(size=(2, 40))
    found, expected = correlation(x[0], x[1]), pearsonr(x[0], x[1])
    assert found.value == pytest.approx(expected.statistic)
    interval = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert correlation(x[0], 3 * x[0] + 1).value == pytest.approx(1.0)
    assert np.isnan(correlation(x[0], np.ones(40)).value)


def test_mean():
    found = mean(np.array([1.0, 2, 3, np.nan]))
    assert found.value == 2
    assert found.high - found.value == pytest.approx(1.96 / 3**0.5, abs=1e-3)
    assert mean(np.array([1.0, 5]), np.array([3.0, 1])).value == 2
    assert np.isnan(mean(np.array([np.nan])).value)
