"""Where metrics go: always a JSONL file, and what else the user asks for behind one small interface."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from saelab.core.artifacts import output_error
from saelab.core.errors import ConfigError, SaelabError, nearest


@runtime_checkable
class Logger(Protocol):
    """Receives the metrics of a run now and then."""

    def log(self, run: str, step: int, metrics: Mapping[str, float]) -> None:
        """Take in the metrics of ``run`` after ``step`` steps."""

    def close(self) -> None:
        """Flush and finish."""


class JsonlLog:
    """``training.jsonl`` of one run: one JSON object per line. On resume it is cut back to the checkpoint."""

    def __init__(self, path: Path, keep: int = 0) -> None:
        """Open ``path``, keeping its first ``keep`` bytes."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b")  # noqa: SIM115 - open for as long as the run
            self._file.truncate(keep)
        except OSError as error:
            raise output_error(path, error) from error
        self._path = path

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line; a number that is not finite is written as null."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        try:
            self._file.write((json.dumps(finite) + "\n").encode())
            self._file.flush()
        except OSError as error:
            raise output_error(self._path, error) from error

    def sync(self) -> int:
        """Bring everything to the disk and return the length of the file."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardLogger:
    """Writes scalars for TensorBoard below ``folder``, one sub-folder per run."""

    def __init__(self, folder: str | Path) -> None:
        """Raise :class:`SaelabError` when the package is missing."""
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError:
            raise SaelabError("logging to TensorBoard needs a package: pip install 'saelab[tensorboard]'") from None
        self._folder, self._make = Path(folder), SummaryWriter
        self._writers: dict[str, Any] = {}

    def log(self, run: str, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics as scalars."""
        if run not in self._writers:
            self._writers[run] = self._make(str(self._folder / run))
        for name, value in metrics.items():
            self._writers[run].add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close all writers."""
        for writer in self._writers.values():
            writer.close()


class WandbLogger:
    """Logs to Weights & Biases, one run for all SAEs, metrics named ``run/metric``."""

    def __init__(self, folder: str | Path, project: str = "saelab") -> None:
        """Raise :class:`SaelabError` when the package is missing."""
        try:
            import wandb
        except ImportError:
            raise SaelabError("logging to Weights & Biases needs a package: pip install 'saelab[wandb]'") from None
        self._run = wandb.init(project=project, dir=str(folder))

    def log(self, run: str, step: int, metrics: Mapping[str, float]) -> None:
        """Send the metrics."""
        self._run.log({f"{run}/{name}": value for name, value in metrics.items()} | {f"{run}/step": step})

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def open_loggers(names: Iterable[str], folder: str | Path) -> list[Logger]:
    """Return loggers by name: ``tensorboard``, ``wandb``."""
    known: dict[str, type[TensorBoardLogger | WandbLogger]] = {
        "tensorboard": TensorBoardLogger,
        "wandb": WandbLogger,
    }
    loggers: list[Logger] = []
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown logger '{name}'{nearest(name, known)} (known: {', '.join(known)})")
        loggers.append(known[name](Path(folder) / name if name == "tensorboard" else folder))
    return loggers
