import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab.core.statistics import Histogram, IntegerCounts, Moments, TopK


def test_moments_of_a_stream_equal_one_shot():
    x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5 + 2
    moments = Moments(3)
    for part in x.split([1, 0, 40, 59]):
        moments.update(part)
    assert moments.n == 100
    torch.testing.assert_close(moments.mean, x.mean(0))
    torch.testing.assert_close(moments.variance, x.var(0, unbiased=False))
    torch.testing.assert_close(moments.sum, x.sum(0))
    torch.testing.assert_close(moments.sum_of_squares, x.square().sum(0))
    assert moments.pooled_variance == pytest.approx(float((x - x.mean(0)).square().sum(1).mean()))


def test_moments_merge_equals_one_stream():
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
    parts = [Moments(4) for _ in range(3)]
    for moments, part in zip(parts, x.split([20, 30, 0]), strict=True):
        moments.update(part)
    whole = Moments(4)
    for part in parts:
        whole.merge(part)
    torch.testing.assert_close(whole.mean, x.double().mean(0))
    torch.testing.assert_close(whole.variance, x.double().var(0, unbiased=False))


def test_moments_survive_a_massive_offset():
    """With offset 1e8, sum of squares minus squared sum has no digits left in float64; Chan's update has."""
    x = torch.randn(1000, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    moments = Moments(1)
    for part in (x + 1e8).split(7):
        moments.update(part)
    expected = float((x + 1e8 - 1e8).var(unbiased=False))
    assert float(moments.variance) == pytest.approx(expected, rel=1e-6)


def test_empty_moments():
    moments = Moments(2)
    moments.update(torch.zeros(0, 2))
    moments.merge(Moments(2))
    assert moments.n == 0
    assert moments.variance.tolist() == [0, 0]


def test_histogram_counts_by_hand():
    histogram = Histogram(np.array([0.0, 1.0, 2.0, 4.0]))
    histogram.update(np.array([-1, 0, 0.5, 1, 2, 4, 4.5], np.float32))
    result = histogram.result()
    assert result.counts.tolist() == [2, 1, 2]  # the upper edge belongs to the last bin
    assert (result.below, result.above) == (1, 1)


@pytest.mark.parametrize("make", [lambda: Histogram.linear(0, 3, 7), lambda: Histogram.log(0.1, 3, 7)])
def test_histogram_merge_and_numpy(make):
    values = np.random.default_rng(0).uniform(0.1, 3, 200)
    whole, left, right = make(), make(), make()
    whole.update(values)
    left.update(values[:50])
    right.update(values[50:].reshape(3, 50))
    left.merge(right)
    assert left.result().counts.tolist() == whole.result().counts.tolist()
    assert whole.result().counts.tolist() == np.histogram(values, whole.edges)[0].tolist()


@given(st.lists(st.integers(0, 40), min_size=1, max_size=60), st.integers(0, 100))
@settings(max_examples=50, deadline=None)
def test_integer_counts_equal_numpy(values, q):
    counts, other = IntegerCounts(), IntegerCounts()
    counts.update(np.array(values[: len(values) // 2], np.int64))
    other.update(np.array(values[len(values) // 2 :], np.int64))
    counts.merge(other)
    assert counts.n == len(values)
    assert counts.mean == pytest.approx(np.mean(values))
    assert counts.std == pytest.approx(np.std(values), abs=1e-9)
    assert counts.percentile(q) == int(np.percentile(values, q, method="inverted_cdf"))


def test_integer_counts_of_nothing():
    assert np.isnan(IntegerCounts().mean)
    assert np.isnan(IntegerCounts().std)


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(0, 6), st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_topk_of_a_stream_keeps_the_first_of_equals(values, k, step):
    data = np.array(values, np.float32)
    kept, left, right = TopK(k), TopK(k), TopK(k)
    for i in range(0, len(data), step):
        ids = np.arange(i, min(i + step, len(data)))
        kept.update(data[ids], ids)
        (left if i % 2 else right).update(data[ids], ids)
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
    assert kept.ids.tolist() == order
    left.merge(right)
    assert left.ids.tolist() == order
