import math

import pytest
import torch

from saelab.analysis.reconstruction import Reconstruction, ratio


def pairs(n=60, d=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64) * 3 + 1
    return x, 0.8 * x + 0.3 * torch.randn(n, d, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("shift", [0.0, 1.0, -300.0])
def test_any_shift_gives_the_metrics_of_one_shot(shift):
    x, x_hat = pairs()
    stream = Reconstruction(torch.full((5,), shift))
    for a, b in zip(x.split(7), x_hat.split(7), strict=True):
        stream.update(a, b)
    result = stream.result()
    centre = x.mean(0)
    assert result.n == 60
    assert result.mse == pytest.approx(float((x - x_hat).square().sum(1).mean()))
    assert result.fvu == pytest.approx(float((x - x_hat).square().sum() / (x - centre).square().sum()))
    assert result.nmse == pytest.approx(float(((x - x_hat).square().sum(1) / x.square().sum(1)).mean()))
    assert result.cosine == pytest.approx(float(torch.cosine_similarity(x, x_hat).mean()))
    bias = (x_hat - centre).square().sum() / ((x - centre) * (x_hat - centre)).sum()
    assert result.shrinkage == pytest.approx(float(bias))


def test_merge_equals_one_stream():
    x, x_hat = pairs()
    whole, left, right = (Reconstruction(torch.zeros(5)) for _ in range(3))
    whole.update(x, x_hat)
    left.update(x[:11], x_hat[:11])
    right.update(x[11:], x_hat[11:])
    left.merge(right)
    for name, value in vars(whole.result()).items():
        assert getattr(left.result(), name) == pytest.approx(value), name


def test_shrinkage_says_how_much_is_lost():
    x, _ = pairs()
    stream = Reconstruction(torch.zeros(5))
    stream.update(x, x.mean(0) + 0.7 * (x - x.mean(0)))
    assert stream.result().shrinkage == pytest.approx(0.7)


def test_float32_input_loses_nothing_of_a_small_error():
    """x around 1e3 and an error of 1e-3: sums in float32 would have no digits of the ratio left."""
    x = (torch.randn(500, 3, generator=torch.Generator().manual_seed(0)) + 1e3).float()
    x_hat = x + torch.tensor([2.0**-10, 0.0, 0.0])
    stream = Reconstruction(torch.zeros(3))
    stream.update(x, x_hat)
    assert stream.result().mse == pytest.approx(2.0**-20, rel=1e-12)


def test_zero_vectors_and_nothing():
    stream = Reconstruction(torch.zeros(2))
    assert math.isnan(stream.result().fvu)
    stream.update(torch.zeros(3, 2), torch.zeros(3, 2))
    result = stream.result()
    assert result.mse == 0
    assert math.isnan(result.fvu)
    assert math.isnan(result.shrinkage)
    assert result.cosine == 0
    assert math.isnan(ratio(1, 0))
