"""What the peer scripts share: one JSON line per answer on stdout, batches, and the clock around a training step.

Nothing here imports saelab or a peer: these files run under the peers' own interpreters.
"""

import ctypes
import importlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import IO, Any

PEERS = ("saelens", "sparsify", "dictionary_learning")


class Done(BaseException):
    """Ends a peer's training loop from inside its data source; no peer catches it."""


def answers() -> IO[str]:
    """Return a stream for answers, and send everything else that is printed to stderr (peers print a lot)."""
    stream = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return stream


def say(stream: IO[str], answer: dict[str, Any]) -> None:
    """Write one answer."""
    stream.write(json.dumps(answer) + "\n")
    stream.flush()


def adapter(peer: str) -> ModuleType:
    """Import the adapter of a peer, with everything switched off that reaches the network or needs a GPU."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("WANDB_MODE", "disabled")
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # its Triton kernels do not run on a CPU
    os.environ.setdefault("TQDM_DISABLE", "1")
    return importlib.import_module(f"adapter_{peer}")


class Epochs:
    """Batches from a matrix of activations, reshuffled each epoch by ``seed``; starts afresh when iterated again."""

    def __init__(self, x: Any, batch: int, seed: int) -> None:
        self.x, self.batch, self.seed = x, batch, seed

    def __iter__(self) -> Iterator[Any]:
        import torch

        generator = torch.Generator().manual_seed(self.seed)
        while True:
            order = torch.randperm(len(self.x), generator=generator)
            for start in range(0, len(order) - self.batch + 1, self.batch):
                # a copy: dictionary_learning divides its batches in place
                yield self.x[order[start : start + self.batch]].clone()


class Meter:
    """A data source that measures what a peer's training loop does between two requests for a batch.

    That is one optimiser step: loss, backward, optimiser, normalisations, counters. Each command is ``"step"`` (answer
    ``{"ms"}``) or ``"memory"`` (answer ``{"peak_extra_mb"}``: the highest resident memory during the step above that
    at its start, once the optimiser has its state).
    """

    def __init__(self, batch: Any, commands: Iterable[str], stream: IO[str] | None) -> None:
        self.batch, self.commands, self.stream = batch, commands, stream
        self.answers: list[dict[str, float]] = []

    def __iter__(self) -> Iterator[Any]:
        for command in self.commands:
            if command == "step":
                start = time.perf_counter()
                yield self.batch
                answer = {"ms": (time.perf_counter() - start) * 1e3}
            elif command == "memory":
                before = _begin_peak()
                yield self.batch
                answer = {"peak_extra_mb": (_status("VmHWM") - before) / 1024}
            elif command == "quit":
                break
            else:
                raise SystemExit(f"unknown command {command!r}, expected step, memory or quit")
            self.answers.append(answer)
            if self.stream:
                say(self.stream, answer)
        raise Done


def _begin_peak() -> int:
    """Give freed memory back to the system, reset the peak, and return the resident KiB."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1])
    raise KeyError(key)
