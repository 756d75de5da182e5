"""Pretraining a small GPT-2 on text: tokenizer, training loop, checkpoints, and a Hugging Face folder at the end.

This makes the model that ships with saelab (``configs/pretrain-pylm.yaml``), and any other of its kind.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int
from pydantic import Field, model_validator
from torch import Tensor

from saelab.core.artifacts import (
    MANIFEST,
    atomic_writer,
    file_checksum,
    prepare_output,
    read_json,
    write_json,
    write_manifest,
    write_safetensors,
)
from saelab.core.config import Config, dump_yaml, load_yaml
from saelab.core.errors import ResumeError, TextError
from saelab.core.progress import progress
from saelab.models.bpe import load_bpe, train_bpe
from saelab.models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from saelab.models.crops import CropSampler
from saelab.models.language import Compression, compression, induction
from saelab.models.text import open_text


class PretrainConfig(Config):
    """Everything that decides what a pretrained model becomes."""

    train: str = "stdlib:train"
    """Text to train on, as for ``open_text``."""
    heldout: str = "stdlib:heldout"
    """Text to measure on."""
    column: str = "text"
    """Text column, where the text is .jsonl, .parquet or a dataset."""
    vocab_size: int = Field(4096, ge=257)
    """Tokens in the byte-level BPE vocabulary: 256 bytes, <|endoftext|>, merges."""
    n_layers: int = Field(4, ge=1)
    """Transformer blocks."""
    d_model: int = Field(192, ge=1)
    """Width of the residual stream."""
    n_heads: int = Field(6, ge=1)
    """Attention heads per block; must divide d_model."""
    context: int = Field(256, ge=8)
    """Longest row the model can read, and the length it is trained on."""
    steps: int = Field(4000, ge=1)
    """Optimiser steps."""
    batch_rows: int = Field(16, ge=1)
    """Rows per step; a step sees batch_rows * context tokens."""
    micro_rows: int = Field(8, ge=1)
    """Rows per forward and backward pass; smaller needs less memory and changes nothing else."""
    lr: float = Field(2.5e-3, gt=0)
    """Peak learning rate."""
    lr_final: float = Field(0.05, ge=0, le=1)
    """Learning rate at the end, as a share of the peak (cosine in between)."""
    warmup_steps: int = Field(150, ge=0)
    """Steps of linear warm-up."""
    weight_decay: float = Field(0.1, ge=0)
    """AdamW's decay of matrices; vectors (biases, norms) have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's moment decays."""
    clip: float = Field(1.0, gt=0)
    """Largest gradient norm."""
    bos_share: float = Field(0.8, ge=0, le=1)
    """Share of the training rows that begin with <|endoftext|>."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Of matrix products in training (bfloat16: autocast; weights and moments stay in float32)."""
    save_dtype: Literal["float32", "float16"] = "float16"
    """Of the weights on disk; they are loaded as float32 either way."""
    eval_every: int = Field(250, ge=1)
    """Steps between looks at the held-out text."""
    eval_bytes: int = Field(100_000, ge=1)
    """Held-out text for those looks; the final figure is from all of it."""
    checkpoint_every: int = Field(100, ge=1)
    """Steps between checkpoints, from which an interrupted run resumes."""
    seed: int = Field(0, ge=0)
    """Of initial weights and training rows."""

    @model_validator(mode="after")
    def _check(self) -> "PretrainConfig":
        if self.d_model % self.n_heads:
            raise ValueError(f"n_heads {self.n_heads} does not divide d_model {self.d_model}; choose a divisor")
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be below steps {self.steps}")
        return self


@dataclass(frozen=True)
class PretrainResult:
    """A finished pretraining."""

    folder: Path
    """The Hugging Face folder."""
    heldout: Compression
    """Prediction of the whole held-out text by the saved weights."""
    training: dict[str, Any]
    """What ``training.json`` holds: config, sources, curve, seconds, scores."""


def pretrain(config: PretrainConfig, out: str | Path, *, force: bool = False, resume: bool = False) -> PretrainResult:
    """Train a tokenizer and a GPT-2 on ``config.train`` and write them to ``out`` as a Hugging Face folder.

    ``out`` receives config.json, model.safetensors, tokenizer.json, tokenizer_config.json, training.json (resolved
    config, sources, loss curve, held-out bits per byte, induction score, seconds), config.yaml and manifest.json. A run
    that was stopped goes on from its last checkpoint with ``resume`` and ends with the same weights, bit for bit, as
    one that was not (on one machine, with as many threads).

    Raises:
        OutputExistsError: ``out`` holds something and neither ``force`` nor ``resume`` is given.
        ResumeError: ``resume`` with another config than the one the run began with.
        TextError: a source is empty, or shorter than one batch.

    """
    out = prepare_output(out, force=force, resume=resume)
    _record_config(config, out)
    if (out / MANIFEST).exists():
        training = read_json(out / "training.json")
        fields = {name: training["heldout"][name] for name in ("nats", "tokens", "utf8_bytes")}
        return PretrainResult(out, Compression(**fields), training)
    run = _Run(config, out)
    run.train()
    return run.finish()


