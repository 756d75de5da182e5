"""What holds for the package as a whole: quick to import, quick to help, every public name documented and loadable."""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import saelab
from saelab.core.assets import asset


def test_public_names_load_and_are_documented():
    for name in saelab.__all__:
        if name != "__version__":
            assert getattr(saelab, name).__doc__, name
    assert set(saelab.__all__) <= set(dir(saelab))


def test_import_and_help_do_not_import_torch():
    code = (
        "import sys, saelab; from saelab.cli.main import _run; assert _run(['--help']) == 0; "
        "heavy = {'torch', 'transformers', 'transformer_lens', 'pandas', 'plotly', 'pydantic', 'streamlit'}; "
        "heavy &= set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_import_is_quick():
    code = "import time; t = time.perf_counter(); import saelab; print(time.perf_counter() - t)"
    took = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(5)]
    assert min(took) < 0.2, took


USER = """
import saelab
from saelab import SAE, circuits

store = saelab.harvest("embedded", "blocks.0.hook_mlp_out", out="store", harvest={"dtype": "float16"})
trained = saelab.train("demo-topk.yaml", store=store, out="sae", sae={"k": 4})
sae: SAE = trained.load()
reveal_type(store)
reveal_type(trained)
reveal_type(saelab.evaluate(sae))
reveal_type(saelab.evaluate(sae, full=True))
reveal_type(saelab.build_features(trained[0], out="features"))
reveal_type(saelab.dark_matter(sae, store, out="dm").to_frame())
reveal_type(circuits.find("induction").faithfulness)
reveal_type(saelab.explain("features").plot())
saelab.harvest(3, out="x")  # wrong
saelab.evaluate("x", max_tokens="many")  # wrong
saelab.trainn  # wrong
"""


@pytest.mark.slow
def test_mypy_sees_the_types_in_a_users_file(tmp_path):
    (tmp_path / "user.py").write_text(USER)
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--config-file", os.devnull, "user.py"]
    root = Path(saelab.__file__).parents[1]
    environment = {**os.environ, "MYPYPATH": str(root)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    said = [line for line in done.stdout.splitlines() if line.startswith("user.py")]
    revealed = [line.split('"')[1].rpartition(".")[2] for line in said if "Revealed" in line]
    assert revealed[:5] == ["ActivationStore", "Training", "Evaluation", "FullEvaluation", "FeatureStore"], done.stdout
    assert revealed[6] == "float"
    errors = [int(line.split(":")[1]) for line in said if "error:" in line]
    wrong = [number for number, line in enumerate(USER.splitlines(), 1) if line.endswith("# wrong")]
    assert errors == wrong, done.stdout


def test_help_answers_quickly():
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "saelab", "--help"], check=True, capture_output=True)
        seconds.append(time.perf_counter() - started)
    assert statistics.median(seconds) < 0.5, seconds


def test_every_shipped_config_is_valid(tmp_path):
    from saelab.core.config import apply_overrides, load_yaml, parse_config
    from saelab.models.pretrain import PretrainConfig
    from saelab.sae import ARCHITECTURES
    from saelab.workflows.codebook import CodebookJob
    from saelab.workflows.train import TrainJob

    paths = sorted(asset("configs").glob("*.yaml"))
    architectures = set()
    for path in paths:
        if path.name.startswith("pretrain"):
            parse_config(PretrainConfig, load_yaml(path), path.name)
        elif path.name.startswith("codebook"):
            parse_config(CodebookJob, load_yaml(path), path.name)
        else:
            data = apply_overrides(load_yaml(path), {"sae.d_in": 192})
            data |= {} if "pairs" in data else {"live": {}}
            if "end_to_end" in data:  # sizes come from the SAE that is fine-tuned
                data = apply_overrides(data, {"sae.d_sae": 64})
            job = parse_config(TrainJob, {**data, "store": None}, path.name)
            architectures.add(job.sae.architecture)
        assert yaml.safe_load(path.read_text())
    assert architectures == set(ARCHITECTURES)
