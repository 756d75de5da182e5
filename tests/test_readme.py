"""What the README names exists; tests/docs runs its snippets."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_make_targets_of_the_readme_exist():
    named = set(re.findall(r"\bmake ([a-z-]+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert {"demo", "test"} <= named
    for target in sorted(named):
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def test_commands_of_the_readme_are_known_to_saelab():
    from saelab.cli.main import COMMANDS

    for name in ("README.md", "docs/main-job.md"):
        for command in re.findall(r"(?:^|`)saelab ([a-z-]+)", (ROOT / name).read_text(encoding="utf-8"), flags=re.M):
            assert command in COMMANDS, f"{name}: saelab {command}"
