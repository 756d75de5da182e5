"""Notes on standard error."""

import io

from rich.console import Console

from saelab.cli import console


def test_a_long_command_stays_on_one_line(monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=written, width=40))
    console.say("next: saelab train demo-topk.yaml --store a/store --site blocks.1.hook_resid_post --out [runs]")
    assert written.getvalue().endswith("--site blocks.1.hook_resid_post --out [runs]\n")
    assert written.getvalue().count("\n") == 1
