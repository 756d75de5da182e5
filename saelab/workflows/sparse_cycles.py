"""Iterative magnitude pruning and sparse model soups: rounds of training and pruning, each in a folder of its own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelab.core.artifacts import (
    MANIFEST,
    file_checksum,
    prepare_output,
    read_json,
    read_manifest,
    read_safetensors,
    write_json,
    write_manifest,
    write_safetensors,
)
from saelab.core.step_hook import NoHook
from saelab.models.bpe import load_bpe
from saelab.models.gpt2 import build_gpt2
from saelab.models.language import Compression, compression
from saelab.models.pretrain import PretrainResult, pretrain, record_config
from saelab.models.pretrain_config import PretrainConfig
from saelab.models.text import open_text
from saelab.sparsity.folder import MASKS, REPORT, load_masks, write_masks
from saelab.sparsity.training import SparseTraining, TrainingRecipe, targets_of_model
from saelab.sparsity.training.masking import Masking
from saelab.sparsity.training.recipe import Cycles
from saelab.sparsity.training.report import count

OTHER_SEED = 1000
"""Added to the seed of the control's weights, and of the copies' data (times their number)."""
WEIGHTS = "model.safetensors"
Tensors = dict[str, Tensor]


def run_cycles(
    config: PretrainConfig, recipe: TrainingRecipe, cycles: Cycles, out: Path, *, force: bool, resume: bool
) -> tuple[PretrainResult, Path]:
    """Train, prune and retrain; return the sparse model in ``out`` and the folder of the first, dense training.

    ``out/rounds`` keeps every training; an interrupted run goes on with the round it was in.
    """
    folder = prepare_output(out, force=force, resume=resume)
    run = _Cycles(config, recipe, cycles, folder / "rounds")
    record_config(config, folder)
    if not (folder / MANIFEST).exists():
        _assemble(run, run.train(), run.control(), folder)
    training = read_json(folder / "training.json")
    heldout = Compression(**{name: training["heldout"][name] for name in ("nats", "tokens", "utf8_bytes")})
    return PretrainResult(folder, heldout, training), run.folder / "0"


@dataclass(frozen=True)
class _Round:
    """One round: its trainings, and the average of their weights."""

    folders: tuple[Path, ...]
    results: tuple[PretrainResult, ...]
    weights: Tensors


class _Cycles:
    """The rounds of one recipe."""

    def __init__(self, config: PretrainConfig, recipe: TrainingRecipe, cycles: Cycles, folder: Path) -> None:
        data = {name: getattr(config, name) for name in PretrainConfig.model_fields}
        self.config, self.recipe, self.cycles, self.folder = PretrainConfig(**data), recipe, cycles, folder
        self.first_step = int((cycles.rewind or 0.0) * config.steps)

    def train(self) -> list[_Round]:
        """Do all rounds; the first is dense."""
        start = self.folder / "start.safetensors"
        dense = self._pretrain(self.folder / "0", self.config, lambda m, o: _Keep(m, start, self.first_step))
        rounds = [_Round((self.folder / "0",), (dense,), _weights(self.folder / "0"))]
        for number in range(1, self.cycles.rounds + 1):
            masks = self._prune(number, rounds[-1])
            rounds.append(self._retrain(number, rounds[-1], masks, start))
        return rounds

    def control(self) -> PretrainResult | None:
        """Train the last mask from other random weights, for as many steps as the last round."""
        if not self.cycles.control or self.cycles.rewind is None:
            return None
        other = self.config.model_copy(update={"seed": self.config.seed + OTHER_SEED})
        masks = self.folder / f"{self.cycles.rounds}-masks"
        return self._pretrain(
            self.folder / "control", self.config, self._masked(masks, lambda: _drawn(other)), self.first_step
        )

    def _prune(self, number: int, last: _Round) -> Path:
        """Write the masks of a round: the largest magnitudes of the last round's weights."""
        sparsity = 1 - (1 - (self.recipe.sparsity or 0.0)) ** (number / self.cycles.rounds)
        recipe = self.recipe.model_copy(update={"cycles": None})
        if recipe.sparsity is not None:
            recipe = recipe.model_copy(
                update={"sparsity": self.recipe.sparsity if number == self.cycles.rounds else sparsity}
            )
        model = model_of(self.config, last.weights)
        targets = targets_of_model(model, recipe.include, recipe.exclude)
        old = {t.name: t.weight != 0 if number > 1 else torch.ones(t.shape, dtype=torch.bool) for t in targets}
        folder = self.folder / f"{number}-masks"
        folder.mkdir(parents=True, exist_ok=True)
        write_masks(folder, Masking(targets, recipe, self.config.steps).masks(0, old))
        return folder

    def _retrain(self, number: int, last: _Round, masks: Path, start: Path) -> _Round:
        weights = last.weights if self.cycles.rewind is None else read_safetensors(start)
        folders, results = [], []
        for copy in range(self.cycles.copies):
            folder = self.folder / (f"{number}" if self.cycles.copies == 1 else f"{number}-copy{copy}")
            results.append(
                self._pretrain(folder, self._varied(copy), self._masked(masks, lambda: weights), self.first_step)
            )
            folders.append(folder)
        return _Round(tuple(folders), tuple(results), average([_weights(folder) for folder in folders]))

    def _varied(self, copy: int) -> PretrainConfig:
        """Return a copy's config: other data order, other weight decay."""
        if self.cycles.copies == 1:
            return self.config
        place = 2 * copy / (self.cycles.copies - 1) - 1
        decay = self.config.weight_decay * self.cycles.decay_factor**place
        return self.config.model_copy(update={"seed": self.config.seed + OTHER_SEED * copy, "weight_decay": decay})

    def _masked(self, masks: Path, weights: Callable[[], Tensors]) -> Callable[..., SparseTraining]:
        """Return what attaches fixed masks to a model that starts from given weights."""
        recipe = TrainingRecipe(masks=str(masks), include=self.recipe.include, exclude=self.recipe.exclude)

        def attach(model: Any, optimizer: torch.optim.Optimizer) -> SparseTraining:
            _load(model, weights())
            targets = targets_of_model(model, recipe.include, recipe.exclude)
            return SparseTraining(targets, recipe, optimizer, self.config.steps)

        return attach

    def _pretrain(
        self, folder: Path, config: PretrainConfig, attach: Callable[..., Any], first_step: int = 0
    ) -> PretrainResult:
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = self.folder / "0" / "tokenizer.json"
        if tokenizer.exists() and not (folder / "tokenizer.json").exists():
            (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
        return pretrain(config, folder, resume=True, attach=attach, first_step=first_step)


class _Keep(NoHook):
    """Writes the weights of one step of a training down, for the rounds that return to them."""

    def __init__(self, model: Any, path: Path, step: int) -> None:
        self._model, self._path, self._step = model, path, step

    def before_forward(self, step: int) -> None:
        """Write, when it is the step."""
        if step == self._step:
            write_safetensors(self._path, {name: p.detach() for name, p in self._model.named_parameters()})


def average(models: Sequence[Tensors]) -> Tensors:
    """Return the mean of models' weights in float32; where all are zero it is zero, so a shared mask stays."""
    return {name: torch.stack([m[name].float() for m in models]).mean(0) for name in models[0]}


def model_of(config: PretrainConfig, weights: Tensors) -> Any:
    """Return a model of a config with given weights."""
    model = build_gpt2(config, bos=0)
    _load(model, weights)
    return model


def _assemble(run: _Cycles, rounds: Sequence[_Round], control: PretrainResult | None, out: Path) -> None:
    """Write the model folder: the last round's average, its masks, and a report over all rounds."""
    last, config = rounds[-1], run.config
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", MASKS):
        (out / name).write_bytes((last.folders[0] / name).read_bytes())
    dtype = getattr(torch, config.save_dtype)
    write_safetensors(out / WEIGHTS, {n: w.to(dtype) for n, w in last.weights.items()}, {"format": "pt"})
    model = model_of(config, _weights(out)).eval()
    tokenizer = load_bpe(out, config.context)
    heldout = compression(model, tokenizer, open_text(config.heldout, config.column), context=config.context)
    targets = targets_of_model(model, run.recipe.include, run.recipe.exclude)
    layers = count(targets, load_masks(out))
    size = sum(layer.outputs * layer.inputs for layer in layers)
    sparsity = sum(layer.sparsity * layer.outputs * layer.inputs for layer in layers) / size
    history = [
        {
            "round": number,
            "sparsity": r.results[0].training.get("sparsity", 0.0),
            "heldout_loss": [result.heldout.loss for result in r.results],
            "seconds": sum(result.training["seconds"] for result in r.results),
        }
        for number, r in enumerate(rounds)
    ]
    trainings = sum(len(r.folders) for r in rounds)  # the control is none that the result needs
    report = {
        "recipe": run.recipe.model_dump(mode="json"),
        "sparsity": sparsity,
        "trainings": trainings,
        "rounds": history,
        "control_loss": None if control is None else control.heldout.loss,
        "seconds": sum(result.training["seconds"] for r in rounds for result in r.results),
        "layers": [vars(layer) for layer in layers],
    }
    write_json(out / REPORT, report)
    training = last.results[0].training | {
        "heldout": {**last.results[0].training["heldout"], **heldout.to_dict()},
        "seconds": report["seconds"],
        "sparsity": sparsity,
        "recipe": report["recipe"],
        "trainings": trainings,
    }
    write_json(out / "training.json", training)
    files = ("config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json", "training.json", MASKS)
    manifest = read_manifest(last.folders[0], "model")
    write_manifest(
        out,
        "model",
        {
            **{key: value for key, value in manifest.items() if key not in ("kind", "saelab_version")},
            "heldout_bits_per_byte": heldout.bits_per_byte,
            "sparsity": sparsity,
            "recipe": report["recipe"],
            "files": {name: file_checksum(out / name) for name in files},
        },
    )


def _weights(folder: Path) -> Tensors:
    return read_safetensors(folder / WEIGHTS)


@torch.no_grad()
def _load(model: Any, weights: Tensors) -> None:
    for name, value in weights.items():
        model.get_parameter(name).copy_(value)


def _drawn(config: PretrainConfig) -> Tensors:
    return {name: p.detach() for name, p in build_gpt2(config, bos=0).named_parameters()}
