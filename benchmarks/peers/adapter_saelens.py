"""SAELens: ``SAETrainer.fit``, ``save_inference_model``, ``SAETrainer.save_checkpoint``, ``SAE.load_from_disk``."""

from collections.abc import Callable, Iterable
from functools import partial
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.gated_sae import GatedTrainingSAE, GatedTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer

NORM_BATCHES = 100
Evaluate = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def version() -> str:
    """Return the version of the package."""
    return package_version("sae-lens")


def train_topk(batches: Iterable[torch.Tensor], d_in: int, d_sae: int, k: int) -> None:
    """Train until ``batches`` ends it."""
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=k))
    config = SAETrainerConfig(total_training_samples=1 << 40, train_batch_size_samples=4096, lr_end=3e-5)
    SAETrainer(config, sae, data_provider=iter(batches)).fit()


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
    """Train with the settings of SAELens' tutorials: expected norm sqrt(d), linear decay over the last fifth."""
    del seed  # the caller has seeded torch, SAELens takes no seed here
    settings = {
        "lr": lr or SAETrainerConfig.lr,
        "lr_decay_steps": steps // 5,
        "normalize_activations": "expected_average_only_in",
        "n_batches_for_norm_estimate": min(NORM_BATCHES, steps),
    }
    kinds = {
        "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
        "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
    }
    make, make_config = kinds[arch]
    sae = make(make_config(d_in=d_in, d_sae=d_sae, k=k, normalize_activations=settings["normalize_activations"]))
    config = SAETrainerConfig(
        total_training_samples=steps * batch,
        train_batch_size_samples=batch,
        lr=settings["lr"],
        lr_end=settings["lr"] / 10,  # what its runner sets when nothing is given
        lr_decay_steps=settings["lr_decay_steps"],
        n_batches_for_norm_estimate=settings["n_batches_for_norm_estimate"],
    )
    trainer = SAETrainer(config, sae, data_provider=iter(batches))
    trainer.fit().save_inference_model(out)
    return out, settings


# Checkpoints ---------------------------------------------------------------------------------------------------------

_KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "standard": (StandardTrainingSAE, StandardTrainingSAEConfig, {}),
    "gated": (GatedTrainingSAE, GatedTrainingSAEConfig, {}),
    "jumprelu": (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig, {}),
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig, {"k": None}),
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, {"k": None}),
    "matryoshka_batchtopk": (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
        {"k": None, "matryoshka_widths": None},
    ),
}


def _random_sae(kind: str, x: torch.Tensor, d_sae: int, k: int, center: bool) -> Any:
    """Return a training SAE with every parameter away from its initial value."""
    make, make_config, extra = _KINDS[kind]
    values = {"k": k, "matryoshka_widths": [d_sae // 4, d_sae]}
    config = make_config(
        d_in=x.shape[1],
        d_sae=d_sae,
        normalize_activations="expected_average_only_in",
        apply_b_dec_to_input=center,
        **{key: values[key] for key in extra},
    )
    sae = make(config)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            noise = torch.randn_like(parameter)
            if name == "threshold":
                parameter.copy_(0.2 + noise.abs() * 0.3)
            elif parameter.ndim == 1:
                parameter.copy_(noise * 0.2)
            else:
                # decoder rows of different norms: SAELens does not keep them at 1
                parameter.copy_(noise / x.shape[1] ** 0.5 * (1 + torch.rand(d_sae).view(_along(parameter, d_sae))))
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold.fill_(0.7)
    return sae.eval()


def _along(parameter: torch.Tensor, d_sae: int) -> tuple[int, int]:
    return (d_sae, 1) if parameter.shape[0] == d_sae else (1, d_sae)


def _scale(x: torch.Tensor) -> float:
    return float(x.shape[1] ** 0.5 / x.norm(dim=1).mean())


def _final(kind: str, out: Path, x: torch.Tensor, d_sae: int, k: int, *, center: bool) -> tuple[Path, Evaluate]:
    """What the end of a training run writes: normalisation folded, inference architecture."""
    sae = _random_sae(kind, x, d_sae, k, center)
    sae.fold_activation_norm_scaling_factor(_scale(x))
    sae.save_inference_model(out)
    return out, load(out)


def _intermediate(kind: str, out: Path, x: torch.Tensor, d_sae: int, k: int) -> tuple[Path, Evaluate]:
    """What training writes on the way: scaled space, the factor in ``activation_scaler.json``."""
    sae = _random_sae(kind, x, d_sae, k, True)
    config = SAETrainerConfig(total_training_samples=1, train_batch_size_samples=1, lr_end=0.0)
    trainer = SAETrainer(config, sae, data_provider=iter([x]))
    scale = trainer.activation_scaler.scaling_factor = _scale(x)
    trainer.n_frac_active_samples = 1
    trainer.save_checkpoint("step", base_path=out)
    sae.save_inference_model(out / "inference")  # BatchTopK has a per-token form only as an inference model
    inference = load(out / "inference")

    def evaluate(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        acts, recon = inference(x * scale)
        return acts, recon / scale

    return out / "step", evaluate


CHECKPOINTS: dict[str, Callable[..., tuple[Path, Evaluate]]] = {
    **{kind: partial(_final, kind, center=True) for kind in _KINDS},
    **{f"{kind}, no b_dec at input": partial(_final, kind, center=False) for kind in ("standard", "jumprelu", "topk")},
    **{f"{kind} checkpoint": partial(_intermediate, kind) for kind in _KINDS},
}


def load(folder: Path) -> Evaluate:
    """Return activations and reconstructions of a checkpoint as functions of x."""
    sae: Any = SAE.load_from_disk(folder)

    def evaluate(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        acts = sae.encode(x)
        return acts, sae.decode(acts)

    return evaluate
