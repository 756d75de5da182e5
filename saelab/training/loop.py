"""``fit``: train several SAEs on one pass over the data.

The loop is: take a batch, give it to every run, now and then log and checkpoint. A step is in
:mod:`saelab.training.run`; all that this file adds is order, files and signals.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelab.core.artifacts import write_manifest
from saelab.core.batch import BatchSource
from saelab.core.progress import Bar, progress
from saelab.sae import save_sae
from saelab.training.checkpoint import CHECKPOINT, Checkpoint, write_checkpoint
from saelab.training.config import FitConfig
from saelab.training.feed import next_batch, open_batches, rows_to_check, to_device
from saelab.training.loggers import JsonlLog, Logger
from saelab.training.metrics import BatchSpread
from saelab.training.run import Objective, Run, training_pass
from saelab.training.setup import check_runs, find_device, fresh_runs, prepare, saved_runs
from saelab.training.stopping import Stopped, stop_requests

LOG = "training.jsonl"


@dataclass(frozen=True, repr=False)
class FitResult:
    """One trained SAE."""

    name: str
    """Name of the run."""
    path: Path
    """Its SAE folder."""
    config: dict[str, Any]
    """The resolved :class:`FitConfig` as plain data."""
    steps: int
    """Optimiser steps done."""
    tokens: int
    """Tokens trained on."""
    metrics: dict[str, float]
    """Means over the last tenth of the training: loss, mse, fvu, l0, dead_fraction ..."""

    def __repr__(self) -> str:
        m = self.metrics
        return (
            f"FitResult({str(self.path)!r}: FVU {m['fvu']:.4f}, L0 {m['l0']:.1f}, dead {m['dead_fraction']:.1%} at the "
            f"end of {self.tokens:,} tokens)"
        )


def fit(
    runs: Sequence[FitConfig],
    batches: BatchSource,
    out: str | Path,
    resume: bool = False,
    *,
    loggers: Sequence[Logger] = (),
    provenance: Mapping[str, Any] | None = None,
    objective: Objective = training_pass,
) -> list[FitResult]:
    """Train every SAE of ``runs`` on the same batches and save each to ``out/<name>/``.

    The runs share ``batch_size`` and the data; each ends bit for bit where it would have ended alone. ``provenance``
    (model, store, site ...) goes into every ``meta.json``. Metrics go to ``out/<name>/training.jsonl``, to the progress
    bar and to ``loggers``. ``out/checkpoint.safetensors`` is written now and then, and when SIGINT or SIGTERM asks to
    stop; with ``resume``, training goes on from it and gives what an uninterrupted training would have given.

    ``objective`` gives the losses of a step (default: the SAE's own; see :mod:`saelab.training.end_to_end`).

    Raises :class:`Stopped` after a signal, :class:`ActivationError` for NaN or infinity in the data,
    :class:`ResumeError`, :class:`OutputExistsError`, :class:`ConfigError`.
    """
    out = Path(out)
    check_runs(runs, batches)
    checkpoint = prepare(runs, out, resume)
    device = find_device(runs[0].training.device)
    if checkpoint is None:
        trainings = fresh_runs(runs, batches, device, objective)
    else:
        batches.load_state_dict(checkpoint.batches)
        trainings = saved_runs(runs, checkpoint, device, objective)
    with ExitStack() as stack:
        kept = [0] * len(runs) if checkpoint is None else [v["log_bytes"] for v in checkpoint.values]
        logs = [stack.enter_context(closing(JsonlLog(out / r.name / LOG, n))) for r, n in zip(runs, kept, strict=True)]
        for logger in loggers:
            stack.enter_context(closing(logger))
        _Loop(runs=trainings, batches=batches, out=out, logs=logs, loggers=loggers, device=device).train()
    results = [_save(run, out, provenance or {}) for run in trainings]
    summary = [{"name": r.name, "steps": r.steps, "tokens": r.tokens, "metrics": r.metrics} for r in results]
    write_manifest(out, "run", {"job": "train", "runs": summary, "provenance": dict(provenance or {})})
    (out / CHECKPOINT).unlink(missing_ok=True)
    return results


class _Loop:
    """The training loop proper."""

    def __init__(
        self,
        *,
        runs: list[Run],
        batches: BatchSource,
        out: Path,
        logs: list[JsonlLog],
        loggers: Sequence[Logger],
        device: torch.device,
    ) -> None:
        self.runs, self.batches, self.out, self.logs, self.loggers = runs, batches, out, logs, loggers
        self.device = device
        self.total = max(run.config.training.steps for run in runs)
        self.checkpoint_every = min(run.config.training.checkpoint_every for run in runs)
        self.clock = time.perf_counter()

    def train(self) -> None:
        """Train until every run is done, or a signal comes."""
        step = max(run.steps for run in self.runs)
        rows = self.runs[0].config.training.batch_size
        check = rows_to_check(self.batches, rows)
        with (
            stop_requests() as stop,
            progress("training", self.total * rows, done=step * rows) as bar,
            closing(open_batches(self.batches)) as source,
        ):
            while step < self.total:
                batch = next_batch(source, step, check)
                batch = to_device(batch, self.device)
                spread = BatchSpread(batch.x if batch.target is None else batch.target)
                for run, log in zip(self.runs, self.logs, strict=True):
                    if not run.done:
                        run.step(batch, spread)
                        self._log(run, log, bar)
                step += 1
                bar.advance(rows)
                signal = stop()
                if signal or (step % self.checkpoint_every == 0 and step < self.total):
                    self._checkpoint()
                if signal:
                    raise Stopped(
                        f"stopped by {signal} after step {step} of {self.total}; everything is saved in {self.out}, "
                        "run the same command with --resume to go on"
                    )

    def _log(self, run: Run, log: JsonlLog, bar: Bar) -> None:
        every = run.config.training.log_every
        if run.steps % every and not run.done:
            return
        metrics = run.metrics(run.window)
        log.write({"step": run.steps, "tokens": run.tokens, **metrics, "tokens_per_second": self._speed(run)})
        for logger in self.loggers:
            logger.log(run.config.name, run.steps, metrics)
        bar.note(f"fvu {metrics['fvu']:.3f} l0 {metrics['l0']:.1f} dead {metrics['dead_fraction']:.1%}")
        run.window.reset()

    def _speed(self, run: Run) -> float:
        """Tokens per second of the whole loop since the run's last line."""
        now, before = time.perf_counter(), self.clock
        if run is self.runs[-1]:
            self.clock = now
        return run.window.n / max(now - before, 1e-9)

    def _checkpoint(self) -> None:
        tensors: dict[str, Tensor] = {}
        values: list[dict[str, Any]] = []
        for index, (run, log) in enumerate(zip(self.runs, self.logs, strict=True)):
            own, state = run.state()
            tensors |= {f"{index}.{name}": tensor for name, tensor in own.items()}
            values.append({**state, "input_scale": run.sae.config.input_scale, "log_bytes": log.sync()})
        configs = [run.config.model_dump(mode="json") for run in self.runs]
        write_checkpoint(self.out, Checkpoint(tensors, configs, values, self.batches.state_dict()))


def _save(run: Run, out: Path, provenance: Mapping[str, Any]) -> FitResult:
    run.hook.finish()
    config = run.config.model_copy(update={"sae": run.sae.config}).model_dump(mode="json")
    metrics = run.metrics(run.final)
    meta = {
        "training": config["training"],
        "metrics": metrics,
        "steps": run.steps,
        "tokens": run.tokens,
        "input_scale": run.sae.input_scale,
        "provenance": dict(provenance),
    }
    path = out / run.config.name
    path.mkdir(parents=True, exist_ok=True)
    meta |= run.hook.write(path)
    save_sae(run.sae, path, meta)
    return FitResult(run.config.name, path, config, run.steps, run.tokens, metrics)
