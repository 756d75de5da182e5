"""Absorption by hand: orthonormal parent and child, x = v_p + v_c, probe = v_p."""

import numpy as np
import pytest
from scipy import sparse

from saelab.analysis.saebench.absorption import absorption, absorption_scores, main_features
from saelab.analysis.saebench.examples import LabelledSet
from tests.analysis.saebench.planted import pooled

V_P, V_C = np.eye(4)[0], np.eye(4)[1]
X = (V_P + V_C)[None]


def score(code, decoder, x=X, main=(0,)):
    found = absorption_scores(x, sparse.csr_matrix(np.atleast_2d(code)), np.asarray(decoder), 7 * V_P, np.array(main))
    return float(found.fraction[0]), bool(found.full[0])


@pytest.mark.parametrize(
    ("code", "decoder", "expected"),
    [
        ([1, 1], [V_P, V_C], (0.0, False)),  # faithful
        ([0, np.sqrt(2)], [V_P, (V_P + V_C) / np.sqrt(2)], (1.0, True)),  # parent silent, child writes both
        ([0.5, 1], [V_P, 0.5 * V_P + V_C], (0.5, False)),  # half each
        ([0, 1], [V_P, V_C], (0.0, False)),  # silent, but nobody writes the parent
        ([0, 1], [V_P, 0.3 * V_P + V_C], (0.0, False)),  # too little of it
        ([2, 1], [V_P, V_P + V_C], (0.0, False)),  # the parent says more than there is
        ([0, 0], [V_P, V_C], (0.0, False)),  # nothing fires
    ],
)
def test_golden(code, decoder, expected):
    assert score(code, decoder) == pytest.approx(expected)


def test_decoder_norms_do_not_matter():
    """The same contributions with rows of other norms (the reference assumes unit rows)."""
    decoder = np.array([V_P, 0.5 * V_P + V_C])
    for factor in ([1, 1], [10, 0.1], [0.2, 3]):
        assert score(np.array([0.5, 1]) / factor, decoder * np.array(factor)[:, None]) == pytest.approx((0.5, False))


def test_guard_against_projections_that_are_not_positive():
    child = [V_P, (V_P + V_C) / np.sqrt(2)]
    assert score([0, 1], child, x=-X) == (0.0, False)
    assert score([0, 1], child, x=V_C[None]) == (0.0, False)


def test_three_absorbers_at_most():
    decoder = np.array([V_P, *(0.15 * V_P + 0.1 * np.eye(4)[k] for k in (1, 2, 3, 1))])
    # four others supply 0.15 each: the best three reach 0.45 of P = 1, but no single one 0.4
    assert score([0, 1, 1, 1, 1], decoder, x=V_P[None]) == pytest.approx((1.0, False))
    decoder[1:] *= 0.8  # now 0.36
    assert score([0, 1, 1, 1, 1], decoder, x=V_P[None]) == (0.0, False)


def test_main_features_stop_when_f1_does():
    rng = np.random.default_rng(0)
    y = rng.random(400) < 0.3
    half = rng.random(400) < 0.5
    codes = np.stack([y & half, y & ~half, rng.random(400) < 0.3], 1).astype(float)
    matrix = sparse.csr_matrix(codes)
    main, f1 = main_features(matrix[:200], y[:200], matrix[200:], y[200:])
    assert sorted(main.tolist()) == [0, 1]
    assert f1 == 1.0
    whole = sparse.csr_matrix(np.stack([y, codes[:, 0], codes[:, 2]], 1).astype(float))
    assert main_features(whole[:200], y[:200], whole[200:], y[200:])[0].tolist() == [0]


def test_whole_evaluation_with_and_without_absorption():
    """Four classes; in half the words of class 0 its feature is silent and a child writes its direction."""
    rng = np.random.default_rng(0)
    n = 1200
    y = rng.integers(0, 4, n)
    child = (y == 0) & (rng.random(n) < 0.5)
    basis = np.linalg.qr(rng.standard_normal((8, 8)))[0]
    faithful = np.stack([y == 0, y == 1, y == 2, y == 3, child], 1).astype(float)
    x = faithful @ basis[:5] + 0.01 * rng.standard_normal((n, 8))
    absorbed = np.concatenate([faithful[:, :4] * ~child[:, None], np.sqrt(2) * child[:, None]], 1)
    absorbing = np.stack([*basis[:4], (basis[0] + basis[4]) / np.sqrt(2)])
    classes = ("a", "b", "c", "d")
    data = LabelledSet("w", classes, pooled(x, sae=absorbed, untrained=faithful), y, rng.random(n) < 0.7)
    found = absorption(data, {"sae": absorbing, "untrained": basis[:5]}, directions=basis[:4])
    by_letter = {row["first_letter"]: row for row in found.details}
    # Both halves are found by sparse probing when they tell the class, so the child counts as a main feature here.
    assert by_letter["a"]["num_split_features"] == 2
    assert by_letter["b"]["mean_absorption_fraction"] == 0
    assert found.value("mean_absorption_fraction_score", "untrained") == 0
    unknown = LabelledSet("w", classes, data.pooled, rng.permutation(y), data.train)
    assert "cannot spell" in absorption(unknown, {"sae": absorbing, "untrained": basis[:5]}).skipped
    assert "no words" in absorption(None, {}).skipped
