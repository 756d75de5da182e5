"""What holds for the package as a whole: quick to import, quick to help, every public name documented and loadable."""

import statistics
import subprocess
import sys
import time

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
        "heavy = {'torch', 'transformers', 'transformer_lens', 'pandas', 'pydantic', 'streamlit'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


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
    from saelab.workflows.codebook import CodebookJob
    from saelab.workflows.train import TrainJob

    paths = sorted(asset("configs").glob("*.yaml"))
    assert len(paths) >= 2
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
            parse_config(TrainJob, {**data, "store": None}, path.name)
        assert yaml.safe_load(path.read_text())
