"""What a whole training step promises: bounded memory, and the same bits every time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from saelab.core.batch import Batch
from saelab.core.config import parse_config
from saelab.sae import ARCHITECTURES, build_sae
from saelab.training import FitConfig
from saelab.training.metrics import BatchSpread
from saelab.training.run import Run

MEMORY = Path(__file__).resolve().parents[2] / "benchmarks" / "memory.py"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("precision", "dead"), [("f32", 0), ("bf16", 0), ("f32", 1024), ("f32", 65536)])
def test_a_step_with_131072_features_takes_less_than_a_gigabyte(precision, dead):
    """One dense matrix of activations would take 2.1 GB, and a dense step holds four; AuxK included."""
    sizes = [4096, 512, 131072, 32, "topk", precision, dead]
    command = [sys.executable, str(MEMORY), "--measure", *map(str, sizes)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert found["dense_activations_mb"] > 2000
    assert 0 < found["peak_extra_mb"] < 1000


def trained(architecture: str, precision: str) -> list[torch.Tensor]:
    fields = ARCHITECTURES[architecture].config.model_fields
    sae = {"architecture": architecture, "d_in": 16, "d_sae": 64, "input_scale": 1.0} | (
        {"k": 4} if "k" in fields else {}
    )
    training = {"tokens": 10_000, "batch_size": 50, "precision": precision, "device": "cpu", "dead_after_tokens": 100}
    config = parse_config(FitConfig, {"sae": sae, "training": training})
    run = Run(config, build_sae(config.sae), torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        x = torch.randn(50, 16, generator=generator)
        batch = Batch(x, gradient=torch.randn(50, 16, generator=generator) if run.sae.needs_gradient else None)
        run.step(batch, BatchSpread(x))
    assert run.tokens > config.training.dead_after
    return [parameter.detach() for parameter in run.sae.parameters()]


@pytest.mark.parametrize("precision", ["f32", "bf16"])
@pytest.mark.parametrize(
    "architecture", ["topk", "mutual_choice", "feature_choice", "relu", "jumprelu", "gated", "gradient"]
)
def test_same_seed_same_bits(architecture, precision):
    """With dead features, so AuxK is in it."""
    assert all(torch.equal(a, b) for a, b in zip(*(trained(architecture, precision) for _ in range(2)), strict=True))
