"""Sparse probing: a planted latent is found, noise in the labels costs what it must, shuffled labels are chance."""

import dataclasses

import numpy as np
import pytest

from saelab.analysis.saebench.result import EvalResult
from saelab.analysis.saebench.sparse_probing import sparse_probing
from tests.analysis.saebench.planted import one_latent_per_class


@pytest.fixture(scope="module")
def planted():
    return one_latent_per_class(n=2000)[0]


def test_planted_latent(planted):
    found = sparse_probing([planted])
    assert found.value("sae_top_1_test_accuracy") == 1.0
    assert found.value("llm_test_accuracy") == 1.0
    assert found.value("sae_top_1_test_accuracy", "untrained") < 0.65
    assert found.flags() == []
    assert found.details[0]["dataset_name"] == "planted"


def test_label_noise(planted):
    rng = np.random.default_rng(0)
    two = dataclasses.replace(planted, classes=planted.classes[:2], y=planted.y % 2)
    code = two.pooled.codes["sae"].toarray()
    code = np.stack([code[:, 0] + code[:, 2], code[:, 1] + code[:, 3]], 1)
    from tests.analysis.saebench.planted import pooled

    flip = rng.random(len(two.y)) < 0.1
    noisy = dataclasses.replace(two, y=np.where(flip, 1 - two.y, two.y), pooled=pooled(two.pooled.x, sae=code))
    assert sparse_probing([noisy]).value("sae_top_1_test_accuracy") == pytest.approx(0.9, abs=0.03)


def test_shuffled_labels_are_chance_and_flagged(planted):
    shuffled = dataclasses.replace(planted, y=np.random.default_rng(0).permutation(planted.y))
    found = sparse_probing([shuffled])
    for k in (1, 2, 5):
        assert found.value(f"sae_top_{k}_test_accuracy") == pytest.approx(0.5, abs=0.06)
    assert {flag.metric for flag in found.flags()} == {f"sae_top_{k}_test_accuracy" for k in (1, 2, 5)}


def test_selection_sees_training_examples_only(planted):
    """A latent that tells the classes on test examples alone is no use."""
    code = planted.pooled.codes["sae"].toarray() * ~planted.train[:, None]
    from tests.analysis.saebench.planted import pooled

    peeking = dataclasses.replace(planted, pooled=pooled(planted.pooled.x, sae=code))
    assert sparse_probing([peeking]).value("sae_top_1_test_accuracy") == pytest.approx(0.5, abs=0.02)


def test_nothing_to_probe():
    found = sparse_probing([])
    assert "no labelled data" in found.skipped
    assert isinstance(found, EvalResult)
