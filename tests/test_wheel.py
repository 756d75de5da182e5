"""The wheel, in an environment of its own, from an unrelated empty folder."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def run(*command, cwd):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from the checkout."""
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("needs the checkout; an installed package has no pyproject.toml")
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "-w", out, ROOT, cwd=out)
    (built,) = out.glob("saelab-*.whl")
    return built


def test_wheel_holds_data_configs_and_app(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for part in ("data/pylm/model.safetensors", "data/pylm/tokenizer.json", "configs/demo-topk.yaml", "app/"):
        assert any(name.startswith(f"saelab/_bundled/{part}") for name in names), part
    assert not [name for name in names if name.startswith(("tests/", "shared/"))]


def test_installed_wheel_runs_the_demo_from_an_empty_folder(wheel, tmp_path):
    run(sys.executable, "-m", "venv", tmp_path / "env", cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", ROOT / "constraints.txt"]
    run(*pip, "torch", cwd=tmp_path)
    run(*pip, wheel, cwd=tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    saelab = tmp_path / "env" / "bin" / "saelab"
    assert "demo" in run(saelab, "--help", cwd=empty)
    where = run(python, "-c", "import saelab; print(saelab.__file__)", cwd=empty)
    assert str(tmp_path / "env") in where
    small = ["--harvest_tokens", "6000", "--train_tokens", "12000", "--eval_tokens", "1500", "--build_tokens", "3000"]
    result = json.loads(run(saelab, "demo", "--json", *small, cwd=empty))
    assert result["d_sae"] >= 2048
    assert str(tmp_path / "env") in result["paths"]["model"]
    features = result["paths"]["features"]
    assert "feature 5" in run(saelab, "show", features, "--feature", "5", cwd=empty)
