"""Training a model around its codebooks: next-token loss, and each codebook's own. Resumable, bit for bit."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from saelab.core.artifacts import read_safetensors, write_json, write_safetensors
from saelab.core.config import Config
from saelab.core.errors import ResumeError, SaelabError
from saelab.core.progress import progress
from saelab.training.checkpoint import CHECKPOINT
from saelab.training.codebook_model import CodebookModel
from saelab.training.loggers import JsonlLog
from saelab.training.setup import PROGRESS
from saelab.training.stopping import Stopped, stop_requests

LOG = "training.jsonl"


class CodebookTraining(Config):
    """Optimisation of a model and its codebooks together."""

    steps: int = Field(default=2000, gt=0)
    """Optimiser steps."""
    rows: int = Field(default=16, gt=0)
    """Rows of text in a step."""
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate of AdamW."""
    warmup: float = Field(default=0.05, ge=0, le=1)
    """Fraction of the steps in which it rises linearly from 0; it falls linearly to 0 over the last fifth."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decay."""
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient: of the model's weights, and of all codes, apart."""
    freeze_model: bool = False
    """Train the codebooks alone."""
    seed: int = Field(default=0, ge=0)
    """Seed of codes and data."""
    revive_every: int = Field(default=50, gt=0)
    """Steps between looks for dead codes."""
    checkpoint_every: int = Field(default=500, gt=0)
    """Steps between checkpoints."""
    log_every: int = Field(default=20, gt=0)
    """Steps between lines of ``training.jsonl``."""


@runtime_checkable
class TokenSource(Protocol):
    """Rows of token ids; which ones depends on the step alone, so there is no position to keep."""

    def batch(self, step: int) -> tuple[Int[Tensor, "b t"], Bool[Tensor, "b t"]]:
        """Return tokens, and which of them count (no BOS, no padding)."""

    def describe(self) -> dict[str, Any]:
        """Say what text this is (JSON-able)."""


@dataclass(frozen=True)
class CodebookResult:
    """What a training measured over its last tenth."""

    steps: int
    """Optimiser steps."""
    loss: float
    """Next-token cross-entropy, nats."""
    reconstruction: float
    """Sum of the codebooks' own losses."""
    dead_fraction: float
    """Share of codes that were dead at the last look."""


def next_token_loss(
    logits: Float[Tensor, "b t vocab"], tokens: Int[Tensor, "b t"], keep: Bool[Tensor, "b t"]
) -> Float[Tensor, ""]:
    """Mean cross-entropy of the kept tokens, given what is before them."""
    scored = keep[:, 1:].to(logits.device)
    targets = tokens[:, 1:].to(logits.device)[scored]
    return torch.nn.functional.cross_entropy(logits[:, :-1][scored].float(), targets)


def fit_codebooks(
    model: CodebookModel, source: TokenSource, config: CodebookTraining, out: Path, *, resume: bool = False
) -> CodebookResult:
    """Train ``model`` in place. Checkpoints and the log go to ``out``, saving the result is the caller's.

    With ``resume`` it goes on from the checkpoint in ``out``, if there is one, and ends where an uninterrupted training
    would have ended. Raises :class:`Stopped` after SIGINT or SIGTERM, when all is saved.
    """
    run = _Run(model, source, config, out)
    run.load(resume)
    run.train()
    return run.result()


