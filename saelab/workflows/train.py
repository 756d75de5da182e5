"""Train: an activation store (or a model that runs along) and a YAML file in, SAE folders out."""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from saelab.core.artifacts import MANIFEST, read_manifest
from saelab.core.config import Config, apply_overrides, dump_yaml, leaf_fields, parse_config
from saelab.core.errors import ConfigError, StoreError, nearest
from saelab.sparsity.training.recipe import TrainingRecipe
from saelab.training.checkpoint import CHECKPOINT
from saelab.training.config import AnySAEConfig, FitConfig, TrainingConfig
from saelab.training.end_to_end import EndToEndConfig
from saelab.training.loop import FitResult, fit
from saelab.training.run import Objective
from saelab.training.setup import PROGRESS
from saelab.training.sparse import check_sparsity
from saelab.workflows.pairs import PairsJob
from saelab.workflows.sources import LiveJob, from_start, load, open_data, site_of

__all__ = ["LiveJob", "TrainJob", "run_train"]


class TrainJob(Config):
    """One SAE, or a grid of them, trained on one pass over the data."""

    store: str | None = None
    """Activation store to train on."""
    live: LiveJob | None = None
    """Instead of a store: the model and text to take activations from while training."""
    pairs: PairsJob | None = None
    """Instead of a store: pairs of activations, for contrastive SAEs."""
    start: str | None = None
    """SAE folder to fine-tune: its weights are the start, and model, site and text are those it was trained on unless
    given here."""
    end_to_end: EndToEndConfig | None = None
    """Train with the (frozen) model in the loop, on what the reconstruction does to its predictions; needs live, or a
    start that records model and text."""
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
    sparsity: TrainingRecipe | None = None
    """How the SAE's own matrices are kept sparse while they are trained."""
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    """Keys to vary, e.g. {sae.k: [16, 32], training.lr: [1e-3]}; all combinations are trained together."""
    data_seed: int | None = Field(default=None, ge=0)
    """Seed of the order of the data; default: training.seed."""
    loggers: list[Literal["tensorboard", "wandb"]] = Field(default_factory=list)
    """Where metrics go beside training.jsonl and the terminal."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        """Take from the start what is not given, and d_in from the data, so that a config serves any store."""
        if isinstance(data, Mapping) and isinstance(data.get("start"), str):
            data = from_start(data, data["start"])
        if isinstance(data, Mapping) and set(data) <= set(cls.model_fields):  # a misspelt key is reported as one
            _check_source(data)
        if not isinstance(data, Mapping) or not isinstance(data.get("sae"), Mapping) or "d_in" in data["sae"]:
            return data
        width = _width(data)
        return data if width is None else {**data, "sae": {**data["sae"], **width}}

    @model_validator(mode="after")
    def _model_runs(self) -> Self:
        if self.end_to_end is not None and self.live is None:
            raise ValueError("end_to_end training runs the model, so it needs live (a model and a text), not a store")
        return self

    def runs(self) -> list[FitConfig]:
        """Return the run, or the runs of the grid."""
        base: dict[str, Any] = {"name": self.name, "sae": self.sae.model_dump(), "training": self.training.model_dump()}
        base |= {"start": self.start, "sparsity": None if self.sparsity is None else self.sparsity.model_dump()}
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
    objective: Objective | None = None,
) -> list[FitResult]:
    """Train ``job`` into the folder ``out``: an SAE folder per run below it, and the resolved ``config.yaml``.

    ``objective`` takes the place of the job's own losses.
    """
    from saelab.core.artifacts import atomic_writer, prepare_output
    from saelab.training.loggers import open_loggers

    runs = job.runs()
    data = open_data(job, runs)
    batches = data.batches
    for run in runs:
        if run.sae.d_in != batches.d_in:
            raise StoreError(
                f"sae.d_in is {run.sae.d_in}, but {job.site or 'the site'} in {job.store or 'the model'} is "
                f"{batches.d_in} wide; leave sae.d_in out, it is taken from the data"
            )
    for run in runs:
        check_sparsity(run)
    folder = prepare_output(out, force=force, resume=resume)
    if resume and not any((folder / name).exists() for name in (CHECKPOINT, PROGRESS, MANIFEST)):
        say(f"nothing to resume in {out}; starting")
        resume = False
    with atomic_writer(folder / "config.yaml") as file:
        file.write(dump_yaml(job).encode())
    steps = runs[0].training.steps
    say(f"{len(runs)} SAE{'s' if len(runs) > 1 else ''}, {steps:,} steps of {runs[0].training.batch_size:,} tokens")
    loggers = open_loggers(job.loggers, folder)
    return fit(
        runs,
        batches,
        folder,
        resume=resume,
        loggers=loggers,
        provenance=data.provenance,
        objective=objective or data.objective,
    )


def _check_source(data: Mapping[str, Any]) -> None:
    """Refuse a raw config with no source of activations, or several: without one its width cannot be known either."""
    given = [name for name in ("store", "live", "pairs") if data.get(name) is not None]
    if len(given) == 1:
        return
    if not given and data.get("end_to_end") is not None:
        raise ValueError(
            "nothing given to train on; end-to-end training runs the model: give start (an SAE, whose model and text "
            "it uses: --start runs/topk/sae) or live (a model and a text: --live.model embedded)"
        )
    raise ValueError(
        f"{' and '.join(given) or 'nothing'} given to train on; give exactly one of store (a folder that saelab "
        "harvest wrote), live (a model and a text: --live.model embedded) and pairs"
    )


def _width(data: Mapping[str, Any]) -> dict[str, int] | None:
    """``d_in`` (and ``d_target`` when another site is reconstructed) of what the raw config names; None if nothing."""
    site, store, target = data.get("site"), data.get("store"), data.get("target_site")
    if "d_target" in data["sae"] or "d_target" not in _fields(data["sae"].get("architecture")):
        target = None
    if store is not None:
        widths = {name: about["width"] for name, about in read_manifest(store, "activation-store")["sites"].items()}
        found = {"d_in": widths[site_of(list(widths), site, store)]}
        return found if target is None else found | {"d_target": widths[site_of(list(widths), target, store)]}
    if isinstance(data.get("live"), Mapping) and site is not None:
        model = load(parse_config(LiveJob, data["live"], "live"))
        found = {"d_in": model.width(site)}
        return found if target is None else found | {"d_target": model.width(target)}
    if isinstance(data.get("pairs"), Mapping) and site is not None:
        pairs = parse_config(PairsJob, data["pairs"], "pairs")
        return {"d_in": pairs.width(load(pairs).width(site))}
    return None


def _fields(architecture: object) -> set[str]:
    """Return the config keys of an architecture; none of an unknown one, which is reported when it is parsed."""
    from saelab.sae.registry import ARCHITECTURES

    return set(ARCHITECTURES[str(architecture)].config.model_fields) if architecture in ARCHITECTURES else set()
