"""Where training batches come from: an activation store, a model running along, pairs, or whole texts."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from saelab.activations.live import LiveStream
from saelab.activations.store import open_store
from saelab.core.batch import BatchSource
from saelab.core.errors import ConfigError, ModelError, SiteError, nearest
from saelab.core.named import Named
from saelab.sae.registry import ARCHITECTURES
from saelab.training.config import FitConfig
from saelab.training.run import Objective, training_pass
from saelab.workflows.corpus import CorpusJob, ModelJob

if TYPE_CHECKING:
    from saelab.models.subject import SubjectModel
    from saelab.workflows.train import TrainJob


class LiveJob(CorpusJob):
    """Activations straight from the model while training, nothing on disk."""

    buffer_rows: int = Field(default=1 << 17, ge=1)
    """Activations in the shuffle buffer."""
    rows_per_batch: int = Field(default=16, ge=1)
    """Rows of text in one forward pass."""


@dataclass(frozen=True, eq=False)
class TrainingData:
    """What a training needs."""

    batches: BatchSource
    """The batches."""
    provenance: dict[str, Any]
    """What an SAE folder records about where they came from."""
    objective: Objective = training_pass
    """Losses of a step."""


def open_data(job: "TrainJob", runs: list[FitConfig]) -> TrainingData:
    """Open the batches of a job."""
    for run in runs:
        if ARCHITECTURES[run.sae.architecture].sae.needs_pairs and job.pairs is None:
            raise ConfigError(
                f"a {run.sae.architecture} SAE is trained on pairs, not on a store or a stream of single activations; "
                "give pairs (see configs/contrastive.yaml)"
            )
    if job.store is not None:
        return _from_store(job, runs, job.store)
    if job.site is None:
        raise SiteError("training without a store needs the site; give --site (saelab sites MODEL lists them)")
    if job.pairs is not None:
        return _from_pairs(job, runs)
    return _with_model(job, runs) if job.end_to_end is not None else _live(job, runs)


def from_start(data: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Return a raw config in which what is not given is as the SAE in ``folder`` was trained."""
    from saelab.sae.folder import load_meta, load_sae

    config = load_sae(folder).config.model_dump(mode="json")
    recorded = load_meta(folder).get("provenance", {})
    result = {**data, "sae": {**config, **(data.get("sae") or {})}}
    for key in ("site", "target_site"):
        if recorded.get(key) is not None:
            result.setdefault(key, recorded[key])
    if not any(data.get(key) for key in ("store", "pairs")):
        keys = ("model", "revision", "dtype", "text", "tokens")
        known = {key: recorded[key] for key in keys if recorded.get(key)}
        given = data.get("live") or {}
        if (known or given) and isinstance(given, Mapping):
            result["live"] = {**known, **given}
    return result


def _extra(job: "TrainJob", runs: list[FitConfig]) -> dict[str, Any]:
    return {"target_site": job.target_site, "gradient": any(_needs_gradient(run) for run in runs)}


def _seed(job: "TrainJob", runs: list[FitConfig]) -> int:
    return runs[0].training.seed if job.data_seed is None else job.data_seed


def _live(job: "TrainJob", runs: list[FitConfig]) -> TrainingData:
    assert job.live is not None
    assert job.site is not None
    model = load(job.live)
    rows = job.live.rows(model)
    stream = LiveStream(
        model,
        rows,
        job.site,
        runs[0].training.batch_size,
        buffer_rows=job.live.buffer_rows,
        seed=_seed(job, runs),
        rows_per_batch=job.live.rows_per_batch,
        **_extra(job, runs),
    )
    return TrainingData(stream, {**_about(job, job.live, model), **_text_record(rows.describe())})


def _with_model(job: "TrainJob", runs: list[FitConfig]) -> TrainingData:
    from saelab.training.end_to_end import EndToEnd
    from saelab.training.texts import TextStream

    assert job.live is not None
    assert job.end_to_end is not None
    assert job.site is not None
    for run in runs:
        if _needs_gradient(run):
            raise ConfigError(f"{run.sae.architecture} SAEs cannot be trained end to end; start from another one")
    model = load(job.live)
    rows = job.live.rows(model)
    target = job.target_site or job.site
    later = _later_sites(model, target, job.end_to_end.downstream_sites) if job.end_to_end.downstream else []
    stream = TextStream(
        model,
        rows,
        job.site,
        runs[0].training.batch_size,
        target_site=job.target_site,
        later=later,
        seed=_seed(job, runs),
    )
    about = {**_about(job, job.live, model), "end_to_end": job.end_to_end.model_dump(mode="json"), "start": job.start}
    objective = EndToEnd(model, target, later, job.end_to_end)
    return TrainingData(stream, {**about, **_text_record(rows.describe())}, objective)


