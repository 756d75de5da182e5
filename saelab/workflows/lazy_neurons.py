"""Lazy neurons: a model (and, if given, an SAE of it) and a text in, activation sparsity out."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from saelab.core.artifacts import atomic_writer, check_output, prepare_output, write_json, write_manifest
from saelab.core.errors import ConfigError
from saelab.core.named import Ref
from saelab.workflows.corpus import CorpusJob

if TYPE_CHECKING:
    from saelab.analysis.lazy_neurons import LazyNeurons

KIND = "lazy-neurons"


class LazyNeuronsJob(CorpusJob):
    """What ``saelab lazy-neurons`` needs."""

    text: Ref = "stdlib:heldout"
    """Text: a file, a folder, .jsonl, .parquet, 'hf:owner/name', 'stdlib:train' or 'stdlib:heldout'."""
    sae: Ref | None = None
    """SAE folder to compare with the neurons of its block, at equal L0."""
    site: str | None = None
    """Site, if the SAE does not record it."""
    max_tokens: int = Field(default=20_000, ge=1)
    """Tokens the shares are over."""
    curve_tokens: int = Field(default=4_000, ge=1)
    """Tokens of the loss curves, which run the model many times."""
    epsilon: float = Field(default=0.01, ge=0)
    """A neuron is active when its magnitude is over this share of its layer's root mean square."""
    top_k: list[int] = Field(default_factory=list)
    """Neurons kept at the points of the curve; default: 1/64, 1/32 ... 1/2 of the width, and all."""
    rows_per_batch: int = Field(default=4, ge=1)
    """Rows of text in one forward pass."""


def run_lazy_neurons(job: LazyNeuronsJob, out: str | Path | None = None, *, force: bool = False) -> "LazyNeurons":
    """Measure ``job``; with ``out``, also write ``lazy_neurons.json`` and ``report.html`` there."""
    from saelab.analysis.lazy_neurons import lazy_neurons
    from saelab.analysis.sparsified import compare_with_sae

    sae, site = (None, None) if job.sae is None else _open_sae(job)
    if out is not None:
        check_output(out, force=force)
    model = job.load()
    if sae is not None and job.sae is not None:
        _require_same_model(job.sae, model)
    rows = job.rows(model)
    result = lazy_neurons(
        model,
        rows,
        max_tokens=job.max_tokens,
        epsilon=job.epsilon,
        top_k=job.top_k or None,
        curve_tokens=job.curve_tokens,
        rows_per_batch=job.rows_per_batch,
    )
    if sae is not None and site is not None:
        comparison, code = compare_with_sae(
            model,
            sae,
            rows,
            site,
            max_tokens=job.curve_tokens,
            epsilon=job.epsilon,
            rows_per_batch=job.rows_per_batch,
        )
        result = dataclasses.replace(result, comparison=comparison, code=code)
    if out is not None:
        _save(result, prepare_output(out, force=force))
    return result


def _open_sae(job: LazyNeuronsJob) -> tuple[Any, str]:
    from saelab.sae.folder import load_meta, load_sae

    assert job.sae is not None
    sae = load_sae(job.sae, device=job.device)
    recorded = load_meta(job.sae).get("provenance", {})
    if sae.config.architecture == "transcoder" or recorded.get("target_site"):
        raise ConfigError(f"{job.sae} reconstructs another site than it reads; give an SAE of one site")
    site = job.site or recorded.get("site")
    if site is None:
        raise ConfigError(f"{job.sae} does not record its site; give --site")
    return sae, str(site)


def _require_same_model(path: str, model: Any) -> None:
    from saelab.sae.folder import load_meta

    recorded = load_meta(path).get("provenance", {})
    fingerprint = recorded.get("model_fingerprint", model.fingerprint)
    if fingerprint != model.fingerprint:
        raise ConfigError(
            f"{path} was trained on {recorded.get('model')} ({fingerprint}), but {model.name} is "
            f"{model.fingerprint}; give that model"
        )


def _save(result: "LazyNeurons", folder: Path) -> None:
    from saelab.analysis.lazy_report import report_html

    write_json(folder / "lazy_neurons.json", result.to_dict())
    with atomic_writer(folder / "report.html") as file:
        file.write(report_html(result).encode())
    about = {"model": result.model, "source": result.source, "positive": result.positive, "above": result.above}
    write_manifest(folder, KIND, {**about, "n_tokens": result.n_tokens, "report": "report.html"})
