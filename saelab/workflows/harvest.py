"""Harvest: a model and a text in, an activation store out."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from saelab.activations.harvest import PROGRESS, HarvestConfig, harvest
from saelab.core.artifacts import MANIFEST, human_bytes, read_json
from saelab.workflows.corpus import CorpusJob

if TYPE_CHECKING:
    from saelab.activations.store import ActivationStore
    from saelab.models.subject import SubjectModel


class HarvestJob(CorpusJob):
    """A model, a text, and the sites to read."""

    sites: list[str] = Field(min_length=1)
    """Sites by TransformerLens name; repeat the option for several in one pass."""
    harvest: HarvestConfig = Field(default_factory=HarvestConfig)
    """How the store is written."""
    sparse: Literal["off", "auto"] = "off"
    """"auto": run a sparsified model on sparse kernels wherever that is measured to be faster, and say where."""


def run_harvest(
    job: HarvestJob,
    out: str | Path,
    *,
    force: bool = False,
    resume: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> "ActivationStore":
    """Harvest ``job`` into the folder ``out``; the store's ``report`` says what was done.

    ``say`` receives one line with the disk use before anything is written.
    """
    model = job.load()
    config = job.harvest
    if job.sparse == "auto":
        config = config.model_copy(update={"execution": _accelerate(job, model, Path(out), resume, say)})
    where = f"{job.model} at {', '.join(job.sites)} on {job.text}"
    store = harvest(
        model,
        job.rows(model),
        job.sites,
        out,
        config,
        force=force,
        resume=resume,
        on_estimate=lambda needed: say(f"{where}: at most {human_bytes(needed)} in {out}"),
    )
    assert store.report is not None, "harvest reports"
    say(f"{store.n_rows:,} rows, {human_bytes(store.report.bytes)}, {store.report.seconds:.1f} s")
    return store


def _accelerate(
    job: HarvestJob, model: "SubjectModel", out: Path, resume: bool, say: Callable[[str], None]
) -> tuple[str, ...]:
    """Make the model faster, or repeat what the interrupted harvest decided; return the decisions."""
    from saelab.sparsity.runtime import accelerate, apply, decisions

    if resume:
        for file in (out / PROGRESS, out / MANIFEST):
            if file.is_file():
                done = tuple(read_json(file).get("config", {}).get("execution", ()))
                apply(model, done)
                say(f"sparse: {len(done)} layers as in the interrupted harvest")
                return done
    tokens = next(iter(job.rows(model).batches(job.harvest.rows_per_batch))).tokens
    choices = accelerate(model, tokens)
    for choice in choices:
        timed = "" if choice.ratio != choice.ratio else f", {choice.ratio:.2f} of the dense time"
        say(f"sparse: {choice.layer} {choice.run} ({choice.zeros:.0%} zero{timed})")
    if not choices:
        say("sparse: no layer has enough zeros; the model runs dense")
    return tuple(decisions(choices))