def _later_sites(model: "SubjectModel", target: str, wanted: list[str]) -> list[str]:
    """Sites after ``target`` whose activations should come through; the residual stream after each later block."""
    layer = model.layer(target)
    after = [f"blocks.{i}.hook_resid_post" for i in range(max(layer, 0), model.n_layers)]
    found = wanted or [site for site in after if site != target]
    for site in found:
        if model.layer(site) < layer:
            raise SiteError(f"end_to_end.downstream_sites: {site} comes before {target}; give later sites")
    return found


def _from_pairs(job: "TrainJob", runs: list[FitConfig]) -> TrainingData:
    from saelab.training.pairs import PairedBatches
    from saelab.workflows.pairs import collect_pairs, fingerprint

    assert job.pairs is not None
    assert job.site is not None
    model = load(job.pairs)
    pairs = collect_pairs(job.pairs, model, job.site, _seed(job, runs))
    batches = PairedBatches(
        pairs.positive,
        pairs.negative,
        runs[0].training.batch_size,
        context=pairs.context,
        seed=_seed(job, runs),
        fingerprint=fingerprint(pairs),
    )
    about = {**_about(job, job.pairs, model), "pairs": {**pairs.about, "with_context": pairs.context is not None}}
    if job.pairs.file is None:
        return TrainingData(batches, {**about, **_text_record(job.pairs.rows(model).describe())})
    return TrainingData(batches, {**about, "columns": job.pairs.columns.model_dump()})


def _from_store(job: "TrainJob", runs: list[FitConfig], path: str) -> TrainingData:
    store = open_store(path)
    if job.model is not None:
        store.check_model(load(ModelJob(model=job.model)))
    site = site_of(store.sites, job.site, path)
    model = store.manifest["model"]
    about = {
        "model": model["name"],
        "model_fingerprint": model["fingerprint"],
        "dtype": model["dtype"],
        "store": str(Path(path).absolute()),
        "store_fingerprint": store.fingerprint,
        "site": site,
        "target_site": job.target_site,
        **_heads(ModelJob(model=model["name"]), site, model["fingerprint"]),
    }
    source = store.stream(site, runs[0].training.batch_size, _seed(job, runs), **_extra(job, runs))
    return TrainingData(source, {**about, **_text_record(store.manifest["text"])})


def _about(job: "TrainJob", model_job: ModelJob, model: "SubjectModel") -> dict[str, Any]:
    assert job.site is not None
    return {
        "model": model_job.model,
        "model_fingerprint": model.fingerprint,
        "revision": model_job.revision,
        "dtype": model_job.dtype,
        "site": job.site,
        "target_site": job.target_site,
        **_heads(model_job, job.site),
    }


def _heads(model_job: ModelJob, site: str, expected: str | None = None) -> dict[str, int]:
    """Return number and width of the heads whose outputs a ``hook_z`` site holds side by side; {} elsewhere.

    A store does not record them, so its model is loaded for that, if it is still the one with that fingerprint.
    """
    if not site.endswith("hook_z"):
        return {}
    try:
        model = load(model_job)
    except ModelError:
        return {}
    if expected not in (None, model.fingerprint):
        return {}
    slices = model.head_slices(site)
    return {"n_heads": len(slices), "d_head": slices[0].stop}


def _text_record(description: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("context", "packing", "bos", "min_tokens")
    tokens = {key: description[key] for key in keys if description.get(key) is not None}
    return {
        "text": description.get("source"),
        "text_fingerprint": description.get("source_fingerprint"),
        "tokens": tokens,
    }


def _needs_gradient(run: FitConfig) -> bool:
    return ARCHITECTURES[run.sae.architecture].sae.needs_gradient


def site_of(sites: list[str], wanted: str | None, store: str) -> str:
    """Return the site to train on, of those in a store. Raises :class:`SiteError`."""
    if wanted is None:
        if len(sites) > 1:
            raise SiteError(f"{store} holds {len(sites)} sites; give --site, one of {', '.join(sites)}")
        return sites[0]
    if wanted not in sites:
        raise SiteError(f"{store} has no site '{wanted}'{nearest(wanted, sites)} (it holds {', '.join(sites)})")
    return wanted


def load(job: ModelJob) -> "SubjectModel":
    """Load a model, once for all who ask for it in turn; one that is open already is taken as it is."""
    if isinstance(job.model, Named):
        return job.load()
    return _load_cached(job.model, job.dtype, job.device, job.revision)


@lru_cache(maxsize=1)
def _load_cached(model: str, dtype: str, device: str, revision: str | None) -> "SubjectModel":
    """The width check and the training use the same model; load it once."""
    from saelab.models.subject import load_model

    return load_model(model, dtype=dtype, device=device, revision=revision)
