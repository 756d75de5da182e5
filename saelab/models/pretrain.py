"""Pretraining a small GPT-2 on text: tokenizer, training loop, checkpoints, and a Hugging Face folder at the end.

This makes the model that ships with saelab (``configs/pretrain-pylm.yaml``), and any other of its kind.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from saelab.core.artifacts import (
    MANIFEST,
    atomic_writer,
    check_output,
    file_checksum,
    prepare_output,
    read_json,
    read_safetensors,
    write_json,
    write_manifest,
)
from saelab.core.assets import EMBEDDED_MODEL, embedded_model_dir
from saelab.core.config import dump_yaml, load_yaml
from saelab.core.errors import MissingFileError, ResumeError, TextError
from saelab.core.progress import progress
from saelab.core.step_hook import NoHook, StepHook
from saelab.models.bpe import load_bpe, train_bpe
from saelab.models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from saelab.models.crops import CropSampler
from saelab.models.gpt2 import adamw, backward, build_gpt2, load_start, write_model
from saelab.models.language import Compression, compression, induction
from saelab.models.pretrain_config import PretrainConfig, lr_at
from saelab.models.text import open_text

__all__ = ["PretrainConfig", "PretrainResult", "pretrain"]

Attach = Callable[[Any, torch.optim.Optimizer], StepHook]
"""Makes a step hook for a model and its optimiser."""


@dataclass(frozen=True)
class PretrainResult:
    """A finished pretraining."""

    folder: Path
    """The Hugging Face folder."""
    heldout: Compression
    """Prediction of the whole held-out text by the saved weights."""
    training: dict[str, Any]
    """What ``training.json`` holds: config, sources, curve, seconds, scores."""


def pretrain(
    config: PretrainConfig,
    out: str | Path,
    *,
    force: bool = False,
    resume: bool = False,
    attach: Attach | None = None,
    first_step: int = 0,
) -> PretrainResult:
    """Train a tokenizer and a GPT-2 on ``config.train`` and write them to ``out`` as a Hugging Face folder.

    ``out`` receives config.json, model.safetensors, tokenizer.json, tokenizer_config.json, training.json (resolved
    config, sources, loss curve, held-out bits per byte, induction score, seconds), config.yaml and manifest.json. A run
    that was stopped goes on from its last checkpoint with ``resume`` and ends with the same weights, bit for bit, as
    one that was not (on one machine, with as many threads). ``attach`` gives a hook that is called around every step
    (weight sparsity); what it writes beside the model is named in training.json and the manifest. It may also set
    other initial weights, which are then those of step ``first_step``.

    Raises:
        OutputExistsError: ``out`` holds something and neither ``force`` nor ``resume`` is given.
        ResumeError: ``resume`` with another config than the one the run began with.
        TextError: a source is empty, or shorter than one batch.

    """
    if not resume:
        check_output(out, force=force)
        for source in (config.train, config.heldout):
            open_text(source, config.column)  # a missing text shows before an old result is deleted
    out = prepare_output(out, force=force, resume=resume)
    record_config(config, out)
    if (out / MANIFEST).exists():
        training = read_json(out / "training.json")
        fields = {name: training["heldout"][name] for name in ("nats", "tokens", "utf8_bytes")}
        return PretrainResult(out, Compression(**fields), training)
    run = _Run(config, out, attach, first_step)
    run.train()
    return run.finish()


def start_folder(start: str) -> Path:
    """Return the folder that ``start`` names. Raises :class:`MissingFileError` when it is no model of this kind."""
    folder = embedded_model_dir() if start == EMBEDDED_MODEL else Path(start)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            raise MissingFileError(f"start: {folder} has no {name}; give a GPT-2 folder that saelab pretrain wrote")
    return folder


class _Run:
    """The state of one pretraining."""

    def __init__(self, config: PretrainConfig, out: Path, attach: Attach | None = None, first_step: int = 0) -> None:
        self.config, self.out = config, out
        self.source = open_text(config.train, config.column)
        self.heldout = open_text(config.heldout, config.column)
        self.tokenizer = self._tokenizer()
        documents = self._tokenize()
        bos = self.tokenizer.bos_token_id
        self.crops = CropSampler(
            documents,
            separator=bos,
            context=config.context,
            bos_share=config.bos_share,
            seed=config.seed,
            repeat_share=config.repeat_share,
            repeat_from=config.repeat_after * config.batch_rows,
        )
        if self.crops.rows_per_epoch < config.batch_rows:
            raise TextError(
                f"{self.source.name} has {sum(map(len, documents))} tokens, too few for one batch of "
                f"{config.batch_rows} rows of {config.context}; give more text or a smaller batch_rows or context"
            )
        self.model = build_gpt2(config, bos)
        if config.start is not None:
            load_start(self.model, start_folder(config.start))
        self.optimizer = adamw(self.model, config)
        self.hook = NoHook() if attach is None else attach(self.model, self.optimizer)
        saved = load_checkpoint(out, self.model, self.optimizer, self.hook)
        self.state = saved or Checkpoint(step=first_step, seconds=0.0, curve=[])

    def _tokenizer(self) -> Any:
        if self.config.start is not None and not (self.out / "tokenizer.json").exists():
            with atomic_writer(self.out / "tokenizer.json") as file:
                file.write((start_folder(self.config.start) / "tokenizer.json").read_bytes())
        if not (self.out / "tokenizer.json").exists():
            tokenizer = train_bpe(self.source, self.config.vocab_size, self.config.context)
            with atomic_writer(self.out / "tokenizer.json") as file:
                file.write(tokenizer.backend_tokenizer.to_str(pretty=True).encode())
        tokenizer = load_bpe(self.out, self.config.context)
        if len(tokenizer) < self.config.vocab_size:
            raise TextError(
                f"{self.source.name} gives only {len(tokenizer)} tokens of vocabulary, fewer than vocab_size "
                f"{self.config.vocab_size}; give more text or a smaller vocab_size"
            )
        return tokenizer

    def _tokenize(self) -> list[Int[np.ndarray, " n"]]:
        encoded = self.tokenizer.backend_tokenizer.encode_batch(list(self.source))
        return [np.array(document.ids, dtype=np.int32) for document in encoded]

    def train(self) -> None:
        """Run the steps that are left, with checkpoints."""
        config, state = self.config, self.state
        probe = self._probe_documents()
        tokens = config.batch_rows * config.context
        self.model.train()
        with progress("pretrain", config.steps * tokens, done=state.step * tokens) as bar:
            started = time.monotonic() - state.seconds
            while state.step < config.steps:
                loss = self._step(state.step)
                state.step += 1
                state.seconds = time.monotonic() - started
                if state.step % config.eval_every == 0 or state.step == config.steps:
                    self.model.eval()
                    with self.hook.look():
                        seen = compression(self.model, self.tokenizer, probe, context=config.context)
                    self.model.train()
                    state.curve.append(
                        {
                            "step": state.step,
                            "loss": loss,
                            "heldout_loss": seen.loss,
                            "bits_per_byte": seen.bits_per_byte,
                        }
                    )
                    bar.note(f"loss {loss:.3f} held-out {seen.bits_per_byte:.3f} bits/byte")
                bar.advance(tokens)
                if state.step % config.checkpoint_every == 0 or state.step == config.steps:
                    save_checkpoint(self.out, self.model, self.optimizer, state, self.hook)

    def _step(self, step: int) -> float:
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(step, config)
        inputs, targets = self.crops.rows(step * config.batch_rows, config.batch_rows)
        total = 0.0
        self.hook.before_forward(step)
        for first in range(0, config.batch_rows, config.micro_rows):
            part = slice(first, first + config.micro_rows)
            total += backward(
                self.model, inputs[part], targets[part], tokens=targets.numel(), precision=config.precision
            )
        self.hook.after_backward(step)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.hook.after_step(step)
        return total

    def _probe_documents(self) -> list[str]:
        documents: list[str] = []
        for document in self.heldout:
            left = self.config.eval_bytes - sum(map(len, documents))
            if left <= 0:
                break
            documents.append(document[:left])
        return documents

    def finish(self) -> PretrainResult:
        """Write the model, measure what was written, and mark the folder as complete."""
        config, out, model = self.config, self.out, self.model.eval()
        self.hook.finish()
        write_model(model, self.tokenizer, config, out)
        # Measured is what was written: float16 has rounded the weights.
        with torch.no_grad():
            for name, value in read_safetensors(out / "model.safetensors").items():
                model.get_parameter(name).copy_(value)
        heldout = compression(model, self.tokenizer, self.heldout, context=config.context)
        ordinary = torch.arange(1, config.vocab_size)
        length = min(64, (config.context - 1) // 2)
        training = {
            "config": config.model_dump(mode="json"),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "train": {"source": self.source.name, "fingerprint": self.source.fingerprint},
            "train_tokens": sum(map(len, self.crops.documents)),
            "epochs": config.steps * config.batch_rows / self.crops.rows_per_epoch,
            "heldout": {
                "source": self.heldout.name, "fingerprint": self.heldout.fingerprint, **heldout.to_dict(),
                "context": config.context, "stride": config.context // 2,
            },
            "induction": induction(model, ordinary, self.tokenizer.bos_token_id, length=length).to_dict(),
            "seconds": self.state.seconds,
            "curve": self.state.curve,
        }  # fmt: skip
        written = self.hook.write(out)
        training |= written
        write_json(out / "training.json", training)
        files = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training.json")
        write_manifest(
            out,
            "model",
            {
                "heldout_bits_per_byte": heldout.bits_per_byte,
                **written,
                "files": {name: file_checksum(out / name) for name in files},
            },
        )
        (out / "checkpoint.safetensors").unlink(missing_ok=True)
        return PretrainResult(out, heldout, training)


def record_config(config: PretrainConfig, out: Path) -> None:
    """Write ``config.yaml``, or raise :class:`ResumeError` when the folder was begun with another config."""
    path = out / "config.yaml"
    if path.exists():
        old, new = load_yaml(path), config.model_dump(mode="json")
        changed = sorted(key for key in new if old.get(key) != new[key])
        if changed:
            raise ResumeError(
                f"{out} was begun with another {', '.join(changed)} (see {path}); "
                "resume with that config, or use --force"
            )
        return
    with atomic_writer(path) as file:
        file.write(dump_yaml(config).encode())
