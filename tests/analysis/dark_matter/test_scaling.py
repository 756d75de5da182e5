import numpy as np
import pytest

from saelab.analysis.dark_matter.scaling import fit_scaling, token_scaling
from saelab.core.errors import ConfigError

WIDTHS = [256, 512, 1024, 2048, 4096, 8192]


def law(a, b, c, noise=0.0, seed=0):
    w = np.array(WIDTHS, float)
    return (c + a * w**-b + noise * np.random.default_rng(seed).standard_normal(len(w))).tolist()


def test_exact_law_is_recovered():
    found = fit_scaling(WIDTHS[::-1], law(4.0, 0.6, 0.05)[::-1], [0.03] * 6, [32.0] * 6)
    assert found.widths == WIDTHS
    assert (found.a, found.b, found.c) == (
        pytest.approx(4.0, rel=1e-3),
        pytest.approx(0.6, abs=1e-3),
        pytest.approx(0.05, abs=1e-4),
    )
    assert found.c_interval[1] - found.c_interval[0] < 2e-3
    assert found.nonlinear == pytest.approx(0.03)
    assert found.linear_left == pytest.approx(0.02, abs=1e-4)
    assert found.absent[0] == pytest.approx(4.0 * 256**-0.6, rel=1e-2)
    assert found.equal_l0


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    covered = 0
    for seed in range(25):
        found = fit_scaling(WIDTHS, law(4.0, 0.6, 0.05, 0.002, seed), [0.03] * 6, [32.0] * 6)
        covered += found.c_interval[0] <= 0.05 <= found.c_interval[1]
    assert covered >= 21


def test_under_four_widths_is_refused():
    with pytest.raises(ConfigError, match=r"at least 4 widths, got 3 \(256, 512, 1024\)"):
        fit_scaling([256, 512, 1024, 1024], [0.4, 0.3, 0.2, 0.2], [0.1] * 4, [32.0] * 4)


def test_a_slope_and_unequal_l0_show():
    falling = [0.1 - 0.01 * k for k in range(6)]
    found = fit_scaling(WIDTHS, law(4.0, 0.6, 0.05), falling, [10, 20, 30, 40, 50, 60.0])
    assert found.nonlinear_slope == pytest.approx(-0.01)
    assert found.nonlinear_slope_interval[1] < 0
    assert not found.equal_l0


def test_token_scaling_finds_shared_and_own_parts():
    rng = np.random.default_rng(0)
    size, shared, own = (np.abs(rng.standard_normal(4000)) for _ in range(3))
    fit = np.arange(4000) % 2 == 0
    small, large = size + shared, 0.5 * (size + shared) + own
    (found,) = token_scaling({"small": (small, own), "large": (large, own)}, size, fit)
    assert found.r2 == pytest.approx(1 / 3, abs=0.05)
    assert found.r2_with_nonlinear == pytest.approx(1, abs=1e-6)
    assert found.removed == pytest.approx(1, abs=1e-6)
    assert found.r2_x_norm == pytest.approx(1 / 6, abs=0.05)
    assert found.r2_beyond_x_norm == pytest.approx(0.2, abs=0.05)
    assert abs(found.r2_shuffled) < 0.01
