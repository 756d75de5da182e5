"""Evaluate: an SAE folder and held-out text in, an evaluation out."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from saelab.core.artifacts import check_output
from saelab.core.config import Config
from saelab.core.errors import ConfigError
from saelab.core.named import Ref
from saelab.models.tokens import TokensConfig
from saelab.workflows.corpus import CorpusJob

if TYPE_CHECKING:
    from saelab.analysis.evaluation import Evaluation

DEFAULT_TEXT = {"stdlib:train": "stdlib:heldout"}


class SaeCorpusJob(Config):
    """An SAE and the text to run it on; model, site and tokenisation default to those it was trained with."""

    sae: Ref
    """SAE folder."""
    model: Ref | None = None
    """Subject model, if not the one recorded in the SAE."""
    device: str = "cpu"
    """Torch device of model and SAE."""
    site: str | None = None
    """Site, if not the one recorded in the SAE."""
    text: Ref | None = None
    """Text source; an SAE trained on 'stdlib:train' defaults to 'stdlib:heldout'."""
    column: str = "text"
    """Column that holds the text."""
    tokens: TokensConfig | None = None
    """How the text becomes rows of tokens, if not as in training."""
    max_tokens: int = Field(default=100_000, ge=1)
    """Tokens to read."""
    rows_per_batch: int = Field(default=16, ge=1)
    """Rows of text in one forward pass."""
    other_model: bool = False
    """Allow a model other than the one the SAE was trained on (a fine-tuned version of it, say)."""


class EvaluateJob(SaeCorpusJob):
    """What ``saelab eval`` needs."""

    target_site: str | None = None
    """Site that a transcoder reconstructs, if not the one recorded in it."""


def run_evaluate(job: EvaluateJob, out: str | Path | None = None, *, force: bool = False) -> "Evaluation":
    """Evaluate the SAE of ``job``; with ``out``, also write it there."""
    from saelab.analysis.evaluate import evaluate, save_evaluation
    from saelab.sae.folder import load_meta
    from saelab.training.config import TrainingConfig

    if out is not None:
        check_output(out, force=force)
    model, sae, rows, site = open_job(job)
    meta = load_meta(job.sae)
    evaluation = evaluate(
        model,
        sae,
        rows,
        site,
        max_tokens=job.max_tokens,
        rows_per_batch=job.rows_per_batch,
        target_site=_target_site(job, meta, sae),
        trained_batch=meta.get("training", {}).get("batch_size") or TrainingConfig().batch_size,
    )
    recorded = meta.get("provenance", {}).get("text_fingerprint")
    if recorded is not None and recorded == evaluation.source_fingerprint:
        evaluation = replace(evaluation, training_text=True)
    if out is not None:
        save_evaluation(evaluation, out, force=force)
    return evaluation


def _target_site(job: EvaluateJob, meta: Mapping[str, Any], sae: Any) -> str | None:
    """Site that the SAE reconstructs; None: the one it reads."""
    target = job.target_site or meta.get("provenance", {}).get("target_site")
    if sae.config.architecture == "transcoder" and target is None:
        raise ConfigError(f"{job.sae} is a transcoder and does not record the site it reconstructs; give --target_site")
    return None if target is None else str(target)


def open_job(job: SaeCorpusJob) -> tuple[Any, Any, Any, str]:
    """Load what a :class:`SaeCorpusJob` names: model, SAE, rows of text, site."""
    from saelab.sae.folder import load_meta, load_sae

    sae = load_sae(job.sae, device=job.device)
    recorded = load_meta(job.sae).get("provenance", {})
    model_name = job.model or recorded.get("model")
    site = job.site or recorded.get("site")
    text = job.text or DEFAULT_TEXT.get(recorded.get("text", ""), recorded.get("text"))
    for key, value in (("model", model_name), ("site", site), ("text", text)):
        if value is None:
            raise ConfigError(f"{job.sae} does not record its {key}; give --{key}")
    corpus = CorpusJob(
        model=model_name,
        revision=recorded.get("revision"),
        dtype=recorded.get("dtype", "float32"),
        device=job.device,
        text=text,
        column=job.column,
        tokens=job.tokens or TokensConfig(**recorded.get("tokens", {})),
    )
    model = corpus.load()
    if recorded.get("model_fingerprint", model.fingerprint) != model.fingerprint and not job.other_model:
        raise ConfigError(
            f"{job.sae} was trained on {recorded['model']} with fingerprint {recorded['model_fingerprint']}, but "
            f"{model_name} has {model.fingerprint}; give that --model, or --other_model true if you mean it"
        )
    if recorded.get("pairs", {}).get("with_context"):
        raise ConfigError(
            f"{job.sae} reads activations of pairs, each behind its context, not those of a text; saelab contrast "
            "measures it (an SAE trained with --pairs.with_context false can be read on texts too)"
        )
    if model.width(str(site)) != sae.d_in:
        raise ConfigError(
            f"{job.sae} takes activations of width {sae.d_in}, but {model_name} has width {model.width(str(site))} "
            f"at {site}; give the --model and --site it was trained on"
        )
    return model, sae, corpus.rows(model), str(site)
