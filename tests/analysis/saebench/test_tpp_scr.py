"""TPP and SCR on planted latents: one per class, orthogonal."""

import numpy as np
import pytest

from saelab.analysis.saebench.scr import AttributePair, attribute_pairs, scr
from saelab.analysis.saebench.tpp import tpp
from tests.analysis.saebench.planted import one_latent_per_class, pooled


def test_tpp_of_one_latent_per_class():
    """Zeroing the class's latent leaves its probe at chance (0.5 balanced) and the others' alone."""
    data, decoders = one_latent_per_class(n=2000)
    found = tpp([data], decoders, thresholds=(2, 5, 20, 100))
    assert found.value("tpp_threshold_2_total_metric") == pytest.approx(0.5, abs=0.06)
    assert found.value("tpp_threshold_2_intended_diff_only") == pytest.approx(0.5, abs=0.06)
    assert abs(found.value("tpp_threshold_2_unintended_diff_only")) < 0.06
    assert found.value("tpp_threshold_100_total_metric", "untrained") < 0.1
    assert found.flags() == []
    assert found.metrics.keys() == {"tpp_metrics"}


def test_tpp_needs_three_classes():
    data, decoders = one_latent_per_class(n_classes=2)
    assert "three classes" in tpp([data], decoders).skipped


def pair(n=4000, seed=0):
    """Two independent attributes, one latent each, orthogonal directions; the second one is written stronger."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((12, 12)))[0][:2]
    first, second = rng.random(n) < 0.5, rng.random(n) < 0.5
    code = np.stack([first, second], 1).astype(float)
    decoder = basis * np.array([[1.0], [3.0]])
    x = code @ decoder + 0.05 * rng.standard_normal((n, 12))
    noise = rng.random((n, 2)) * (rng.random((n, 2)) < 0.3)
    control = np.linalg.qr(rng.standard_normal((12, 12)))[0][:2]
    made = AttributePair("planted", pooled(x, sae=code, untrained=noise), first, second, rng.random(n) < 0.7)
    return made, {"sae": decoder, "untrained": control}


def test_scr_removes_the_planted_attribute():
    made, decoders = pair()
    found = scr([made], decoders, thresholds=(1, 5, 20, 100))
    assert found.details[0]["clean_probe_on_first"] == 1.0
    before = found.details[0]["confounded_probe_on_first"]
    assert before < 0.9
    assert before <= found.details[0]["confounded_probe_on_second"]
    assert found.value("scr_metric_threshold_1", "untrained") < 0.2
    assert found.value("scr_metric_threshold_1") == found.value("scr_dir1_threshold_1")


def test_scr_is_one_when_the_confound_is_centred():
    """With latents of +1 and -1 the probe's offset is right once the spurious part is gone: all of the gap closes."""
    made, decoders = pair()
    code = 2 * made.pooled.codes["sae"].toarray() - 1
    x = code @ decoders["sae"] + 0.05 * np.random.default_rng(1).standard_normal((len(code), 12))
    centred = AttributePair("centred", pooled(x, sae=code), made.first, made.second, made.train)
    found = scr([centred], {"sae": decoders["sae"]}, thresholds=(1,))
    assert found.details[0]["confounded_probe_on_first"] == pytest.approx(0.5, abs=0.05)
    assert found.value("scr_metric_threshold_1") == pytest.approx(1.0, abs=0.01)


def test_scr_ties_have_a_value_and_nothing_to_mend_is_said():
    made, decoders = pair()
    nothing = scr([made], {"sae": np.zeros_like(decoders["sae"])}, thresholds=(1, 5))
    assert nothing.value("scr_metric_threshold_5") == 0.0  # no effect, so nothing is zeroed
    x = 5 * made.pooled.codes["sae"].toarray() @ np.eye(2, 12)
    twins = AttributePair(
        "twins", pooled(x, sae=made.pooled.codes["sae"].toarray()), made.first, made.first, made.train
    )
    assert twins.smallest_cell() == 0
    assert "no pair" in scr([], decoders).skipped


def test_attribute_pairs_need_all_four_combinations():
    rng = np.random.default_rng(0)
    n = 4000
    labels = {
        "pooled": pooled(rng.standard_normal((n, 3)), sae=rng.random((n, 2))),
        "train": rng.random(n) < 0.5,
        "brackets": rng.integers(-1, 3, n),
        "scope": rng.integers(0, 4, n),
        "indent": np.zeros(n, int),
        "text": rng.integers(-1, 4, n),
    }
    found = attribute_pairs(labels)
    assert [p.name for p in found] == ["brackets_and_function", "text_and_function"]
    assert len(found[0].first) == (labels["brackets"] >= 0).sum()
