"""A checkpoint: one safetensors file with all runs' tensors, the rest as JSON in its header. Written atomically."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from saelab.core.artifacts import read_safetensors, write_safetensors
from saelab.core.errors import CorruptError, ResumeError
from saelab.training.config import FitConfig

CHECKPOINT = "checkpoint.safetensors"
FREE_TO_CHANGE = {"training.checkpoint_every"}
"""Settings that a resumed run may change, as they do not change its results."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """State between two steps."""

    tensors: dict[str, Tensor]
    """Tensors of run i under ``i.``."""
    configs: list[dict[str, Any]]
    """What each run was asked to do."""
    values: list[dict[str, Any]]
    """JSON-able state of each run, with ``input_scale`` and ``log_bytes``."""
    batches: dict[str, Any]
    """Position of the batch source."""

    def run_tensors(self, index: int) -> dict[str, Tensor]:
        """Return the tensors of one run."""
        prefix = f"{index}."
        return {name[len(prefix) :]: t for name, t in self.tensors.items() if name.startswith(prefix)}


def write_checkpoint(out: Path, checkpoint: Checkpoint) -> None:
    """Write ``out/checkpoint.safetensors``; a kill leaves the old one or the new one."""
    header = {"configs": checkpoint.configs, "values": checkpoint.values, "batches": checkpoint.batches}
    write_safetensors(out / CHECKPOINT, checkpoint.tensors, {"state": json.dumps(header)})


def read_checkpoint(out: Path, runs: Sequence[FitConfig]) -> Checkpoint:
    """Read the checkpoint in ``out``; :class:`ResumeError` names a setting that differs from ``runs``."""
    from safetensors import safe_open

    tensors = read_safetensors(out / CHECKPOINT)
    with safe_open(out / CHECKPOINT, framework="pt") as file:
        metadata = file.metadata() or {}
    try:
        header = json.loads(metadata["state"])
        checkpoint = Checkpoint(tensors, header["configs"], header["values"], header["batches"])
    except (KeyError, json.JSONDecodeError):
        raise CorruptError(f"{out / CHECKPOINT} is not a checkpoint of saelab; delete it and train again") from None
    require_same(checkpoint.configs, [run.model_dump(mode="json") for run in runs])
    return checkpoint


def require_same(saved: list[dict[str, Any]], asked: list[dict[str, Any]]) -> None:
    """Raise :class:`ResumeError` naming the first setting that differs."""
    names = [[config["name"] for config in configs] for configs in (saved, asked)]
    if names[0] != names[1]:
        raise ResumeError(f"cannot resume: the runs were {', '.join(names[0])}, now they are {', '.join(names[1])}")
    for old, new in zip(saved, asked, strict=True):
        was, now = _flat(old), _flat(new)
        for key in [*was, *(key for key in now if key not in was)]:
            if was.get(key) != now.get(key) and key not in FREE_TO_CHANGE:
                raise ResumeError(
                    f"cannot resume run '{old['name']}': {key} was {was.get(key)}, now it is {now.get(key)}; "
                    "use the old value, or start afresh with --force"
                )


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            result |= _flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result
