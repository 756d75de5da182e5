import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saelab.core.errors import ConfigError
from saelab.sparsity.allocation import by_global_score, by_sensitivity, erk, uniform
from saelab.sparsity.pattern import NofM, Unstructured, keep_largest, parse_pattern


@given(st.integers(1, 9), st.integers(1, 40), st.floats(0, 0.99), st.booleans(), st.integers(0, 99))
def test_counts_are_exact_and_the_largest_stay(rows, columns, sparsity, per_row, seed):
    # Few distinct scores, so that there are ties.
    score = torch.randint(0, 5, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()
    mask = Unstructured(sparsity, per_row).mask(score)
    if per_row:
        assert (mask.sum(1) == columns - round(sparsity * columns)).all()
        for kept, values in zip(mask, score, strict=True):
            assert not kept.any() or kept.all() or values[kept].min() >= values[~kept].max()
    else:
        assert mask.sum() == score.numel() - round(sparsity * score.numel())


@given(st.sampled_from([(1, 2), (2, 4), (1, 8), (7, 8)]), st.integers(1, 5), st.integers(1, 6), st.integers(0, 99))
def test_n_of_m_keeps_exactly_n_of_every_m(nm, rows, groups, seed):
    n, m = nm
    score = torch.rand(rows, groups * m, generator=torch.Generator().manual_seed(seed))
    mask = NofM(n, m).mask(score)
    assert (mask.view(rows, groups, m).sum(2) == n).all()
    worst_kept = torch.where(mask, score, torch.inf).view(rows, groups, m).amin(2)
    best_gone = torch.where(mask, -torch.inf, score).view(rows, groups, m).amax(2)
    assert (worst_kept >= best_gone).all()


def test_ties_go_to_the_first():
    assert keep_largest(torch.ones(1, 4), 2).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize(
    ("text", "sparsity", "message"),
    [
        ("2:5", 0.3, "means sparsity 0.6, not 0.3"),
        ("4:4", None, "keeps 4 of 4"),
        ("0:4", None, "keeps 0 of 4"),
        ("diagonal", 0.5, "unknown pattern 'diagonal'; use row, layer, neuron, or N:M"),
        ("row", None, "pattern row needs a sparsity"),
        ("row", 1.0, r"sparsity 1 is outside \[0, 1\)"),
        ("layer", -0.1, r"sparsity -0.1 is outside"),
    ],
)
def test_bad_patterns_are_one_line(text, sparsity, message):
    with pytest.raises(ConfigError, match=message):
        parse_pattern(text, sparsity)


def test_a_pattern_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="2:4 does not divide a layer, which has 6 inputs"):
        NofM(2, 4).mask(torch.rand(3, 6))


SHAPES = {"wide": (1000, 10), "square": (100, 100), "tiny": (4, 4)}


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.8, 0.97])
def test_erk_meets_the_budget_and_never_exceeds_dense(sparsity):
    shares = erk(SHAPES, sparsity)
    density = {name: 1 - share for name, share in shares.items()}
    kept = sum(density[name] * rows * columns for name, (rows, columns) in SHAPES.items())
    total = sum(rows * columns for rows, columns in SHAPES.values())
    assert kept == pytest.approx(round((1 - sparsity) * total), rel=1e-9)
    assert all(0 <= d <= 1 + 1e-12 for d in density.values())
    if sparsity == 0.8:  # the tiny layer caps; the others share what is left in proportion
        assert density["tiny"] == 1
        assert density["wide"] / density["square"] == pytest.approx((1010 / 10000) / (200 / 10000), rel=1e-3)


def test_a_global_threshold_takes_from_the_small_weights():
    scores = {"small": torch.full((2, 3), 0.1), "large": torch.full((2, 3), 1.0)}
    assert by_global_score(scores, 0.5) == {"small": 1.0, "large": 0.0}
    assert by_global_score(scores, 0.25) == {"small": 0.5, "large": 0.0}
    assert uniform(SHAPES, 0.5) == dict.fromkeys(SHAPES, 0.5)


def test_the_sensitivity_scan_spares_the_layer_that_hurts():
    shapes = {"tender": (10, 10), "tough": (10, 10)}
    shares = by_sensitivity(shapes, 0.4, lambda name, s: s * (100 if name == "tender" else 1))
    assert shares["tough"] > 0.7
    assert shares["tender"] < 0.1
    assert sum(shares.values()) / 2 == pytest.approx(0.4)
