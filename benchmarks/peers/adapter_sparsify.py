"""sparsify: ``Trainer.fit`` around a model that only hands out given activations, ``SparseCoder.save_to_disk``.

sparsify's trainer reads activations from the output of a module of a language model. Here the "language model" has one
module that returns the next batch, so that everything else is the trainer's own code.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.metadata import version as package_version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from sparsify import SaeConfig, SparseCoder, TrainConfig, Trainer
from torch import nn

Evaluate = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def version() -> str:
    """Return the version of the package."""
    return package_version("eai-sparsify")


class _Site(nn.Module):
    """Returns the activations of the batch that the dataset has just drawn."""

    def __init__(self, d_in: int) -> None:
        super().__init__()
        self.current = torch.zeros(1, 1, d_in)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        del tokens
        return self.current


class _Model(nn.Module):
    """As much of a language model as ``Trainer`` looks at."""

    def __init__(self, d_in: int) -> None:
        super().__init__()
        self.site = _Site(d_in)
        self.device = torch.device("cpu")
        self.config = SimpleNamespace(num_hidden_layers=1)
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}

    @property
    def base_model(self) -> "_Model":
        return self

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.site(input_ids)


class _Sequences:
    """A dataset of ``steps`` "sequences", each a whole batch of activations."""

    def __init__(self, site: _Site, batches: Iterator[torch.Tensor], steps: int) -> None:
        self.site, self.batches, self.steps = site, batches, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        x = next(self.batches)
        self.site.current = x.unsqueeze(0)
        return {"input_ids": torch.zeros(len(x), dtype=torch.long)}


def _trainer(batches: Iterable[torch.Tensor], steps: int, d_in: int, sae: SaeConfig, **config: Any) -> Trainer:
    model = _Model(d_in)
    return Trainer(
        TrainConfig(sae, batch_size=1, hookpoints=["site"], log_to_wandb=False, save_every=1 << 40, **config),
        _Sequences(model.site, iter(batches), steps),  # type: ignore[arg-type]
        model,  # type: ignore[arg-type]
    )


def train_topk(batches: Iterable[torch.Tensor], d_in: int, d_sae: int, k: int) -> None:
    """Train until ``batches`` ends it."""
    _trainer(batches, 1 << 40, d_in, SaeConfig(num_latents=d_sae, k=k)).fit()


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
    """Train with sparsify's defaults: schedule-free sign descent, no normalisation, no AuxK."""
    del batch
    if arch != "topk":
        raise SystemExit(f"sparsify has no {arch}")
    config = {"lr": lr, "init_seeds": [seed], "save_dir": str(out), "run_name": "run"}
    trainer = _trainer(batches, steps, d_in, SaeConfig(num_latents=d_sae, k=k), **config)
    trainer.fit()
    return out / "run" / "site", {"lr": lr or 5e-3 / (d_sae / 2**14) ** 0.5, "optimizer": trainer.cfg.optimizer}


# Checkpoints ---------------------------------------------------------------------------------------------------------


def _random(options: dict[str, Any], out: Path, x: torch.Tensor, d_sae: int, k: int) -> tuple[Path, Evaluate]:
    coder = SparseCoder(x.shape[1], SaeConfig(**{"k": k, "num_latents": d_sae, **options}))
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.ndim == 1 else x.shape[1] ** -0.5))
        if not coder.cfg.transcode:
            coder.b_dec.copy_(x.mean(0))
    coder.save_to_disk(out)
    return out, load(out)


CHECKPOINTS: dict[str, Callable[..., tuple[Path, Evaluate]]] = {
    "topk": partial(_random, {}),
    "topk, num_latents 0": partial(_random, {"num_latents": 0, "expansion_factor": 4}),
    "groupmax": partial(_random, {"activation": "groupmax"}),
    "transcoder": partial(_random, {"transcode": True}),
    "skip transcoder": partial(_random, {"transcode": True, "skip_connection": True}),
}


def load(folder: Path) -> Evaluate:
    """Return activations and reconstructions of a checkpoint as functions of x."""
    coder = SparseCoder.load_from_disk(folder)

    def evaluate(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        code = coder.encode(x)
        acts = torch.zeros(len(x), coder.num_latents).scatter_(1, code.top_indices, code.top_acts)
        return acts, coder(x, y=x).sae_out

    return evaluate
