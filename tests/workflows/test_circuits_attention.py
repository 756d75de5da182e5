"""Roles of heads and lengths of prefixes, from the command line."""

import json

import pytest

from saelab.cli.main import _run


def test_prefixes_of_the_hand_set_model(capsys):
    command = ["circuits", "prefixes", "--model", "hand-induction", "--longest", "3", "--length", "12", "--rows", "8"]
    assert _run([*command, "--json"]) == 0
    heads = {row["head"]: row for row in json.loads(capsys.readouterr().out)}
    assert heads["1.0"]["kind"] == "short"
    assert heads["1.0"]["prefix_1"] > 0.99
    assert heads["0.0"]["kind"] == "none"
    assert _run([*command[:-1], "8", "--longest", "4"]) == 1
    assert "length is 12" in capsys.readouterr().err


@pytest.mark.slow
def test_roles_of_the_embedded_models_heads(tmp_path, capsys):
    sae, store = str(tmp_path / "sae"), str(tmp_path / "store")
    train = ["train", "--model", "embedded", "--text", "stdlib:train", "--site", "blocks.1.attn.hook_z", "--out", sae]
    sizes = ["--architecture", "topk", "--d_sae", "64", "--k", "8", "--tokens", "20000"]
    assert _run([*train, *sizes]) == 0
    assert _run(["build", sae, "--text", "stdlib:heldout", "--tokens", "20000", "--out", store]) == 0
    capsys.readouterr()
    assert _run(["circuits", "roles", sae, "--features", store, "--n", "4", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["head"] for row in rows] == [f"1.{head}" for head in range(6)]
    for row in rows:
        assert 0 <= row["similarity"] <= 1
        assert row["shares"] == sorted(row["shares"], reverse=True)
        assert len(row["features"]) == 4
