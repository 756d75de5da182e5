"""dictionary_learning: ``trainSAE`` on an iterator of activations, ``load_dictionary``."""

from collections.abc import Callable, Iterable
from functools import partial
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import torch
from common import Epochs
from dictionary_learning import AutoEncoder
from dictionary_learning.trainers import (
    BatchTopKTrainer,
    GatedSAETrainer,
    JumpReluTrainer,
    StandardTrainer,
    TopKTrainer,
)
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate
from dictionary_learning.training import trainSAE
from dictionary_learning.utils import load_dictionary

Evaluate = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
NAMES = {"layer": 0, "lm_name": "given-activations", "submodule_name": "given-activations"}


def version() -> str:
    """Return the version of the package."""
    return package_version("dictionary-learning")


def train_topk(batches: Iterable[torch.Tensor], d_in: int, d_sae: int, k: int) -> None:
    """Train until ``batches`` ends it."""
    steps = 1 << 40
    config = {"trainer": TopKTrainer, "activation_dim": d_in, "dict_size": d_sae, "k": k, "steps": steps, **NAMES}
    trainSAE(batches, [{**config, "device": "cpu"}], steps=steps, device="cpu")


def train(
    batches: Iterable[torch.Tensor],
    *,
    d_in: int,
    d_sae: int,
    k: int,
    arch: str,
    steps: int,
    batch: int,
    lr: float | None,
    seed: int,
    out: Path,
) -> tuple[Path, dict[str, Any]]:
    """Train with the settings of the package's demo: unit mean squared norm, warm-up, decay over the last fifth.

    Its warm-up of 1000 steps and its threshold's start at step 1000 assume long runs; both are brought down to a tenth
    and a half of shorter ones.
    """
    del batch
    settings = {
        "lr": lr,
        "warmup_steps": min(1000, steps // 10),
        "decay_start": int(steps * 0.8) if steps >= 10 else None,
        "threshold_start_step": min(1000, steps // 2),
    }
    trainer = {"topk": TopKTrainer, "batchtopk": BatchTopKTrainer}[arch]
    config = {"trainer": trainer, "activation_dim": d_in, "dict_size": d_sae, "k": k, "steps": steps, **NAMES}
    trainSAE(
        batches,
        [{**config, **settings, "seed": seed, "device": "cpu"}],
        steps=steps,
        save_dir=str(out),
        normalize_activations=True,
        device="cpu",
    )
    return out / "trainer_0", {**settings, "normalize_activations": True}


# Checkpoints ---------------------------------------------------------------------------------------------------------

_SPARSITY = {"sparsity_warmup_steps": None, "l1_penalty": 1e-3}
_TRAINERS: dict[str, dict[str, Any]] = {
    "AutoEncoder": {"trainer": StandardTrainer, **_SPARSITY},
    "AutoEncoder, April update": {"trainer": StandardTrainerAprilUpdate, "sparsity_warmup_steps": None},
    "GatedAutoEncoder": {"trainer": GatedSAETrainer, **_SPARSITY},
    "JumpReluAutoEncoder": {"trainer": JumpReluTrainer, "sparsity_warmup_steps": None, "bandwidth": 0.1},
    "AutoEncoderTopK": {"trainer": TopKTrainer, "threshold_start_step": 0},
    "BatchTopKSAE": {"trainer": BatchTopKTrainer, "threshold_start_step": 0},
    "BatchTopKSAE, threshold -1": {"trainer": BatchTopKTrainer},
    "MatryoshkaBatchTopKSAE": {
        "trainer": MatryoshkaBatchTopKTrainer,
        "threshold_start_step": 0,
        "group_fractions": [0.25, 0.75],
    },
}


def _trained(extra: dict[str, Any], out: Path, x: torch.Tensor, d_sae: int, k: int) -> tuple[Path, Evaluate]:
    """Train for a few large steps, so that no parameter is at its initial value, and save as training does."""
    steps = 40
    sizes = {"k": k} if "TopK" in extra["trainer"].__name__ else {}
    config = {"activation_dim": x.shape[1], "dict_size": d_sae, "steps": steps, "lr": 2e-2, "warmup_steps": 1, **sizes}
    trainSAE(
        Epochs(x, len(x) // 2, 0),
        [{**config, **NAMES, **extra, "seed": 0, "device": "cpu"}],
        steps=steps,
        save_dir=str(out),
        normalize_activations=True,
        device="cpu",
    )
    return out / "trainer_0", load(out / "trainer_0")


CHECKPOINTS: dict[str, Callable[..., tuple[Path, Evaluate]]] = {
    kind: partial(_trained, extra) for kind, extra in _TRAINERS.items()
}


def load(folder: Path) -> Evaluate:
    """Return activations and reconstructions of a checkpoint as functions of x.

    ``load_dictionary`` would rescale an ``AutoEncoder`` to unit decoder rows; it is loaded as it was saved.
    """
    dictionary, config = load_dictionary(str(folder), "cpu")
    if config["trainer"]["dict_class"] == "AutoEncoder":
        dictionary = AutoEncoder.from_pretrained(str(folder / "ae.pt"), normalize_decoder=False)
    return lambda x: tuple(reversed(dictionary(x, output_features=True)))  # type: ignore[return-value]
