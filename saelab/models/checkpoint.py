"""The checkpoint of a pretraining: weights, AdamW's moments, step and curve in one safetensors file."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saelab.core.artifacts import read_safetensors, write_safetensors
from saelab.core.errors import CorruptError
from saelab.core.step_hook import StepHook

CHECKPOINT = "checkpoint.safetensors"


@dataclass
class Checkpoint:
    """Where a pretraining stands; the random state is a function of the step."""

    step: int
    """Steps done."""
    seconds: float
    """Training time until now, earlier sessions included."""
    curve: list[dict[str, float]]
    """Looks at the held-out text: step, loss, heldout_loss, bits_per_byte."""


def save_checkpoint(
    folder: Path, model: Any, optimizer: torch.optim.Optimizer, state: Checkpoint, hook: StepHook
) -> None:
    """Replace the folder's checkpoint."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"weight/{name}"] = parameter
        if moments := optimizer.state.get(parameter):  # none for a parameter that is not trained
            tensors[f"mean/{name}"] = moments["exp_avg"]
            tensors[f"square/{name}"] = moments["exp_avg_sq"]
    tensors |= {f"hook/{name}": tensor for name, tensor in hook.state().items()}
    metadata = {"step": state.step, "seconds": state.seconds, "curve": state.curve}
    write_safetensors(folder / CHECKPOINT, tensors, {"state": json.dumps(metadata)})


@torch.no_grad()
def load_checkpoint(folder: Path, model: Any, optimizer: torch.optim.Optimizer, hook: StepHook) -> Checkpoint | None:
    """Restore model, optimiser and hook from the folder's checkpoint; return ``None`` if there is none yet."""
    from safetensors import safe_open

    path = folder / CHECKPOINT
    if not path.exists():
        return None
    tensors = read_safetensors(path)
    with safe_open(path, framework="pt") as file:
        metadata = json.loads((file.metadata() or {}).get("state", "null"))
    if metadata is None:
        raise CorruptError(f"{path} does not say at which step it was written; delete it to begin again")
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[f"weight/{name}"])
        if f"mean/{name}" not in tensors:
            continue
        optimizer.state[parameter] = {
            "step": torch.tensor(float(metadata["step"])),
            "exp_avg": tensors[f"mean/{name}"].clone(),
            "exp_avg_sq": tensors[f"square/{name}"].clone(),
        }
    hook.load({name.removeprefix("hook/"): value for name, value in tensors.items() if name.startswith("hook/")})
    return Checkpoint(**metadata)
