"""Harvest: a model and a text in, an activation store out."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field

from saelab.activations.harvest import HarvestConfig, harvest
from saelab.core.artifacts import human_bytes
from saelab.workflows.corpus import CorpusJob


class HarvestJob(CorpusJob):
    """A model, a text, and the sites to read."""

    sites: list[str] = Field(min_length=1)
    """Sites by TransformerLens name; repeat the option for several in one pass."""
    harvest: HarvestConfig = Field(default_factory=HarvestConfig)
    """How the store is written."""


def run_harvest(
    job: HarvestJob,
    out: str | Path,
    *,
    force: bool = False,
    resume: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Harvest ``job`` into the folder ``out``; return rows, bytes, seconds and tokens per second.

    ``say`` receives one line with the disk use before anything is written.
    """
    model = job.load()
    where = f"{job.model} at {', '.join(job.sites)} on {job.text}"
    started = time.perf_counter()
    store = harvest(
        model,
        job.rows(model),
        job.sites,
        out,
        job.harvest,
        force=force,
        resume=resume,
        on_estimate=lambda needed: say(f"{where}: at most {human_bytes(needed)} in {out}"),
    )
    seconds = time.perf_counter() - started
    size = sum(f.stat().st_size for f in Path(out).rglob("*") if f.is_file())
    say(f"{store.n_rows:,} rows, {human_bytes(size)}, {seconds:.1f} s")
    return {
        "store": str(out),
        "n_rows": store.n_rows,
        "bytes": size,
        "seconds": seconds,
        "tokens_per_second": store.n_rows / seconds,
    }
