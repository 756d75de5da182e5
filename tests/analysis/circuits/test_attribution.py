"""Attribution graphs: the golden graph, exactness under perturbation, row sums, pruning, export."""

import json

import numpy as np
import pytest
import torch

from saelab.analysis.circuits.attribution.export import graph_json, save_graph
from saelab.analysis.circuits.attribution.frozen import FrozenModel, TranscoderSite
from saelab.analysis.circuits.attribution.graph import attribution_graph
from saelab.analysis.circuits.attribution.influence import graph_scores, influence, prune
from saelab.core.errors import ConfigError
from saelab.sae.transcoder import TranscoderConfig, TranscoderSAE


def golden():
    adjacency = np.zeros((12, 12))
    for target, sources in {11: [1, 3, 6, 8], 3: [0, 1, 6], 1: [9, 10], 0: [9]}.items():
        adjacency[target, sources] = 10
    weights = np.zeros(12)
    weights[11] = 1
    return adjacency, weights


def test_influence_of_the_golden_graph():
    expected = [1 / 12, 1 / 3, 0, 1 / 4, 0, 0, 1 / 3, 0, 1 / 4, 1 / 4, 1 / 6, 0]
    np.testing.assert_allclose(influence(*golden()), expected, atol=1e-12)


def test_pruning_the_golden_graph():
    adjacency, weights = golden()
    keep = np.zeros(12, bool)
    keep[[9, 10, 11]] = True
    everything = prune(adjacency, weights, keep, node_threshold=1.0, edge_threshold=1.0)
    assert set(np.flatnonzero(everything.nodes)) == {0, 1, 3, 6, 8, 9, 10, 11}
    assert everything.edges.sum() == (adjacency != 0).sum()
    fewer = prune(adjacency, weights, keep, node_threshold=0.5, edge_threshold=0.9)
    assert fewer.nodes.sum() < everything.nodes.sum()
    assert fewer.nodes[[9, 10, 11]].all()
    assert not fewer.edges[:, ~fewer.nodes].any()
    assert not fewer.edges[~fewer.nodes].any()


def test_scores_are_zero_when_everything_comes_from_errors():
    adjacency, weights = golden()
    sources = np.isin(np.arange(12), [6, 8, 9, 10])
    none = np.zeros(12, bool)
    assert graph_scores(adjacency, weights, none, sources)[0] == 0
    assert graph_scores(adjacency, weights, sources, none) == (1.0, 1.0)


def transcoders(parts, zero=(), skip=False, reads="normalised"):
    made = {}
    for layer in range(parts.n_layers):
        config = TranscoderConfig(d_in=parts.d_model, d_sae=24, k=3, input_scale=1.7, skip=skip)
        transcoder = TranscoderSAE(config, seed=layer)
        with torch.no_grad():
            transcoder.b_enc.normal_(std=0.1, generator=torch.Generator().manual_seed(layer))
            transcoder.b_dec.normal_(std=0.1, generator=torch.Generator().manual_seed(layer))
            if skip:
                transcoder.W_skip.normal_(std=0.2, generator=torch.Generator().manual_seed(layer))
            if layer in zero:
                transcoder.W_enc.zero_()
                transcoder.b_enc.fill_(-1)
        made[layer] = TranscoderSite(transcoder.requires_grad_(False), reads)
    return made


@pytest.mark.parametrize(
    ("name", "skip", "reads"),
    [("gpt2", False, "normalised"), ("llama", True, "standardised"), ("gpt2", True, "residual")],
)
def test_adding_a_source_changes_every_target_by_its_edge(tiny, name, skip, reads):
    """The perturbation test: in the frozen model, source s added once more moves target t by exactly A[t, s]."""
    parts = tiny(name)
    tokens = torch.tensor([1, 5, 2, 7, 3])
    given = transcoders(parts, zero=(1,), skip=skip, reads=reads)
    graph = attribution_graph(parts, tokens, given, most_logits=3)
    frozen = FrozenModel(parts, tokens[None], given)
    weight, _ = parts.head
    assert not [n for n in graph.nodes if n.kind == "feature" and n.layer == 1], "layer 1 must have no active latent"
    targets = [i for i, n in enumerate(graph.nodes) if n.kind in ("feature", "logit")]
    for s, source in enumerate(graph.nodes):
        if source.kind == "logit":
            continue
        writes = torch.zeros(parts.n_layers + 1, 1, 5, parts.d_model)
        if source.kind == "token":
            writes[0, 0, source.position] = frozen.embedding[source.position]
        elif source.kind == "error":
            writes[source.layer + 1, 0, source.position] = frozen.errors[source.layer][source.position]
        else:
            row = frozen.writes(source.layer)[source.index] * frozen.codes[source.layer][source.position, source.index]
            writes[source.layer + 1, 0, source.position] = row
        with torch.no_grad():
            seen, final = frozen.forward(writes)
        for t in targets:
            target = graph.nodes[t]
            if target.kind == "logit":
                change = final[0, target.position] @ (weight[target.index] - weight.mean(0))
            else:
                change = seen[target.layer][0, target.position] @ frozen.reads(target.layer)[target.index]
            assert graph.adjacency[t, s] == pytest.approx(float(change), abs=1e-4)


def test_the_frozen_model_with_everything_written_is_the_model(tiny):
    """Rows and constants sum to the model's own centred logits; the constants are the same as those of biases alone."""
    parts = tiny("gpt2")
    tokens = torch.tensor([1, 5, 2, 7])
    graph = attribution_graph(parts, tokens, transcoders(parts), most_logits=4)
    logits = parts.model.logits(tokens[None])[0, -1]
    for i, node in enumerate(graph.nodes):
        if node.kind == "logit":
            total = graph.adjacency[i].sum() + graph.constants[i]
            assert total == pytest.approx(float(logits[node.index] - logits.mean()), abs=1e-3)
    # With no token, error or latent there is only bias, whatever the prompt's last tokens were.
    assert np.isfinite(graph.constants).all()


def test_zero_transcoders_leave_tokens_and_errors(tiny):
    parts = tiny("llama")
    given = transcoders(parts, zero=range(parts.n_layers))
    graph = attribution_graph(parts, torch.tensor([1, 2, 3]), given)
    assert {node.kind for node in graph.nodes} == {"token", "error", "logit"}
    assert graph.replacement < 1


def test_a_missing_transcoder_is_named(tiny):
    parts = tiny("gpt2")
    given = transcoders(parts)
    del given[1]
    with pytest.raises(ConfigError, match="layer 1"):
        attribution_graph(parts, torch.tensor([1, 2]), given)


def test_export_and_folder(tiny, tmp_path):
    parts = tiny("gpt2")
    graph = attribution_graph(parts, torch.tensor([1, 5, 2, 7]), transcoders(parts), prompt="a <b>")
    data = graph_json(graph, "slug")
    ids = [node["node_id"] for node in data["nodes"]]
    assert len(set(ids)) == len(ids)
    assert {link["source"] for link in data["links"]} | {link["target"] for link in data["links"]} <= set(ids)
    types = {node["feature_type"] for node in data["nodes"]}
    assert types <= {"cross layer transcoder", "mlp reconstruction error", "embedding", "logit"}
    folder = save_graph(graph, tmp_path / "g", "A <b> C")
    assert json.loads((folder / "graph.json").read_text())["metadata"]["slug"] == "a-b-c"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["kind"], manifest["content"]) == ("circuit", "attribution")
    html = (folder / "report.html").read_text()
    assert "a <b>" not in html.split("<h1>")[1][:200]
    assert len(graph.to_frame()) == graph.pruned.nodes.sum()
