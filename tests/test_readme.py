"""Every command and Python snippet of the README and of docs/main-job.md runs, in the order in which it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", flags=re.M | re.S)


def blocks(name):
    return BLOCK.findall((ROOT / name).read_text(encoding="utf-8"))


def commands(text):
    joined = text.replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.strip() and not line.startswith("#")]


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


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_readme_block_runs(tmp_path):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    prelude = "import torch\nx = torch.randn(8, 192)\n"
    ran = 0
    for language, text in blocks("README.md") + blocks("docs/main-job.md"):
        if language == "python":
            script = [[sys.executable, "-W", "error::SyntaxWarning", "-c", prelude + text]]
        else:
            lines = [line for line in commands(text) if not line.startswith(("make ", "git ", "pip ", "cd "))]
            script = [["bash", "-c", line] for line in lines]
        for command in script:
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{command[-1]}\n{done.stdout}\n{done.stderr}"
            ran += 1
    assert ran >= 6
