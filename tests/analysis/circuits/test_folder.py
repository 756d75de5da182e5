"""Circuit folders, reports, and the command line."""

import json

import numpy as np
import pytest

from saelab.analysis.circuits.circuit import load_circuit, save_circuit, smallest_circuit
from saelab.analysis.circuits.code_sae import CodesConfig
from saelab.analysis.circuits.compare import compare
from saelab.analysis.circuits.controls import CONTROLS
from saelab.analysis.circuits.eap import eap
from saelab.analysis.circuits.run import EdgeRunner, Setting
from saelab.analysis.circuits.tasks import task_batch
from saelab.analysis.circuits.truth import truth_for
from saelab.cli.main import _run
from saelab.core.errors import ConfigError
from saelab.workflows.circuits import open_circuit


@pytest.fixture(scope="module")
def runners(known):
    parts = known("hand-induction")
    setting = Setting("logit_diff", "corrupted")
    return [
        EdgeRunner(parts, task_batch("induction", parts.model, 6, 0, split), setting) for split in ("train", "heldout")
    ]


def test_the_smallest_circuit_is_found_saved_and_read_again(runners, tmp_path):
    from saelab.analysis.circuits.exact import patch_edges

    train, heldout = runners
    circuit = smallest_circuit(train, heldout, patch_edges(train), n_random=4)
    assert circuit.heads == ["a0.h0", "a1.h0"]
    assert circuit.faithfulness == pytest.approx(1, abs=1e-3)
    assert circuit.completeness == pytest.approx(0, abs=1e-3)
    assert set(circuit.random_faithfulness) == {"edges", "paths", "parts"}
    assert max(max(values) for values in circuit.random_faithfulness.values()) < 0.5
    folder = save_circuit(circuit, tmp_path / "c")
    again = load_circuit(folder)
    assert (again.edges == circuit.edges).all()
    assert again.to_frame().equals(circuit.to_frame())
    assert again.random_faithfulness == circuit.random_faithfulness
    opened = open_circuit(folder)
    assert opened.manifest["kind"] == "circuit"
    assert len(opened.figure.data) == len(circuit.plot().data)
    html = (folder / "report.html").read_text()
    assert "a0.h0-&gt;a1.h0&lt;k&gt;" in html
    assert 'src="http' not in html, "the report is self-contained"


def test_a_target_out_of_reach_is_one_line(runners):
    train, heldout = runners
    scores = eap(train)
    with pytest.raises(ConfigError, match="no circuit from eap reaches"):
        smallest_circuit(train, heldout, scores, target=99)


def test_random_circuits_have_the_size_of_the_circuit(runners):
    graph = runners[0].graph
    circuit = graph.mask(["embed->a0.h0<v>", "a0.h0->a1.h0<k>", "a1.h0->m1", "m1->logits", "embed->a1.h0<v>"])
    for name, control in CONTROLS.items():
        masks = control(graph, circuit, 6, 0)
        assert not (masks & ~graph.valid).any()
        assert len({mask.tobytes() for mask in masks}) > 1
        if name != "parts":
            assert (masks.sum((1, 2)) == circuit.sum()).all()
        if name != "edges":
            assert all((graph.connected(mask) == mask).all() for mask in masks), "nothing in it leads nowhere"
    for mask in CONTROLS["parts"](graph, circuit, 6, 0):
        names = [graph.writers[w] for w in graph.nodes(mask)]
        assert sum(name.startswith("a") for name in names) == 2
        assert sum(name.startswith("m") for name in names) == 1


def test_compare_against_the_known_circuit(known):
    parts = known("proportion")
    batches = [task_batch("proportion", parts.model, 10, 0, split) for split in ("train", "heldout")]
    truth = truth_for("proportion", EdgeRunner(parts, batches[0], Setting("kl", "zero")).graph)
    config = CodesConfig(pooling="last", epochs=20, examples=4)
    methods = ("codes", "patching", "patching-nodes", "acdc", "eap-ig", "dfa")
    found = compare(parts, *batches, Setting("kl", "zero"), config, truth=truth, methods=methods, tau=1e-3)
    rows = {row.method: row for row in found.rows}
    assert rows["patching"].edge_auc == rows["acdc"].edge_auc == 1
    assert rows["patching"].edge_f1 == rows["acdc"].edge_f1 == 1
    assert rows["patching nodes"].node_auc == 1
    assert np.isnan(rows["codes"].edge_auc)
    assert rows["acdc"].runs <= found.n_edges
    assert all(row.cpu_seconds > 0 for row in found.rows)
    assert json.loads(json.dumps(found.to_dict()))["n_true_edges"] == 7
    assert list(found.to_frame()["method"]) == list(rows)


def test_commands(tmp_path, capsys):
    out = tmp_path / "c"
    find = ["circuits", "find", "--task", "induction", "--model", "hand-induction", "--n", "6", "--n_heldout", "6",
            "--method", "acdc", "--n_random", "3", "--out", str(out), "--json"]  # fmt: skip
    assert _run(find) == 0
    assert json.loads(capsys.readouterr().out)["heads"] == ["a0.h0", "a1.h0"]
    assert _run(find) == 1
    assert "--force" in capsys.readouterr().err
    assert _run([*find[:-1], "--force"]) == 0
    lines = capsys.readouterr().out.splitlines()
    circuit, parts = (
        next(x.split() for x in lines if name in x) for name in ("the circuit ", "3 random heads and MLPs")
    )
    assert (circuit[-2:], len(parts)) == (["1.000", "-"], 7), "one line for each circuit judged, at 80 columns"
    heads = ["circuits", "heads", "--task", "trigger", "--model", "hand-induction", "--n", "12", "--epochs", "30"]
    assert _run([*heads, "--json"]) == 1
    assert "pooling" in capsys.readouterr().err
    assert _run([*heads, "--pooling", "last", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["heads"]) == 8
    assert _run(["circuits", "tasks", "--json"]) == 0
    assert "recall" in {task["name"] for task in json.loads(capsys.readouterr().out)["tasks"]}
    assert _run(["circuits", "fnd"]) == 2
    assert "did you mean find" in capsys.readouterr().err
