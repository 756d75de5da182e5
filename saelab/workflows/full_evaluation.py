"""``saelab eval --full``: an SAE folder and text in, SAEBench's offline evaluations out."""

from pathlib import Path
from typing import TYPE_CHECKING

from saelab.core.artifacts import check_output
from saelab.core.errors import ConfigError
from saelab.workflows.evaluate import EvaluateJob, open_job

if TYPE_CHECKING:
    from saelab.analysis.saebench import FullEvaluation


def run_full_evaluation(
    job: EvaluateJob,
    out: str | Path | None = None,
    *,
    force: bool = False,
    evals: str | None = None,
    labels: str | None = None,
    seed: int = 0,
) -> "FullEvaluation":
    """Run the evaluations named in ``evals`` (comma-separated; None: all) on the SAE of ``job``.

    ``labels`` is a JSONL of ``{"text", "label"}`` to probe as well. With ``out``, a folder of one JSON file per
    evaluation is written.
    """
    from saelab.analysis.saebench import EVALS, BenchSettings, full_evaluate, save_full_evaluation
    from saelab.sae.folder import load_meta

    if out is not None:
        check_output(out, force=force)
    model, sae, rows, site = open_job(job)
    if sae.config.d_out != sae.config.d_in or load_meta(job.sae).get("provenance", {}).get("target_site"):
        raise ConfigError(
            f"{job.sae} reconstructs another site than it reads; SAEBench's evaluations are of SAEs, "
            "leave --full out for its reconstruction"
        )
    names = EVALS if evals is None else tuple(name.strip() for name in evals.split(",") if name.strip())
    settings = BenchSettings(
        max_tokens=job.max_tokens,
        sample_tokens=min(job.max_tokens, BenchSettings.sample_tokens),
        label_tokens=4 * job.max_tokens,
        rows_per_batch=job.rows_per_batch,
        seed=seed,
    )
    result = full_evaluate(
        model,
        sae,
        rows,
        site,
        rows.source,
        evals=names,
        labels=labels,
        settings=settings,
        about={"id": Path(job.sae).name, "release": str(Path(job.sae).parent), "text": rows.source.name},
    )
    if out is not None:
        save_full_evaluation(result, out, force=force)
    return result
