"""Core neurons: a model and a text in, loss, speed and stability of running on a text's own neurons out."""

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from saelab.core.artifacts import check_output, prepare_output, write_json, write_manifest
from saelab.workflows.corpus import CorpusJob

if TYPE_CHECKING:
    from saelab.analysis.core_neurons import CoreNeurons

KIND = "core-neurons"


class CoreNeuronsJob(CorpusJob):
    """What ``saelab core-neurons`` needs."""

    text: str = "stdlib:heldout"
    """Text: a file, a folder, .jsonl, .parquet, 'hf:owner/name', 'stdlib:train' or 'stdlib:heldout'."""
    alphas: list[float] = Field(default=[0.05, 0.2], min_length=1)
    """Shares of the neurons that count as a token's own."""
    betas: list[float] = Field(default=[0.25, 0.4, 0.6, 0.8], min_length=1)
    """Shares of the neurons that run."""
    prefix: int = Field(default=64, ge=1)
    """Tokens at the start of each row that run whole and choose the neurons."""
    first_layer: int = Field(default=1, ge=0)
    """Blocks before this one run whole."""
    max_tokens: int = Field(default=8_000, ge=1)
    """Tokens to measure on."""
    rows_per_batch: int = Field(default=16, ge=1)
    """Rows of text in one forward pass."""
    rounds: int = Field(default=3, ge=1)
    """How often each speed is measured."""
    seed: int = 0
    """Seed of the random controls."""


def run_core_neurons(job: CoreNeuronsJob, out: str | Path | None = None, *, force: bool = False) -> "CoreNeurons":
    """Measure ``job``; with ``out``, also write ``core_neurons.json`` there."""
    from saelab.analysis.core_neurons import core_study

    if out is not None:
        check_output(out, force=force)
    model = job.load()
    keys = ("alphas", "betas", "prefix", "first_layer", "max_tokens", "rows_per_batch", "rounds", "seed")
    result = core_study(model, job.rows(model), **{key: getattr(job, key) for key in keys})
    if out is not None:
        folder = prepare_output(out, force=force)
        write_json(folder / "core_neurons.json", result.to_dict())
        about = {"model": result.model, "source": result.source, "predictions": result.predictions}
        write_manifest(folder, KIND, {**about, "loss_whole": result.loss_whole, "prefix": result.prefix})
    return result
