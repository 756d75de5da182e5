"""Training runs as the browser shows them: their log, whether they go on, and the command that makes them again."""

import json
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saelab.core.artifacts import MANIFEST, read_json
from saelab.core.errors import SaelabError

if TYPE_CHECKING:
    import pandas as pd

LIVE_SECONDS = 120
"""A run whose log has grown within this time counts as running."""


@dataclass(frozen=True)
class RunState:
    """Where a training run stands."""

    name: str
    """The training's folder and the run's."""
    folder: Path
    """Folder of the training (of all runs of a grid)."""
    status: str
    """``finished``, ``running`` or ``stopped``."""
    steps: int
    """Steps logged."""
    total: int | None
    """Steps in all, when the config says so."""
    command: str
    """Shell command that makes the run again; for a stopped run, that goes on with it."""
    config: str
    """The resolved config.yaml, empty when there is none."""


def read_log(path: Path) -> "pd.DataFrame":
    """Return ``training.jsonl`` as a frame, one row per line; a last line that is half-written is left out."""
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return pd.DataFrame(rows)


def run_state(log: Path, frame: "pd.DataFrame") -> RunState:
    """Return where the run of a log stands."""
    folder = log.parent.parent
    finished = (log.parent / MANIFEST).is_file()
    age = time.time() - log.stat().st_mtime
    running = not finished and age < LIVE_SECONDS
    config = folder / "config.yaml"
    text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    return RunState(
        name=f"{folder.name}/{log.parent.name}",
        folder=folder,
        status="finished" if finished else "running" if running else "stopped",
        steps=int(frame["step"].iloc[-1]) if len(frame) else 0,
        total=_total(text),
        command=_command(folder, finished or running),
        config=text,
    )


def _command(folder: Path, again: bool) -> str:
    """Return the command of a training; the demo's own if the demo made it."""
    config = shlex.quote(str(folder / "config.yaml"))
    if not again:
        from saelab.training.checkpoint import CHECKPOINT

        if (folder / CHECKPOINT).is_file():
            return f"saelab train {config} --out {shlex.quote(str(folder))} --resume"
    demo = _demo_options(folder.parent)
    if demo is not None:
        return f"saelab demo --out saelab-demo{demo}"
    return f"saelab train {config} --out {shlex.quote(str(folder) + '-again')}"


def _demo_options(folder: Path) -> str | None:
    try:
        manifest = read_json(folder / MANIFEST)
    except SaelabError:
        return None
    if not isinstance(manifest, dict) or manifest.get("job") != "demo":
        return None
    options = manifest.get("config", {})
    return "".join(f" --{key} {shlex.quote(str(value))}" for key, value in options.items() if value is not None)


def _total(config: str) -> int | None:
    import yaml

    try:
        training = yaml.safe_load(config)["training"]
        return -(-int(training["tokens"]) // int(training["batch_size"]))
    except (yaml.YAMLError, KeyError, TypeError, ValueError):
        return None