class _Run:
    def __init__(self, model: CodebookModel, source: TokenSource, config: CodebookTraining, out: Path) -> None:
        self.model, self.source, self.config, self.out = model, source, config, out
        model.requires_grad_(True)
        model.plain.requires_grad_(not config.freeze_model)
        self.codes = list(model.codebooks.parameters())
        self.own = [p for p in model.plain.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW([*self.own, *self.codes], lr=config.lr, weight_decay=config.weight_decay)
        self.step, self.log_bytes, self.dead = 0, 0, 0.0
        self.recent: list[tuple[float, float]] = []
        self.identity = {
            "config": config.model_dump(mode="json", exclude={"checkpoint_every"}),
            "text": source.describe(),
            "sites": model.sites,
        }

    def load(self, resume: bool) -> None:
        if resume and (self.out / CHECKPOINT).is_file():
            self._restore()
            return
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(self.out / PROGRESS, {"job": "codebook"})
        if not self.model.sites:
            return
        # Codes begin where activations are: of the model without its codebooks.
        tokens, keep = self.source.batch(0)
        for number, site in enumerate(self.model.sites):
            a = self.model.subject.read(tokens, [site])[site]
            generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + number)
            self.model.codebook(site).start_from(a, keep.to(a.device), generator)

    def train(self) -> None:
        config = self.config
        self.model.codebooks.train()
        log = JsonlLog(self.out / LOG, self.log_bytes)
        try:
            with stop_requests() as stop, progress("codebooks", config.steps, "steps", done=self.step) as bar:
                while self.step < config.steps:
                    self._step()
                    bar.advance(1)
                    if self.step % config.log_every == 0 or self.step == config.steps:
                        loss, own = self.recent[-1]
                        log.write({"step": self.step, "loss": loss, "reconstruction": own, "dead_fraction": self.dead})
                        bar.note(f"loss {loss:.3f} dead {self.dead:.1%}")
                    signal = stop()
                    if signal or (self.step % config.checkpoint_every == 0 and self.step < config.steps):
                        self.log_bytes = log.sync()
                        self._save()
                    if signal:
                        raise Stopped(
                            f"stopped by {signal} after step {self.step} of {config.steps}; everything is saved in "
                            f"{self.out}, run the same command with --resume to go on"
                        )
        finally:
            log.close()
            self.model.eval()
            self.model.requires_grad_(False)

    def _step(self) -> None:
        config = self.config
        tokens, keep = self.source.batch(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * _schedule(config, self.step)
        seen: dict[str, Tensor] = {}
        look = self.step % config.revive_every == config.revive_every - 1
        hooks = [self._watch(site, seen) for site in self.model.sites] if look else []
        loss = next_token_loss(self.model.logits(tokens, grad=True), tokens, keep)
        own = self.model.loss()
        for hook in hooks:
            hook.remove()
        if not bool(torch.isfinite(loss)):
            raise SaelabError(f"the loss is not finite at step {self.step}; lower training.lr (now {config.lr:g})")
        (loss + own).backward()  # type: ignore[no-untyped-call]
        # Apart: the codes' own loss is far larger than the task's, and would leave nothing of the model's gradient.
        for parameters in (self.own, self.codes):
            torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if look:
            self._revive(seen, keep)
        self.step += 1
        self.recent = [*self.recent, (float(loss.detach()), float(own.detach()))][-max(1, config.steps // 10) :]

    def _watch(self, site: str, seen: dict[str, Tensor]) -> Any:
        def note(module: Any, arguments: tuple[Any, ...]) -> None:
            seen[site] = arguments[0].detach()

        return self.model.codebook(site).register_forward_pre_hook(note)

    def _revive(self, seen: Mapping[str, Tensor], keep: Bool[Tensor, "b t"]) -> None:
        dead = total = 0
        for number, (site, a) in enumerate(seen.items()):
            book = self.model.codebook(site)
            generator = torch.Generator().manual_seed((self.config.seed * 1_000_003 + self.step) * 1009 + number)
            dead += book.revive(a, keep.to(a.device), generator)
            total += book.unused.numel()
        self.dead = dead / max(total, 1)

    def result(self) -> CodebookResult:
        n = max(len(self.recent), 1)
        losses = [sum(values) / n for values in zip(*self.recent, strict=True)] if self.recent else [float("nan")] * 2
        return CodebookResult(self.step, losses[0], losses[1], self.dead)

    def _save(self) -> None:
        tensors = {f"weight.{name}": value for name, value in self.model.state_dict().items()}
        for index, entry in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{name}": value for name, value in entry.items()}
        state = {"step": self.step, "log_bytes": self.log_bytes, "dead": self.dead, "recent": self.recent}
        shared: dict[int, str] = {}
        unique = {name: t for name, t in tensors.items() if shared.setdefault(t.data_ptr() or id(t), name) == name}
        header = {"state": json.dumps({**state, "identity": self.identity})}
        write_safetensors(self.out / CHECKPOINT, unique, header)

    def _restore(self) -> None:
        from safetensors import safe_open

        tensors = read_safetensors(self.out / CHECKPOINT)
        with safe_open(self.out / CHECKPOINT, framework="pt") as file:
            state = json.loads((file.metadata() or {}).get("state", "{}"))
        if state.get("identity") != self.identity:
            raise ResumeError(f"{self.out} holds a training with other settings; use those, or start with --force")
        weights = {name.removeprefix("weight."): t for name, t in tensors.items() if name.startswith("weight.")}
        self.model.load_state_dict(weights, strict=False)  # tied weights are there once
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("adam."):
                _, index, key = name.split(".", 2)
                moments.setdefault(int(index), {})[key] = tensor.clone()
        self.optimizer.load_state_dict({"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.step, self.log_bytes, self.dead = int(state["step"]), int(state["log_bytes"]), float(state["dead"])
        self.recent = [(float(a), float(b)) for a, b in state["recent"]]


def _schedule(config: CodebookTraining, step: int) -> float:
    at = (step + 0.5) / config.steps
    return min(1.0, at / config.warmup if config.warmup else 1.0, (1 - at) / 0.2)
