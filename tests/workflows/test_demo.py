"""The demo, small: every stage runs, the JSON has what it promises, the printed commands work."""

import json
import re
import shlex

from saelab.cli.main import _run

KEYS = {
    "fvu", "l0", "ce_clean", "ce_sae", "ce_zero", "ce_mean", "ce_recovered", "dead_fraction", "d_in", "d_sae", "k",
    "tokens_train", "tokens_eval", "seconds", "tokens_per_second", "paths",
}  # fmt: skip
SMALL = ["--harvest_tokens", "6000", "--train_tokens", "12000", "--eval_tokens", "1500", "--build_tokens", "3000"]


def test_demo_json(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert _run(["--quiet", "demo", "--out", "d", *SMALL, "--seed", "3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == KEYS
    assert set(result["seconds"]) == set(result["tokens_per_second"]) == {"harvest", "train", "eval", "build"}
    assert set(result["paths"]) == {"model", "store", "sae", "features"}
    assert result["l0"] == result["k"] == 32
    assert result["d_sae"] >= 2048
    assert 0 < result["fvu"] < 1
    assert result["ce_clean"] < result["ce_sae"] < result["ce_zero"]
    expected = (result["ce_zero"] - result["ce_sae"]) / (result["ce_zero"] - result["ce_clean"])
    assert abs(result["ce_recovered"] - expected) < 1e-9


def test_demo_prints_features_and_commands_that_work(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert _run(["--quiet", "demo", "--out", "d", *SMALL]) == 0
    text = capsys.readouterr().out
    for word in ("FVU", "CE recovered", "CE zero", "CE mean", "dead", "tokens/s", "harvest", "build"):
        assert word in text
    assert len(re.findall(r"^feature \d+", text, flags=re.M)) == 3
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("def f(self):\n    return [self.x, (1, 2)]\n" * 200)
    lines = [line.strip() for line in text.split("next:")[1].splitlines() if line.strip().startswith("saelab ")]
    assert len(lines) >= 4
    assert lines.pop(0) == "saelab app d"  # a server; tests/app opens it
    for line in lines:
        arguments = shlex.split(line.replace("PATH/TO/YOUR/CODE", "code"))[1:]
        if arguments[0] == "train":
            arguments += ["--training.tokens", "4000"]
        assert _run(["--quiet", *arguments]) == 0, line
