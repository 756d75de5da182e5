"""Before the first step: are the runs fit for one pass, is the folder free, and what state do they begin in."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch

from saelab.core.artifacts import MANIFEST, write_json
from saelab.core.batch import BatchSource
from saelab.core.errors import ActivationError, ConfigError, OutputExistsError, ResumeError
from saelab.sae import build_sae
from saelab.training.checkpoint import CHECKPOINT, Checkpoint, read_checkpoint
from saelab.training.config import FitConfig
from saelab.training.feed import next_batch, open_batches, rows_to_check
from saelab.training.initialise import initial_sae
from saelab.training.run import Objective, Run, training_pass

PROGRESS = "progress.json"


def check_runs(runs: Sequence[FitConfig], batches: BatchSource) -> None:
    """Raise when runs cannot share one pass over these batches."""
    if not runs:
        raise ConfigError("no SAE to train: the list of runs is empty")
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ConfigError(f"runs must have different names, got {', '.join(names)}")
    for key in ("batch_size", "device"):
        found = {getattr(run.training, key) for run in runs}
        if len(found) > 1:
            raise ConfigError(
                f"SAEs trained on one pass share training.{key}, got {', '.join(map(str, sorted(found)))}"
            )
    for run in runs:
        if run.sae.d_in != batches.d_in:
            raise ActivationError(
                f"run '{run.name}' has sae.d_in = {run.sae.d_in}, but the activations are {batches.d_in} wide"
            )


def prepare(runs: Sequence[FitConfig], out: Path, resume: bool) -> Checkpoint | None:
    """Return the checkpoint to go on from, if any; otherwise make sure that nothing would be overwritten."""
    if resume:
        if (out / CHECKPOINT).is_file():
            return read_checkpoint(out, runs)
        if (out / MANIFEST).is_file() and all((out / run.name / MANIFEST).is_file() for run in runs):
            raise ResumeError(f"the training in {out} is finished; there is nothing to resume")
        if not (out / PROGRESS).is_file():
            raise ResumeError(f"{out} holds no interrupted training; start it without --resume")
    else:
        for path in (out / CHECKPOINT, out / PROGRESS, *(out / run.name for run in runs)):
            if path.exists():
                raise OutputExistsError(
                    f"{out} already holds a training ({path.name}); --resume goes on with it, --force replaces it"
                )
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / PROGRESS, {"job": "train", "runs": [run.name for run in runs]})
    return None


def fresh_runs(
    runs: Sequence[FitConfig], batches: BatchSource, device: torch.device, objective: Objective = training_pass
) -> list[Run]:
    """Look at the first batches for scale and b_dec, return to the beginning, and make the runs."""
    rows = runs[0].training.batch_size
    check = rows_to_check(batches, rows)
    # An SAE that starts from another one's weights needs no look.
    counts = [0 if run.start is not None else -(-run.training.init_tokens // rows) for run in runs]
    begin = batches.state_dict()
    with closing(open_batches(batches)) as source:
        taken = (next_batch(source, step, check) for step in range(max(counts)))
        first = [(b.x, b.x if b.target is None else b.target) for b in taken]  # not what else a batch may carry
    batches.load_state_dict(begin)
    made = []
    for run, count in zip(runs, counts, strict=True):
        x, target = (torch.cat([pair[side] for pair in first[:count]] or [torch.empty(0, 0)]) for side in (0, 1))
        made.append(Run(run, initial_sae(run, x, target), device, objective))
    return made


def saved_runs(
    runs: Sequence[FitConfig], checkpoint: Checkpoint, device: torch.device, objective: Objective = training_pass
) -> list[Run]:
    """Make the runs as a checkpoint left them."""
    made = []
    for index, (config, values) in enumerate(zip(runs, checkpoint.values, strict=True)):
        sae = build_sae(config.sae.model_copy(update={"input_scale": values["input_scale"]}), seed=None)
        run = Run(config, sae, device, objective)
        run.load(checkpoint.run_tensors(index), values)
        made.append(run)
    return made


def find_device(name: str) -> torch.device:
    """Return the device a config names."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"training.device: unknown device '{name}', expected auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"training.device is '{name}', but torch sees no GPU here; use cpu")
    return device
