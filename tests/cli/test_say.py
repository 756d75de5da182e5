"""Notes on standard error."""

import io

from rich.console import Console

import saelab as api
from saelab.cli import console
from saelab.cli.console import format_value
from tests.made import saelab


def test_a_long_command_stays_on_one_line(monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=written, width=40))
    console.say("next: saelab train demo-topk.yaml --store a/store --site blocks.1.hook_resid_post --out [runs]")
    assert written.getvalue().endswith("--site blocks.1.hook_resid_post --out [runs]\n")
    assert written.getvalue().count("\n") == 1


def test_an_evaluation_says_when_its_text_is_the_training_text(made, tmp_path, capsys):
    sae = made / "train" / "sae"
    (tmp_path / "other.txt").write_text("class Other:\n    pass\n" * 400)
    for text, title in ((None, "on the training text, NOT held out"), (tmp_path / "other.txt", "held-out evaluation")):
        given = [] if text is None else ["--text", text]
        assert saelab("eval", sae, *given, "--max_tokens", 500) == 0
        assert title in " ".join(capsys.readouterr().out.split())
    assert "which it was trained on" in repr(api.evaluate(sae, max_tokens=500))


def test_show_writes_mappings_as_text():
    value = {"name": "sae", "metrics": {"fvu": 0.12345678, "l0": 16.0}, "sites": ["a", "b"]}
    assert format_value(value) == "name sae, fvu 0.1235, l0 16, sites a, b"