def lr_at(step: int, config: PretrainConfig) -> float:
    """Learning rate of step ``step`` (from 0): linear warm-up, then a cosine from ``lr`` to ``lr * lr_final``."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps)
    return config.lr * (config.lr_final + (1 - config.lr_final) * 0.5 * (1 + math.cos(math.pi * done)))


class _Run:
    """The state of one pretraining."""

    def __init__(self, config: PretrainConfig, out: Path) -> None:
        self.config, self.out = config, out
        self.source = open_text(config.train, config.column)
        self.heldout = open_text(config.heldout, config.column)
        self.tokenizer = self._tokenizer()
        documents = self._tokenize()
        bos = self.tokenizer.bos_token_id
        self.crops = CropSampler(documents, bos, config.context, config.bos_share, config.seed)
        if self.crops.rows_per_epoch < config.batch_rows:
            raise TextError(
                f"{self.source.name} has {sum(map(len, documents))} tokens, too few for one batch of "
                f"{config.batch_rows} rows of {config.context}; give more text or a smaller batch_rows or context"
            )
        self.model = build_gpt2(config, bos)
        self.optimizer = _optimizer(self.model, config)
        self.state = load_checkpoint(out, self.model, self.optimizer) or Checkpoint(step=0, seconds=0.0, curve=[])

    def _tokenizer(self) -> Any:
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
                    save_checkpoint(self.out, self.model, self.optimizer, state)

    def _step(self, step: int) -> float:
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(step, config)
        inputs, targets = self.crops.rows(step * config.batch_rows, config.batch_rows)
        total = 0.0
        for first in range(0, config.batch_rows, config.micro_rows):
            part = slice(first, first + config.micro_rows)
            total += backward(
                self.model, inputs[part], targets[part], tokens=targets.numel(), precision=config.precision
            )
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
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
        from transformers import GPT2LMHeadModel

        config, out = self.config, self.out
        write_model(self.model, self.tokenizer, config, out)
        model = GPT2LMHeadModel.from_pretrained(out, dtype=torch.float32).eval()
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
        write_json(out / "training.json", training)
        files = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training.json")
        write_manifest(
            out,
            "model",
            {
                "heldout_bits_per_byte": heldout.bits_per_byte,
                "files": {name: file_checksum(out / name) for name in files},
            },
        )
        (out / "checkpoint.safetensors").unlink(missing_ok=True)
        return PretrainResult(out, heldout, training)


def build_gpt2(config: PretrainConfig, bos: int) -> Any:
    """Build an untrained GPT-2 (tied embeddings, no dropout), its weights drawn from ``config.seed``."""
    from transformers import GPT2Config, GPT2LMHeadModel

    # transformers draws initial weights from the global generator; forking leaves the caller's state as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=config.vocab_size,
                n_positions=config.context,
                n_embd=config.d_model,
                n_layer=config.n_layers,
                n_head=config.n_heads,
                # The same function as GPT-2's gelu_new, in one kernel instead of eight.
                activation_function="gelu_pytorch_tanh",
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=bos,
                eos_token_id=bos,
            )
        )


def backward(
    model: Any,
    inputs: Int[Tensor, "rows context"],
    targets: Int[Tensor, "rows context"],
    *,
    tokens: int,
    precision: str,
    piece: int = 512,
) -> float:
    """Add the gradient of the mean loss over ``tokens`` tokens, of which these rows are a part; return their share.

    Logits are made and consumed for ``piece`` tokens at a time: all at once they would be the largest tensor by far,
    and fresh memory for them costs as much as the products.
    """
    half = precision == "bfloat16"
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        hidden = model.transformer(input_ids=inputs, use_cache=False).last_hidden_state
    leaf = hidden.detach().requires_grad_()
    total = 0.0
    states, wanted = leaf.flatten(0, 1), targets.flatten()
    for first in range(0, len(wanted), piece):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logits = model.lm_head(states[first : first + piece])
        loss = F.cross_entropy(logits.float(), wanted[first : first + piece], reduction="sum") / tokens
        torch.autograd.backward([loss])
        total += loss.item()
    torch.autograd.backward([hidden], [leaf.grad])
    return total


def write_model(model: Any, tokenizer: Any, config: PretrainConfig, out: Path) -> None:
    """Write the Hugging Face folder: config.json, model.safetensors in ``save_dtype``, tokenizer files."""
    dtype = getattr(torch, config.save_dtype)
    # The output matrix is the embedding; transformers ties them again on loading.
    weights = {name: value.to(dtype) for name, value in model.state_dict().items() if name != "lm_head.weight"}
    write_safetensors(out / "model.safetensors", weights, {"format": "pt"})
    written = model.config.to_dict() | {
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new",
        "dtype": "float32",
    }
    write_json(out / "config.json", written)
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokenizer.bos_token,
            "eos_token": tokenizer.eos_token,
            "model_max_length": config.context,
            "clean_up_tokenization_spaces": False,
        },
    )


def _optimizer(model: Any, config: PretrainConfig) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def _record_config(config: PretrainConfig, out: Path) -> None:
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
