"""Edges: the identities and the causal truths that every method stands on."""

import numpy as np
import pytest
import torch

from saelab.analysis.circuits.acdc import acdc, kept_edges
from saelab.analysis.circuits.eap import eap, edge_gradients
from saelab.analysis.circuits.exact import patch_edges, patch_nodes
from saelab.analysis.circuits.graph import EdgeGraph
from saelab.analysis.circuits.metrics import accuracy, at_readout, measure
from saelab.analysis.circuits.run import EdgeRunner, Setting
from saelab.analysis.circuits.scores import areas, best_f1, faithfulness, roc_auc, top_edges
from saelab.analysis.circuits.tasks import task_batch
from saelab.analysis.circuits.truth import truth_for
from saelab.core.errors import ConfigError
from tests.analysis.circuits.conftest import random_batch

HAND = ["hand-induction", "reverse", "proportion"]
TASK = {"hand-induction": "induction", "reverse": "reverse", "proportion": "proportion"}


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_removing_every_edge_gives_the_other_run_and_none_gives_the_model(tiny, name):
    parts = tiny(name)
    batch = random_batch(parts.model)
    runner = EdgeRunner(parts, batch, Setting("logit_diff", "corrupted"))
    everything = runner.logits(runner.graph.valid[None])
    expected = at_readout(parts.model.logits(batch.corrupted), batch.readout)
    torch.testing.assert_close(everything, expected, atol=2e-4, rtol=1e-4)
    nothing = runner.logits(np.zeros_like(runner.graph.valid)[None])
    expected = at_readout(parts.model.logits(batch.clean), batch.readout)
    torch.testing.assert_close(nothing, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_patching_a_node_is_replacing_its_site(tiny, name):
    """All edges of an MLP removed = its site replaced by the corrupted run's value in the running model."""
    parts = tiny(name)
    batch = random_batch(parts.model)
    runner = EdgeRunner(parts, batch, Setting("logit_diff", "corrupted"))
    effects = patch_nodes(runner).nodes
    for layer in range(parts.n_layers):
        site = f"blocks.{layer}.hook_mlp_out"
        other = parts.model.read(batch.corrupted, site)[site]
        keep = batch.valid[..., None]
        logits = parts.model.logits(batch.clean, {site: lambda x, o=other, k=keep: torch.where(k, o, x)})
        at = at_readout(logits, batch.readout)
        measured = float(measure("logit_diff", at, batch, at).mean()) - runner.clean_score
        assert effects[runner.graph.mlp(layer)] == pytest.approx(measured, abs=1e-4)


def test_head_values_of_shared_kv_heads_sum_to_the_attention_output(tiny):
    from saelab.analysis.circuits.code_sae import head_values, output_matrices

    for name in ("gpt2", "llama"):
        parts = tiny(name)
        tokens = random_batch(parts.model).clean
        heads = torch.einsum("hbte,hed->hbtd", head_values(parts, tokens), output_matrices(parts))
        heads = heads.unflatten(0, (parts.n_layers, parts.n_heads))
        for layer in range(parts.n_layers):
            site = f"blocks.{layer}.hook_attn_out"
            total = heads[layer].sum(0) + parts.layers[layer].b_O
            torch.testing.assert_close(total, parts.model.read(tokens, site)[site], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_gradient_is_the_limit_of_the_measured_change(tiny, name):
    """EAP's score of an edge = the measured change for a small step of what the edge carries, to first order."""
    parts = tiny(name)
    batch = random_batch(parts.model)
    runner = EdgeRunner(parts, batch, Setting("logit_diff", "corrupted"))
    scores = eap(runner).edges
    small = 1e-2
    runner.other = runner.clean + small * (runner.other - runner.clean)
    measured = patch_edges(runner).edges / small
    valid = runner.graph.valid
    assert np.abs(measured[valid] - scores[valid]).max() < 0.05 * np.abs(scores[valid]).max()


def test_eap_ig_is_complete_over_the_embeddings_edges(tiny):
    """Sum of the embeddings' edges = m(corrupted) - m(clean), nearer with more midpoints, far nearer than the ends."""
    parts = tiny("gpt2")
    batch = random_batch(parts.model)
    runner = EdgeRunner(parts, batch, Setting("logit_diff", "corrupted"))
    true = float(runner.scores(runner.graph.valid[None])[0]) - runner.clean_score

    def error(scores):
        return abs(np.nansum(scores[:, : runner.graph.n_embeddings]) - true)

    assert error(eap(runner, 40).edges) < 0.02 * abs(true) + 1e-3
    left = sum(edge_gradients(runner, k / 10) for k in range(10)) / 10
    assert error(eap(runner, 10).edges) < error(left)


@pytest.mark.parametrize("name", HAND)
def test_hand_set_models_are_right_and_their_edges_are_recovered_exactly(known, name):
    parts = known(name)
    batch = task_batch(TASK[name], parts.model, 12)
    runner = EdgeRunner(parts, batch, Setting("kl", "zero"))
    assert accuracy(runner.clean_logits, batch) == 1.0
    truth = truth_for(name, runner.graph)
    effects = patch_edges(runner).edges
    assert set(runner.graph.names(np.nan_to_num(effects) > 1e-3)) == set(runner.graph.names(truth.edges))
    found = acdc(runner, 1e-3)
    assert set(runner.graph.names(kept_edges(found.edges, 1e-3))) == set(runner.graph.names(truth.edges))
    assert roc_auc(np.abs(effects[runner.graph.valid]), truth.edges[runner.graph.valid]) == 1.0


def test_corrupted_ablation_sees_only_what_the_corruption_changes(known):
    parts = known("hand-induction")
    runner = EdgeRunner(parts, task_batch("induction", parts.model, 12), Setting("kl", "corrupted"))
    found = acdc(runner, 1e-3)
    assert set(runner.graph.names(kept_edges(found.edges, 1e-3))) == {
        "embed->a0.h0<v>",
        "a0.h0->a1.h0<k>",
        "embed->a1.h0<v>",
        "a1.h0->logits",
    }


def test_the_true_circuit_is_faithful_and_the_empty_one_is_not(known):
    parts = known("hand-induction")
    runner = EdgeRunner(parts, task_batch("induction", parts.model, 12), Setting("logit_diff", "zero"))
    truth = truth_for("hand-induction", runner.graph).edges
    found = faithfulness(runner, np.stack([runner.graph.valid, truth, np.zeros_like(truth)]))
    assert found[0] == pytest.approx(1, abs=1e-5)
    assert found[1] == pytest.approx(1, abs=1e-3)
    assert found[2] == 0


def test_areas_of_known_curves():
    from saelab.analysis.circuits.scores import FRACTIONS

    grid = np.array(FRACTIONS)
    assert areas(grid, grid) == pytest.approx((0.4999995, 0.4990005))
    assert areas(grid, np.ones(len(grid))) == pytest.approx((0.999, 0))


def test_auc_and_f1():
    truth = np.array([True, True, False, False])
    assert roc_auc(np.zeros(4), truth) == 0.5
    assert roc_auc(np.array([3.0, 2.0, 1.0, 0.0]), truth) == 1.0
    assert best_f1(np.array([3.0, 1.0, 2.0, 0.0]), truth) == pytest.approx(0.8)
    assert np.isnan(roc_auc(np.arange(4.0), np.zeros(4, bool)))


def test_graph_names_and_order():
    graph = EdgeGraph(2, 4, 2, True, False)
    assert graph.edge("m0->a1.kv1<k>") == (graph.edge("embed->a1.kv1<k>")[0], graph.mlp(0))
    assert graph.n_edges == 2 * 8 + 6 + 7 * 8 + 11 + 12
    with pytest.raises(ConfigError, match="does not come before"):
        graph.edge("m1->a1.h0<q>")
    with pytest.raises(ConfigError, match="did you mean"):
        graph.edge("m0->a1.kv1<kk>")
    assert EdgeGraph.from_dict(graph.to_dict()) == graph


def test_edges_that_lead_nowhere_are_dropped():
    graph = EdgeGraph(2, 1, 1, False, False)
    mask = graph.mask(["embed->a0.h0<q>", "a0.h0->m1", "m0->logits", "embed->logits"])
    assert graph.names(graph.connected(mask)) == ["embed->logits"]
    scores = np.where(graph.valid, 0.1, np.nan)
    scores[graph.edge("embed->logits")] = -5
    assert graph.names(top_edges(graph, scores, 1)) == ["embed->logits"]


def test_eap_refuses_kl_at_the_clean_run(tiny):
    parts = tiny("gpt2")
    runner = EdgeRunner(parts, random_batch(parts.model), Setting("kl", "zero"))
    with pytest.raises(ConfigError, match="zero at the clean run"):
        eap(runner)


def test_mean_ablation_and_readout_positions(tiny):
    """Mean ablation is the same for all prompts; readout positions leave everything before untouched."""
    parts = tiny("gpt2")
    batch = random_batch(parts.model)
    mean = EdgeRunner(parts, batch, Setting("logit_diff", "mean"))
    torch.testing.assert_close(mean.other[:, 0], mean.other[:, 1])
    readout = EdgeRunner(parts, batch, Setting("logit_diff", "corrupted", "readout"))
    keys = readout.graph.mask([e for e in readout.graph.names(readout.graph.valid) if "a1.h0<v>" in e])
    everywhere = EdgeRunner(parts, batch, Setting("logit_diff", "corrupted"))
    assert abs(readout.scores(keys[None])[0] - readout.clean_score) < abs(
        everywhere.scores(keys[None])[0] - everywhere.clean_score
    )
