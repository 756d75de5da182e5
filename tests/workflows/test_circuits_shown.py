"""Saved circuits of SAE features and attribution graphs as the browser draws them: clicks lead to features."""

import pytest

from saelab.core.artifacts import write_json, write_manifest
from saelab.core.errors import CorruptError
from saelab.workflows.circuits_shown import feature_of, is_site, open_circuit

SITE = "blocks.1.hook_resid_post"


def test_feature_circuit(tmp_path):
    nodes = [
        {"node": f"{SITE}/all/7", "effect": -2.0, "exact": -1.5, "tokens": "'[' '('"},
        {"node": f"{SITE}/all/error", "effect": 0.5, "exact": None},
    ]
    rest = {"completeness": 0.1, "random": 0.2, "changed": 0.3}
    curve = [{"threshold": t, "n_nodes": n, "faithfulness": f, **rest} for t, n, f in ((0.01, 9, 1.1), (0.1, 2, 0.9))]
    about = {"model": "m", "task": "t", "method": "ig", "metric": "nll", "n_heldout": 3, "n_candidates": 40}
    edges = [{"source": f"{SITE}/all/7", "target": "metric/all/0", "weight": 1.0}]
    data = {**about, "sites": [SITE], "nodes": nodes, "edges": edges, "curve": curve}
    write_json(tmp_path / "circuit.json", data)
    write_manifest(tmp_path, "circuit", {"content": "features"})
    shown = open_circuit(tmp_path)
    points = shown.figure.data[-1].customdata
    assert feature_of(list(points[0])) == (SITE, 7)
    assert [feature_of(list(point)) for point in points[1:]] == [None, None]
    assert "'['" in shown.figure.data[-1].hovertext[0]
    assert shown.table["kind"].tolist() == ["feature", "error"]
    assert shown.table["feature"].isna().tolist() == [False, True]
    assert shown.table["tokens"].tolist() == ["'[' '('", ""]
    assert shown.numbers["faithfulness"][0] == "0.900", "of the nodes drawn, not the best of all sizes"
    write_json(tmp_path / "circuit.json", {**data, "curve": [{"n_nodes": 1, "faithfulness": 0.9, "random": 0.1}]})
    with pytest.raises(CorruptError, match="no entry 'changed', so it is of another version of saelab or damaged"):
        open_circuit(tmp_path)
    write_json(tmp_path / "circuit.json", {"sites": 3})
    with pytest.raises(CorruptError, match="not a circuit that this version can read"):
        open_circuit(tmp_path)


def test_attribution_graph(tmp_path):
    def node(name, layer, feature, position, kind):
        about = {"node_id": name, "layer": layer, "feature": feature, "ctx_idx": position, "feature_type": kind}
        return {**about, "clerp": "<b>says</b>", "influence": 0.5}

    nodes = [
        node("E_5_0", "E", 5, 0, "embedding"),
        node("1_9_1", "1", 9, 1, "cross layer transcoder"),
        node("3_3_1", "3", 3, 1, "logit"),  # two above the last MLP, as in circuit-tracer's files
    ]
    links = [{"source": "E_5_0", "target": "1_9_1", "weight": 1.0}, {"source": "1_9_1", "target": "3_3_1", "weight": 2}]
    metadata = {"prompt_tokens": ["<script>", "b"]}
    write_json(tmp_path / "graph.json", {"metadata": metadata, "nodes": nodes, "links": links})
    about = {"content": "attribution", "prompt": "<script>b", "model": "m", "replacement": 0.7, "completeness": 0.8}
    write_manifest(tmp_path, "circuit", about)
    shown = open_circuit(tmp_path)
    points = [feature_of(list(point)) for point in shown.figure.data[-1].customdata]
    assert points == [None, ("blocks.1.mlp", 9), None]
    assert "<script>" not in str(shown.figure.data[-1].hovertext)
    assert shown.figure.layout.yaxis.ticktext == ("tokens", "MLP 1", "logits")
    assert is_site("blocks.1.mlp", {"site": "blocks.1.ln2.hook_normalized", "target_site": "blocks.1.hook_mlp_out"})
    assert not is_site("blocks.1.mlp", {"site": "blocks.11.hook_mlp_out"})
    assert is_site(SITE, {"site": SITE})
    write_manifest(tmp_path, "circuit", {"content": "unknown"})
    with pytest.raises(CorruptError, match="cannot draw; update saelab"):
        open_circuit(tmp_path)
