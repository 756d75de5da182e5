"""Roles of heads and lengths of prefixes, from the command line."""

import json

from saelab.cli.main import _run
from saelab.workflows.train import TrainJob, run_train
from tests.made import saelab


def test_prefixes_of_the_hand_set_model(capsys):
    command = ["circuits", "prefixes", "--model", "hand-induction", "--longest", "3", "--length", "12", "--rows", "8"]
    assert _run([*command, "--json"]) == 0
    heads = {row["head"]: row for row in json.loads(capsys.readouterr().out)}
    assert heads["1.0"]["kind"] == "short"
    assert heads["1.0"]["prefix_1"] > 0.99
    assert heads["0.0"]["kind"] == "none"
    assert _run([*command[:-1], "8", "--longest", "4"]) == 1
    assert "length is 12" in capsys.readouterr().err


def test_roles_of_the_embedded_models_heads(made, tmp_path, capsys):
    live = {"model": "embedded", "text": str(made / "code.txt"), "tokens": {"context": 64}, "buffer_rows": 1000}
    sae = {"d_sae": 96, "k": 8, "architecture": "topk"}
    training = {"tokens": 4000, "batch_size": 500}
    (trained,) = run_train(TrainJob(live=live, site="blocks.1.attn.hook_z", sae=sae, training=training), tmp_path / "a")
    store = tmp_path / "store"
    assert saelab("build", trained.path, "--text", made / "code.txt", "--max_tokens", 3000, "--out", store) == 0
    capsys.readouterr()
    assert saelab("circuits", "roles", trained.path, "--features", store, "--n", 4, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["head"] for row in rows] == [f"1.{head}" for head in range(6)]
    for row in rows:
        assert 0 <= row["similarity"] <= 1
        assert row["shares"] == sorted(row["shares"], reverse=True)
        assert len(row["features"]) == 4
        assert row["tokens"]
