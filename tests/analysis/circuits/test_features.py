"""Feature circuits: linear and completeness oracles, a hand-set dictionary, and the judge's end points."""

import numpy as np
import pytest
import torch

from saelab.analysis.circuits.features.circuit import Judge, find_feature_circuit
from saelab.analysis.circuits.features.edges import OUTPUT, feature_edges
from saelab.analysis.circuits.features.effects import FeatureRunner, exact_effects, node_effects
from saelab.analysis.circuits.features.figure import feature_report
from saelab.analysis.circuits.nodes import NodeAddress, SiteDictionary, in_order
from saelab.analysis.circuits.tasks import TaskBatch, task_batch
from saelab.core.code import SparseCode
from saelab.core.errors import ActivationError, ConfigError
from saelab.sae.topk import TopKConfig, TopKSAE
from tests.analysis.circuits.conftest import random_batch


class Oracle:
    """One latent for each coordinate of the first half of hand-induction's residual stream; writes it mirrored."""

    def __init__(self, width):
        half = width // 2
        self.d_in, self.d_sae = width, half
        self.W_enc = torch.cat([torch.eye(half), torch.zeros(half, half)])
        self.W_dec = torch.cat([torch.eye(half), -torch.eye(half)], 1)

    def encode(self, x):
        return SparseCode.from_dense((x @ self.W_enc).relu().round(decimals=4))

    def decode(self, code):
        return code.to_dense() @ self.W_dec


def topk_runner(parts, sites, batch=None, metric="logit_diff"):
    model = parts.model
    dictionaries = []
    for n, site in enumerate(sites):
        sae = TopKSAE(TopKConfig(d_in=model.width(site), d_sae=24, k=5, input_scale=1.5), seed=n).requires_grad_(False)
        dictionaries.append(SiteDictionary(site, sae, model.width(site)))
    return FeatureRunner(model, in_order(model, dictionaries), batch or random_batch(model), metric)


