"""Train: an activation store (or a model that runs along) and a YAML file in, SAE folders out."""

import itertools
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from saelab.activations.live import LiveStream
from saelab.activations.store import open_store
from saelab.core.artifacts import MANIFEST, read_manifest
from saelab.core.config import Config, apply_overrides, dump_yaml, leaf_fields, parse_config
from saelab.core.errors import ConfigError, SiteError, StoreError, nearest
from saelab.training.checkpoint import CHECKPOINT
from saelab.training.config import AnySAEConfig, FitConfig, TrainingConfig
from saelab.training.loop import FitResult, fit
from saelab.training.setup import PROGRESS
from saelab.workflows.corpus import CorpusJob, ModelJob

if TYPE_CHECKING:
    from saelab.core.batch import BatchSource
    from saelab.models.subject import SubjectModel


class LiveJob(CorpusJob):
    """Activations straight from the model while training, nothing on disk."""

    buffer_rows: int = Field(default=1 << 17, ge=1)
    """Activations in the shuffle buffer."""
    rows_per_batch: int = Field(default=16, ge=1)
    """Rows of text in one forward pass."""


class TrainJob(Config):
    """One SAE, or a grid of them, trained on one pass over the data."""

    store: str | None = None
    """Activation store to train on."""
    live: LiveJob | None = None
    """Instead of a store: the model and text to take activations from while training."""
    model: str | None = None
    """Model that the store must come from; when given, a store written by another model is refused."""
    site: str | None = None
    """Site to train on; may be left out when the store holds one site."""
    target_site: str | None = None
    """Site to reconstruct, when it is not the same (transcoders)."""
    name: str = "sae"
    """Name of the run and its folder; runs of a grid are named after what varies."""
    sae: AnySAEConfig
    """The SAE; d_in is taken from the store or the model."""
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    """The training."""
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    """Keys to vary, e.g. {sae.k: [16, 32], training.lr: [1e-3]}; all combinations are trained together."""
    data_seed: int | None = Field(default=None, ge=0)
    """Seed of the order of the data; default: training.seed."""
    loggers: list[Literal["tensorboard", "wandb"]] = Field(default_factory=list)
    """Where metrics go beside training.jsonl and the terminal."""

    @model_validator(mode="before")
    @classmethod
    def _fill_d_in(cls, data: Any) -> Any:
        """Take d_in from the data, so that a config serves any store; what the user gave is left to be checked."""
        if not isinstance(data, Mapping) or not isinstance(data.get("sae"), Mapping) or "d_in" in data["sae"]:
            return data
        width = _width(data)
        return data if width is None else {**data, "sae": {**data["sae"], **width}}

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.store is None) == (self.live is None):
            raise ValueError(
                "give either store (an activation store) or live (a model and a text), not both or neither"
            )
        return self

    def runs(self) -> list[FitConfig]:
        """Return the run, or the runs of the grid."""
        base = {"name": self.name, "sae": self.sae.model_dump(), "training": self.training.model_dump()}
        known = {key for key, *_ in leaf_fields(FitConfig)}
        for key in self.grid:
            if key not in known:
                raise ConfigError(f"grid: unknown key '{key}'{nearest(key, known)}")
        runs = []
        for values in itertools.product(*self.grid.values()):
            chosen = dict(zip(self.grid, values, strict=True))
            name = ",".join(f"{key.split('.')[-1]}={value}" for key, value in chosen.items()).replace(",", "_")
            data = apply_overrides(base, {**chosen, "name": name or self.name})
            runs.append(parse_config(FitConfig, data, f"grid {name}" if name else "train"))
        return runs


