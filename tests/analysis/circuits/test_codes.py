"""Discrete codes: synthetic heads, the hand-set and the trained induction model, and the null."""

import numpy as np
import pytest
import torch

from saelab.analysis.circuits.codes import CodesConfig, _encode, _pairs, _presence, _unique, discrete_codes
from saelab.analysis.circuits.graph import EdgeGraph
from saelab.analysis.circuits.scores import roc_auc
from saelab.analysis.circuits.tasks import task_batch
from saelab.analysis.circuits.trained import head_roles, trained_induction_folder
from saelab.core.errors import ConfigError
from saelab.models.components import Components
from saelab.models.subject import load_model


def node_auc(found, true):
    names = [found.graph.writers[w] for w in found.graph.heads]
    truth = np.array([name in true for name in names])
    return roc_auc(found.z, truth), float(np.mean([roc_auc(z, truth) for z in found.null_z]))


def test_hand_set_heads_are_found_and_shuffled_labels_find_nothing(known):
    parts = known("hand-induction")
    config = CodesConfig(pooling="each", l1=0.005)
    found = discrete_codes(parts, task_batch("trigger", parts.model, 60), config)
    auc, null = node_auc(found, {"a0.h0", "a1.h0"})
    assert auc >= 0.95
    assert abs(null - 0.5) < 0.12


def test_trained_heads_are_found_with_the_right_pooling():
    parts = Components(load_model(str(trained_induction_folder())))
    roles = head_roles(parts)
    true = {f"a0.h{h}" for h in np.flatnonzero(roles.previous[0] > 0.5)}
    true |= {f"a1.h{h}" for h in np.flatnonzero(roles.induction[1] > 0.5)}
    assert len(true) == 4
    batch = task_batch("trigger", parts.model, 100)
    auc, null = node_auc(discrete_codes(parts, batch, CodesConfig(pooling="each", l1=0.005)), true)
    assert auc >= 0.95
    assert abs(null - 0.5) < 0.12
    last = discrete_codes(parts, batch, CodesConfig(pooling="last", epochs=200))
    z = dict(zip([last.graph.writers[w] for w in last.graph.heads], last.z, strict=True))
    assert min(z["a1.h0"], z["a1.h1"], z["a1.h3"]) > 2, "the readout shows induction heads"
    assert z["a0.h3"] < 2, "and not the previous-token head, which writes elsewhere"


def test_counts_of_planted_codes():
    """Three heads: one shows code 5 on positives only, one the same codes on both, one a code for each prompt."""
    codes = np.stack([np.r_[[5, 5, 1, 1], [1, 1, 1, 1]], np.tile([2, 3], 4), np.arange(8)], 1)
    presence = _presence(codes, np.arange(8), 8, 9)
    labels = np.arange(8) < 4
    assert _unique(presence, labels[None])[0].tolist() == [1, 0, 4]
    assert _unique(presence, ~labels[None])[0].tolist() == [0, 0, 4], "a head of many codes scores under any labels"
    graph = EdgeGraph(3, 1, 1, False, False)
    pairs = _pairs(codes, labels, graph, 9)
    # (5, 2), (5, 3) with head 1; (1, 2) and (1, 3) come on negatives too. With head 2 every pair is new.
    assert pairs.tolist() == [[0, 2, 4], [0, 0, 4], [0, 0, 0]]


def test_a_silent_head_has_one_code_of_its_own():
    outputs = torch.randn(20, 2, 8, generator=torch.Generator().manual_seed(0))
    outputs[:, 1] = 0
    config = CodesConfig(pooling="last", latents=16, epochs=300, l1=0.1)
    codes = _encode(outputs, np.arange(20), 20, config, torch.Generator().manual_seed(0))
    assert len(set(codes[:, 1])) == 1


def test_pooling_has_no_default_and_examples_are_checked(known):
    with pytest.raises(ValueError, match="pooling"):
        CodesConfig()
    parts = known("hand-induction")
    with pytest.raises(ConfigError, match="raise --n"):
        discrete_codes(parts, task_batch("trigger", parts.model, 3), CodesConfig(pooling="last"))