def test_on_a_linear_metric_all_three_effects_are_one(known):
    """hand-induction's norms are the identity, so the metric is linear in its last residual stream."""
    parts = known("hand-induction")
    runner = topk_runner(parts, ["blocks.1.hook_resid_post"], task_batch("induction", parts.model, 4))
    atp, ig = (node_effects(runner, method, 3) for method in ("atp", "ig"))
    found = atp.sites["blocks.1.hook_resid_post"]
    assert float(found.latents.abs().max()) > 0.1
    torch.testing.assert_close(found.latents, ig.sites["blocks.1.hook_resid_post"].latents, atol=1e-4, rtol=1e-4)
    per_node = found.latents.mean(0).abs()
    places = per_node.flatten().topk(5).indices
    nodes = [NodeAddress("blocks.1.hook_resid_post", int(p // 24), int(p % 24)) for p in places]
    nodes.append(NodeAddress("blocks.1.hook_resid_post", None, "error"))
    exact = exact_effects(runner, nodes)
    for node, measured in zip(nodes, exact, strict=True):
        predicted = found.error.sum(1) if node.index == "error" else found.latents[:, node.position, node.index]
        torch.testing.assert_close(measured, predicted, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_integrated_effects_of_a_site_are_complete(tiny, name):
    parts = tiny(name)
    site = "blocks.0.hook_resid_post"
    runner = topk_runner(parts, [site])
    found = node_effects(runner, "ig", 40).sites[site]
    other = parts.model.read(runner.batch.corrupted, site)[site]
    true = runner.metric(runner.logits({site: lambda x: torch.where(runner.valid > 0, other, x)})) - runner.clean_score
    total = found.latents.sum((1, 2)) + found.error.sum(1)
    torch.testing.assert_close(total, true, atol=0.02 * float(true.abs().max()), rtol=0.02)


def test_edges_into_a_bottleneck_sum_to_the_effect(tiny):
    """All that a node at resid 0 does goes through resid 1, so its edges into resid 1's nodes sum to its effect."""
    parts = tiny("gpt2")
    sites = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    runner = topk_runner(parts, sites)
    effects = node_effects(runner, "atp")
    everything = [NodeAddress(site, None, i) for site in sites for i in (*range(24), "error")]
    edges = feature_edges(runner, effects, everything, 0.0)
    for source in everything[:25]:
        into = sum(w for (u, d), w in edges.items() if u == source and d.site == sites[1])
        found = effects.sites[sites[0]]
        values = found.error.sum(1) if source.index == "error" else found.latents[..., source.index].sum(1)
        assert into == pytest.approx(float(values.mean()), abs=1e-4)
        assert (source, OUTPUT) not in edges, "nothing goes past the bottleneck"
    for source in everything[25:]:
        found = effects.sites[sites[1]]
        values = found.error.sum(1) if source.index == "error" else found.latents[..., source.index].sum(1)
        assert edges.get((source, OUTPUT), 0.0) == pytest.approx(float(values.mean()), abs=1e-4)


def test_the_hand_set_dictionary_shows_the_one_feature_that_matters(known):
    """Of all that changes with the first A of "A B .. A", only "previous token = A" at B's position has an effect."""
    parts = known("hand-induction")
    a, b, c = 3, 7, 12
    clean = torch.tensor([[0, 9, a, b, 10, 11, a]])
    corrupted = torch.tensor([[0, 9, c, b, 10, 11, a]])
    batch = TaskBatch("planted", clean, corrupted, torch.tensor([6]), torch.tensor([[b]]), torch.tensor([[10]]))
    site = "blocks.0.hook_resid_post"
    model = parts.model
    runner = FeatureRunner(
        model, [SiteDictionary(site, Oracle(model.width(site)), model.width(site))], batch, "logit_diff"
    )
    changed = (runner.other[site].latents - runner.clean[site].latents)[0].nonzero().tolist()
    assert len(changed) >= 4
    effects = exact_effects(runner, [NodeAddress(site, p, i) for p, i in changed])[:, 0]
    previous = 20 + 16  # where "previous" begins: 20 tokens, 16 places
    strong = [tuple(changed[n]) for n in (effects.abs() > 1e-3).nonzero()[:, 0].tolist()]
    assert strong == [(3, previous + a)]
    integrated = node_effects(runner, "ig", 200).sites[site].latents[0]
    assert tuple(divmod(int(integrated.abs().argmax()), integrated.shape[1])) == (3, previous + a)


@pytest.mark.parametrize("errors", ["circuit", "keep", "remove"])
def test_everything_is_faithful_and_nothing_is_not(tiny, errors):
    runner = topk_runner(tiny("gpt2"), ["blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"])
    judge = Judge(runner, errors)
    masks = {d.site: torch.ones(1, d.n + 1, dtype=torch.bool) for d in runner.dictionaries}
    if errors != "remove":
        assert judge.faithfulness(masks) == pytest.approx(1, abs=1e-4)
    none = {site: ~mask for site, mask in masks.items()}
    if errors != "keep":
        assert judge.faithfulness(none) == 0


def test_find_report_and_addresses(tiny):
    parts = tiny("gpt2")
    runner = topk_runner(parts, ["blocks.1.hook_resid_post", "blocks.0.hook_resid_post"])
    assert [d.site for d in runner.dictionaries] == ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    found = find_feature_circuit(runner, runner, method="atp", threshold=0.05, n_exact=2, thresholds=[1e-9, 0.3, 2.0])
    assert found.curve[0].faithfulness == pytest.approx(1, abs=0.2)
    assert found.curve[-1].n_nodes == 0
    assert found.curve[-1].faithfulness == 0
    assert [n.exact is not None for n in found.nodes][:3] == [True, True, False]
    assert [abs(n.effect) for n in found.nodes] == sorted((abs(n.effect) for n in found.nodes), reverse=True)
    html = feature_report(found, lambda site, i: f"<{site}:{i}>")
    assert "&lt;blocks.0" in html
    for node in found.nodes:
        assert NodeAddress.parse(str(node.address)) == node.address
    assert np.isfinite(found.curve_frame().to_numpy()).all()


def test_bad_input_is_named(tiny):
    parts = tiny("gpt2")
    sae = TopKSAE(TopKConfig(d_in=8, d_sae=4, k=1))
    with pytest.raises(ActivationError, match="width"):
        SiteDictionary("blocks.0.hook_resid_post", sae, 16)
    runner = topk_runner(parts, ["blocks.0.hook_resid_post"])
    with pytest.raises(ConfigError, match="differ in length"):
        find_feature_circuit(runner, runner, aggregation="none")
    with pytest.raises(ConfigError, match="two SAEs for one site"):
        in_order(parts.model, [*runner.dictionaries, *runner.dictionaries])
    with pytest.raises(ConfigError, match="no SAE"):
        FeatureRunner(parts.model, [], runner.batch, "logit_diff")
