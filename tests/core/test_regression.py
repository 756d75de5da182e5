import os

import numpy as np
import pytest
import torch

from saelab.core.regression import CrossMoments, LinearMap


def pairs(n=400, d_x=5, d_y=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d_x, generator=g, dtype=torch.float64) * torch.tensor([1.0, 3, 0.1, 50, 1]) + 4
    w = torch.randn(d_x, d_y, generator=g, dtype=torch.float64)
    y = x @ w + torch.randn(n, d_y, generator=g, dtype=torch.float64) + 7
    return x, y


def moments_of(x, y, sizes=None):
    moments = CrossMoments(x.shape[1], y.shape[1])
    sizes = sizes or [len(x)]
    for a, b in zip(x.split(sizes), y.split(sizes), strict=True):
        moments.update(a, b)
    return moments


@pytest.mark.parametrize("intercept", [True, False])
def test_fit_is_numpys_lstsq(intercept):
    x, y = pairs()
    design = torch.cat([x, torch.ones(len(x), 1)], 1) if intercept else x
    expected = np.linalg.lstsq(design.numpy(), y.numpy(), rcond=None)[0]
    linear = moments_of(x, y, [1, 0, 150, 249]).fit(intercept)
    np.testing.assert_allclose(linear.weight.numpy(), expected[:5], rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(linear.bias.numpy(), expected[5] if intercept else np.zeros(3), rtol=1e-7, atol=1e-8)
    assert linear.rank == 5
    assert linear.n == 400


def test_both_r2_of_held_out_pairs_are_those_of_the_residuals():
    x, y = pairs()
    linear = moments_of(x[:200], y[:200]).fit()
    found = moments_of(x[200:], y[200:], [33, 167]).r2(linear)
    residual = (y[200:] - linear(x[200:])).square().sum(0)
    total = (y[200:] - y[200:].mean(0)).square().sum(0)
    assert found.pooled == pytest.approx(1 - float(residual.sum() / total.sum()), abs=1e-12)
    assert found.per_dimension == pytest.approx(float((1 - residual / total).mean()), abs=1e-12)
    torch.testing.assert_close(found.residual, residual)
    torch.testing.assert_close(found.total, total)


def test_merge_equals_one_stream_in_any_order():
    x, y = pairs(seed=1)
    whole = moments_of(x, y)
    parts = [moments_of(x[a:b], y[a:b]) for a, b in ((0, 10), (10, 10), (10, 300), (300, 400))]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        merged = CrossMoments(5, 3)
        for k in order:
            merged.merge(parts[k])
        for name in ("mean_x", "mean_y", "xx", "xy", "yy"):
            torch.testing.assert_close(getattr(merged, name), getattr(whole, name), rtol=1e-10, atol=1e-8)
        assert merged.n == whole.n


def test_a_massive_offset_costs_no_digits():
    x, y = pairs()
    far = moments_of(x + 1e7, y).fit()
    near = moments_of(x, y).fit()
    torch.testing.assert_close(far.weight, near.weight, rtol=1e-6, atol=1e-7)


def test_duplicate_and_constant_columns_are_left_out_of_the_rank():
    x, y = pairs()
    wide = torch.cat([x, x[:, :1], torch.full((len(x), 1), 2.0, dtype=torch.float64)], 1)
    linear = moments_of(wide, y).fit()
    assert linear.rank == 5
    torch.testing.assert_close(linear(wide), moments_of(x, y).fit()(x), rtol=1e-7, atol=1e-7)


def test_a_target_that_does_not_vary_has_no_r2():
    x, y = pairs()
    y[:, 1] = 3.0
    found = moments_of(x, y).r2(moments_of(x, y).fit())
    assert torch.isnan(found.each).tolist() == [False, True, False]
    assert np.isfinite(found.pooled)
    constant = torch.ones(400, 1, dtype=torch.float64)
    assert np.isnan(
        moments_of(x, constant).r2(LinearMap(torch.zeros(5, 1).double(), torch.ones(1).double(), 0, 1)).pooled
    )


def test_select_is_the_moments_of_those_columns():
    x, y = pairs()
    some = moments_of(x, y).select(torch.tensor([0, 3]), slice(1, 3))
    direct = moments_of(x[:, [0, 3]], y[:, 1:])
    for name in ("mean_x", "mean_y", "xx", "xy", "yy"):
        torch.testing.assert_close(getattr(some, name), getattr(direct, name))
    assert moments_of(x, y).fit().select(slice(1, 3)).weight.shape == (5, 2)


def test_shuffled_pairs_have_no_r2_on_held_out_data():
    x, y = pairs(n=4000)
    order = torch.randperm(4000, generator=torch.Generator().manual_seed(2))
    linear = moments_of(x[:2000], y[order][:2000]).fit()
    assert abs(moments_of(x[2000:], y[order][2000:]).r2(linear).pooled) < 0.02


def test_memory_does_not_grow_with_tokens():
    """Resident memory after 80 batches is about that after 10; kept batches would add 290 MB."""

    def resident():
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    g = torch.Generator().manual_seed(0)
    moments, early = CrossMoments(128, 128), 0
    for k in range(80):
        x = torch.randn(4096, 128, generator=g)
        moments.update(x, x + 1)
        early = resident() if k == 9 else early
    assert moments.n == 80 * 4096
    assert resident() - early < 100e6
