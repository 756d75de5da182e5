import math

import pytest
import quality_plan
from quality_plan import (
    MAIN_SUBJECT,
    PEERS,
    SAELAB,
    Variant,
    at_l0,
    best_rate,
    key_of,
    next_rates,
    planned,
    scores,
    sweep_next,
)

from saelab.sae import ARCHITECTURES


def row(lr, fvu, l0=32.0, *, point=32, name="topk", package="saelab", subject=MAIN_SUBJECT, stage="lr"):
    about = {"stage": stage, "subject": subject, "package": package, "name": name, "point": point}
    return {**about, "lr": lr, "fvu": fvu, "l0": l0}


def test_every_registered_architecture_is_measured_but_those_that_need_other_data():
    measured = {variant.architecture for variant in SAELAB}
    assert set(dict(ARCHITECTURES.items())) - measured <= {"transcoder", "contrastive"}
    assert {variant.architecture for variant in planned(SAELAB, "another")} == measured
    assert {variant.package for variant in planned(PEERS, "another")} == {"saelens", "sparsify"}
    assert all(
        len(variant.points_on(subject)) >= 4 for subject in (MAIN_SUBJECT, "another") for variant in (*SAELAB, *PEERS)
    )


def test_value_between_two_points_is_linear_in_log_l0():
    points = [(8.0, 0.4), (32.0, 0.2)]
    assert at_l0(points, 16) == pytest.approx(0.3)
    assert at_l0(points, 8) == 0.4
    assert at_l0(points, 32.5) == 0.2  # within 3 %
    assert math.isnan(at_l0(points, 40))
    assert math.isnan(at_l0([], 8))


def test_sweep_goes_on_beyond_an_end_and_stops_inside():
    variant = Variant("saelab", "topk", lrs=(4e-3, 8e-3))
    assert next_rates(variant, {}) == [4e-3, 8e-3]
    assert next_rates(variant, {4e-3: 0.2, 8e-3: 0.1}) == [16e-3]
    assert next_rates(variant, {4e-3: 0.1, 8e-3: 0.2}) == [2e-3]
    assert next_rates(variant, {4e-3: 0.2, 8e-3: 0.1, 16e-3: 0.3}) == []
    many = {2.0**-i: 0.1 * i for i in range(quality_plan.MOST_SWEPT)}
    assert next_rates(Variant("saelab", "topk", lrs=(1.0,)), many) == []


def test_scores_bring_every_rate_to_the_same_l0():
    rows = [row(1e-3, 0.2), row(2e-3, 0.1, l0=128.0), row(4e-3, 0.1, name="other"), row(8e-3, 0.1, stage="main")]
    rows.append(row(1e-3, 0.5, l0=8.0, point=8))
    found = scores(Variant("saelab", "topk"), MAIN_SUBJECT, rows, 32)
    assert found == {1e-3: pytest.approx(0.2), 2e-3: pytest.approx(0.2)}


def test_scores_of_coefficients_are_read_between_l0s():
    variant = Variant("saelab", "relu", knob="sparsity")
    rows = [row(1e-3, 0.4, 16.0, name="relu"), row(1e-3, 0.2, 64.0, name="relu"), row(2e-3, 0.1, 200.0, name="relu")]
    found = scores(variant, MAIN_SUBJECT, rows, 5.0)
    assert found[1e-3] == pytest.approx(0.3)
    assert found[2e-3] == pytest.approx(0.1 * (1 + math.log(200 / 32)))


def test_best_rate_of_a_variant_that_borrows_it():
    variants = (Variant("saelab", "topk"), Variant("saelab", "gradient", lr_of="topk"))
    rows = [row(1e-3, 0.3), row(2e-3, 0.2)]
    assert best_rate(variants[1], MAIN_SUBJECT, rows, variants, 32) == 2e-3
    assert sweep_next(variants[1], MAIN_SUBJECT, rows) == []


def test_a_run_is_known_by_what_was_asked_for():
    asked = {**row(1e-3, 0.1, point=8), "seed": 0, "tokens": 10}
    assert key_of(asked) == key_of({**asked, "fvu": 0.5})
    assert key_of(asked) != key_of({**asked, "seed": 1})


def test_sweep_is_of_every_k_until_each_rate_is_inside():
    variant = Variant("saelab", "topk", lrs=(1e-3, 2e-3), points=(8, 32), sweep=(8, 32))
    assert sweep_next(variant, MAIN_SUBJECT, []) == [(8, 1e-3), (8, 2e-3), (32, 1e-3), (32, 2e-3)]
    rows = [row(1e-3, 0.3, 8.0, point=8), row(2e-3, 0.2, 8.0, point=8), row(1e-3, 0.1), row(2e-3, 0.2)]
    assert sweep_next(variant, MAIN_SUBJECT, rows) == [(8, 4e-3), (32, 5e-4)]


def test_a_higher_rate_must_be_worth_it():
    variants = (Variant("saelab", "topk"),)
    rows = [row(4e-3, 0.3), row(8e-3, 0.1003), row(16e-3, 0.1)]
    assert best_rate(variants[0], MAIN_SUBJECT, rows, variants, 32) == 8e-3
    assert best_rate(variants[0], MAIN_SUBJECT, [*rows, row(32e-3, 0.09)], variants, 32) == 32e-3


def test_a_value_that_was_not_swept_takes_the_nearest_ones_rate():
    variant = Variant("saelab", "topk", lrs=(1e-3, 2e-3), sweep=(8, 64))
    rows = [row(1e-3, 0.3, 8.0, point=8), row(2e-3, 0.4, 8.0, point=8)]
    rows += [row(1e-3, 0.2, 64.0, point=64), row(2e-3, 0.1, 64.0, point=64)]
    assert [best_rate(variant, MAIN_SUBJECT, rows, (variant,), k) for k in (16, 32)] == [1e-3, 2e-3]


def test_other_subjects_may_have_other_values_of_the_knob():
    variant = Variant("saelab", "topk", lrs=(1e-3, 2e-3), sweep=(8,))
    assert sweep_next(variant, "another", []) == [(8, 1e-3), (8, 2e-3)]
    assert variant.points_on("another") == variant.points
    rows = [row(lr, fvu, 8.0, point=8, subject="another") for lr, fvu in ((1e-3, 0.2), (2e-3, 0.1))]
    assert best_rate(variant, "another", rows, (variant,), 64) == 2e-3
    relu = Variant("saelab", "relu", knob="sparsity", points_elsewhere=(0.5, 1), sweep=(4,), sweep_elsewhere=(2,))
    assert relu.points_on("another") == (0.5, 1) != relu.points_on(MAIN_SUBJECT)
    assert (relu.swept("another"), relu.swept(MAIN_SUBJECT)) == ((2,), (4,))
