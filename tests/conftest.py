"""Test setup: shapes are checked at test time, threads are few, nothing reaches the network."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny; threads would only wait for one another
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401  the hook names it by its dotted path

install_import_hook(
    [
        "saelab.core",
        "saelab.kernels",
        "saelab.sae",
        "saelab.sparsity",
        "saelab.activations",
        "saelab.training",
        "saelab.features",
        "saelab.analysis",
    ],
    "tests.typecheck.check",
)

pytest_plugins = ["tests.made"]

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture
def shared() -> Path:
    """The folder of shared real models and texts; tests that need it skip when it is not there."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the shared data folder {SHARED}, which is not part of the project")
    return SHARED
