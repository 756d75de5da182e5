"""Build: an SAE folder and a text in, a feature store out."""

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from saelab.workflows.evaluate import SaeCorpusJob, open_job

if TYPE_CHECKING:
    from saelab.features.store import FeatureStore


class BuildJob(SaeCorpusJob):
    """What ``saelab build`` needs."""

    max_tokens: int = Field(default=500_000, ge=1)
    """Tokens to read."""
    memory_mb: int = Field(default=512, ge=16)
    """Bound on the memory of the transposition."""


def run_build(job: BuildJob, out: str | Path, *, force: bool = False) -> "FeatureStore":
    """Build the feature store of ``job`` in the folder ``out``."""
    from saelab.features.build import build_features
    from saelab.sae.folder import load_meta

    model, sae, rows, site = open_job(job)
    return build_features(
        model,
        sae,
        rows,
        site,
        out,
        max_tokens=job.max_tokens,
        rows_per_batch=job.rows_per_batch,
        memory_bytes=job.memory_mb << 20,
        force=force,
        target_site=load_meta(job.sae).get("provenance", {}).get("target_site"),
    )
