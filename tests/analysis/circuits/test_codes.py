"""Discrete codes: synthetic heads, the hand-set and the trained induction model, and the null."""

import numpy as np
import pytest
import torch

from saelab.analysis.circuits.code_sae import CodesConfig, encode, head_values, output_matrices, pooled
from saelab.analysis.circuits.codes import _difference, _pairs, _presence, _unique, discrete_codes
from saelab.analysis.circuits.graph import EdgeGraph
from saelab.analysis.circuits.scores import roc_auc
from saelab.analysis.circuits.tasks import task_batch
from saelab.analysis.circuits.trained import head_roles, trained_induction_folder
from saelab.core.errors import ConfigError
from saelab.models.components import Components
from saelab.models.subject import load_model
from tests.analysis.circuits.conftest import random_batch


def node_auc(found, true):
    names = [found.graph.writers[w] for w in found.graph.heads]
    truth = np.array([name in true for name in names])
    return roc_auc(found.excess, truth), float(np.mean([roc_auc(null, truth) for null in found.null_excess]))


@pytest.mark.parametrize("seed", range(3))
def test_hand_set_heads_are_found_and_shuffled_labels_find_nothing(known, seed):
    parts = known("hand-induction")
    config = CodesConfig(pooling="each", l1=0.005, seed=seed)
    found = discrete_codes(parts, task_batch("trigger", parts.model, 100, seed), config)
    auc, null = node_auc(found, {"a0.h0", "a1.h0"})
    assert auc >= 0.95
    assert abs(null - 0.5) < 0.12


def test_trained_heads_are_found_with_the_right_pooling():
    parts = Components(load_model(str(trained_induction_folder())))
    roles = head_roles(parts)
    true = {f"a0.h{h}" for h in np.flatnonzero(roles.previous[0] > 0.5)}
    true |= {f"a1.h{h}" for h in np.flatnonzero(roles.induction[1] > 0.5)}
    assert len(true) == 4
    for seed in range(3):
        batch = task_batch("trigger", parts.model, 100, seed)
        auc, null = node_auc(discrete_codes(parts, batch, CodesConfig(pooling="each", l1=0.005, seed=seed)), true)
        assert auc >= 0.95
        assert abs(null - 0.5) < 0.12
    last = discrete_codes(parts, batch, CodesConfig(pooling="last"))
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
    # Head 0: 5 on 2 of 4 positives, q = 1/4: (1/2)^2 / (3/16 * 2/4) = 8/3. Head 2: four times (1/4)^2 / (7/64 * 2/4).
    assert _difference(presence, labels[None])[0] == pytest.approx([8 / 3, 0, 32 / 7])
    graph = EdgeGraph(3, 1, 1, False, False)
    pairs = _pairs(codes, labels, graph, 9)
    # (5, 2), (5, 3) with head 1; (1, 2) and (1, 3) come on negatives too. With head 2 every pair is new.
    assert pairs.tolist() == [[0, 2, 4], [0, 0, 4], [0, 0, 0]]


def test_a_silent_head_has_one_code_of_its_own():
    z = torch.randn(20, 2, 8, generator=torch.Generator().manual_seed(0))
    z[:, 1] = 0
    config = CodesConfig(pooling="last", latents=16, epochs=300, l1=0.1)
    codes = encode(z, torch.eye(8).expand(2, -1, -1), np.arange(20), 20, config)
    assert len(set(codes[:, 1])) == 1


@pytest.mark.parametrize("pooling", ["last", "mean", "max", "each"])
def test_pooling_before_the_output_matrix_is_pooling_after_it(tiny, pooling):
    parts = tiny("llama")
    batch = random_batch(parts.model)
    z, owner = pooled(parts, batch, pooling)
    found = torch.einsum("mhe,hed->mhd", z, output_matrices(parts))
    outputs = torch.einsum("hbte,hed->bhtd", head_values(parts, batch.clean), output_matrices(parts))
    for prompt in range(len(batch)):
        own, rows = outputs[prompt, :, : int(batch.readout[prompt]) + 1], found[torch.as_tensor(owner == prompt)]
        largest = own[torch.arange(len(own)), own.norm(dim=-1).argmax(1)]
        expected = {"last": own[:, -1], "mean": own.mean(1), "max": largest, "each": own.transpose(0, 1)}[pooling]
        torch.testing.assert_close(rows, expected.reshape(rows.shape), atol=1e-5, rtol=1e-4)


def test_pooling_has_no_default_and_examples_are_checked(known):
    with pytest.raises(ValueError, match="pooling"):
        CodesConfig()
    parts = known("hand-induction")
    with pytest.raises(ConfigError, match="raise --n"):
        discrete_codes(parts, task_batch("trigger", parts.model, 3), CodesConfig(pooling="last"))
