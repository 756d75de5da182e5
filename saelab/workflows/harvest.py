"""Harvest: a model and a text in, an activation store out."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from saelab.activations.harvest import PROGRESS, HarvestConfig, harvest
from saelab.core.artifacts import MANIFEST, human_bytes, read_json
from saelab.sparsity.core_neurons import CoreConfig, core_cost, require_whole, running_core
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
    sparse: Literal["off", "auto", "core"] = "off"
    """"auto": run a sparsified model on sparse kernels wherever that is measured to be faster, and say where. "core":
    after the first tokens of a row, run its MLPs on the neurons these used most; lossy, the store says by how much."""
    core: CoreConfig = CoreConfig()
    """Which neurons "core" runs."""
    core_check_rows: int = Field(default=16, ge=1)
    """Rows of the text on which the cost of "core" is measured before the harvest."""


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
    config, lossy = job.harvest, None
    if job.sparse == "auto":
        config = config.model_copy(update={"execution": _accelerate(job, model, Path(out), resume, say)})
    with ExitStack() as running:
        if job.sparse == "core":
            lossy = _core_cost(job, model, Path(out) if resume else None, say)
            running.enter_context(running_core(model, job.core))
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
            lossy=lossy,
        )
    assert store.report is not None, "harvest reports"
    say(f"{store.n_rows:,} rows, {human_bytes(store.report.bytes)}, {store.report.seconds:.1f} s")
    return store


def _core_cost(
    job: HarvestJob, model: "SubjectModel", resumed: Path | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure on the first rows of the text what core neurons cost, or take what the interrupted harvest measured."""
    require_whole(model, job.core, job.sites)
    settings = {"how": "core neurons", **job.core.model_dump()}
    for file in () if resumed is None else (resumed / PROGRESS, resumed / MANIFEST):
        done = read_json(file).get("lossy") if file.is_file() else None
        if done is not None and settings.items() <= done.items():
            return dict(done)
    batch = next(iter(job.rows(model).batches(job.core_check_rows)))
    cost = core_cost(model, job.core, [batch])
    say(
        f"sparse: core neurons, lossy: after the first {job.core.prefix} tokens of a row the loss is "
        f"{cost.loss_sparse:.4f} instead of {cost.loss_dense:.4f} nats, KL {cost.kl:.4f}"
    )
    numbers = {"loss_dense": cost.loss_dense, "loss": cost.loss_sparse, "kl": cost.kl}
    return {**settings, **numbers, "predictions": cost.tokens}


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
    choices = accelerate(model, tokens, job.sites)
    for choice in choices:
        timed = "" if choice.ratio != choice.ratio else f", {choice.ratio:.2f} of the dense time"
        say(f"sparse: {choice.layer} {choice.run} ({choice.zeros:.0%} zero{timed})")
    if not choices:
        say("sparse: no layer has enough zeros; the model runs dense")
    return tuple(decisions(choices))