def run_train(
    job: TrainJob,
    out: str | Path,
    *,
    force: bool = False,
    resume: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> list[FitResult]:
    """Train ``job`` into the folder ``out``: an SAE folder per run below it, and the resolved ``config.yaml``."""
    from saelab.core.artifacts import atomic_writer, prepare_output
    from saelab.training.loggers import open_loggers

    runs = job.runs()
    batches, provenance = _open_data(job, runs)
    for run in runs:
        if run.sae.d_in != batches.d_in:
            raise StoreError(
                f"sae.d_in is {run.sae.d_in}, but {job.site or 'the site'} in {job.store or 'the model'} is "
                f"{batches.d_in} wide; leave sae.d_in out, it is taken from the data"
            )
    folder = prepare_output(out, force=force, resume=resume)
    if resume and not any((folder / name).exists() for name in (CHECKPOINT, PROGRESS, MANIFEST)):
        say(f"nothing to resume in {out}; starting")
        resume = False
    with atomic_writer(folder / "config.yaml") as file:
        file.write(dump_yaml(job).encode())
    steps = runs[0].training.steps
    say(f"{len(runs)} SAE{'s' if len(runs) > 1 else ''}, {steps:,} steps of {runs[0].training.batch_size:,} tokens")
    loggers = open_loggers(job.loggers, folder)
    return fit(runs, batches, folder, resume=resume, loggers=loggers, provenance=provenance)


def _open_data(job: TrainJob, runs: list[FitConfig]) -> tuple["BatchSource", dict[str, Any]]:
    """Open the batches and say what an SAE folder should record about where they came from."""
    training = runs[0].training
    seed = training.seed if job.data_seed is None else job.data_seed
    extra: dict[str, Any] = {"target_site": job.target_site, "gradient": any(_needs_gradient(run) for run in runs)}
    if job.live is not None:
        if job.site is None:
            raise SiteError("training live needs the site; give --site (saelab sites MODEL lists them)")
        model = _load(job.live)
        rows = job.live.rows(model)
        stream = LiveStream(
            model,
            rows,
            job.site,
            training.batch_size,
            buffer_rows=job.live.buffer_rows,
            seed=seed,
            rows_per_batch=job.live.rows_per_batch,
            **extra,
        )
        text: dict[str, Any] = rows.describe()
        about: dict[str, Any] = {
            "model": job.live.model,
            "model_fingerprint": model.fingerprint,
            "revision": job.live.revision,
            "dtype": job.live.dtype,
        }
        return stream, {**about, "site": job.site, "target_site": job.target_site, **_text_record(text)}
    assert job.store is not None
    store = open_store(job.store)
    if job.model is not None:
        store.check_model(_load(ModelJob(model=job.model)))
    site = _site_of(store.sites, job.site, job.store)
    model_record = store.manifest["model"]
    about = {
        "model": model_record["name"],
        "model_fingerprint": model_record["fingerprint"],
        "dtype": model_record["dtype"],
        "store": str(Path(job.store).absolute()),
        "store_fingerprint": store.fingerprint,
        "site": site,
        "target_site": job.target_site,
    }
    source = store.stream(site, training.batch_size, seed, **extra)
    return source, {**about, **_text_record(store.manifest["text"])}


def _text_record(description: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("context", "packing", "bos", "min_tokens")
    tokens = {key: description[key] for key in keys if description.get(key) is not None}
    return {
        "text": description.get("source"),
        "text_fingerprint": description.get("source_fingerprint"),
        "tokens": tokens,
    }


def _needs_gradient(run: FitConfig) -> bool:
    from saelab.sae.registry import ARCHITECTURES

    return bool(getattr(ARCHITECTURES[run.sae.architecture].sae, "needs_gradient", False))


def _width(data: Mapping[str, Any]) -> dict[str, int] | None:
    """``d_in`` (and ``d_target`` when another site is reconstructed) of what the raw config names; None if nothing."""
    site, store, target = data.get("site"), data.get("store"), data.get("target_site")
    if "d_target" in data["sae"] or "d_target" not in _fields(data["sae"].get("architecture")):
        target = None
    if store is not None:
        widths = {name: about["width"] for name, about in read_manifest(store, "activation-store")["sites"].items()}
        found = {"d_in": widths[_site_of(list(widths), site, store)]}
        return found if target is None else found | {"d_target": widths[_site_of(list(widths), target, store)]}
    if isinstance(data.get("live"), Mapping) and site is not None:
        model = _load(parse_config(LiveJob, data["live"], "live"))
        found = {"d_in": model.width(site)}
        return found if target is None else found | {"d_target": model.width(target)}
    return None


def _fields(architecture: object) -> set[str]:
    """Return the config keys of an architecture; none of an unknown one, which is reported when it is parsed."""
    from saelab.sae.registry import ARCHITECTURES

    return set(ARCHITECTURES[str(architecture)].config.model_fields) if architecture in ARCHITECTURES else set()


def _site_of(sites: list[str], wanted: str | None, store: str) -> str:
    if wanted is None:
        if len(sites) > 1:
            raise SiteError(f"{store} holds {len(sites)} sites; give --site, one of {', '.join(sites)}")
        return sites[0]
    if wanted not in sites:
        raise SiteError(f"{store} has no site '{wanted}'{nearest(wanted, sites)} (it holds {', '.join(sites)})")
    return wanted


def _load(job: ModelJob) -> "SubjectModel":
    return _load_cached(job.model, job.dtype, job.device, job.revision)


@lru_cache(maxsize=1)
def _load_cached(model: str, dtype: str, device: str, revision: str | None) -> "SubjectModel":
    """The width check and the training use the same model; load it once."""
    from saelab.models.subject import load_model

    return load_model(model, dtype=dtype, device=device, revision=revision)
