"""The demo: harvest, train, evaluate and build on the embedded model, then three features to look at."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from saelab.core.artifacts import prepare_output, write_manifest
from saelab.core.assets import asset
from saelab.core.config import Config, apply_overrides, load_yaml, parse_config

if TYPE_CHECKING:
    from saelab.analysis.evaluation import Evaluation
    from saelab.features.store import FeatureStore
    from saelab.workflows.explain import ExplainResult


class DemoJob(Config):
    """Sizes of the demo; the SAE itself is configs/demo-topk.yaml."""

    site: str = "blocks.2.hook_resid_post"
    """Site of the embedded model (4 layers, so this is a middle one)."""
    harvest_tokens: int = Field(default=600_000, ge=1000)
    """Tokens in the activation store."""
    train_tokens: int | None = Field(default=None, ge=1000)
    """Tokens to train on, passes over the store counted; default as in configs/demo-topk.yaml."""
    eval_tokens: int = Field(default=30_000, ge=1000)
    """Held-out tokens of the evaluation."""
    build_tokens: int = Field(default=150_000, ge=1000)
    """Held-out tokens in the feature store."""
    seed: int = Field(default=0, ge=0)
    """Seed of the SAE's initialisation and of the order of the data."""


@dataclass(frozen=True)
class DemoResult:
    """What the demo made and measured."""

    evaluation: "Evaluation"
    """Held-out numbers."""
    features: "FeatureStore"
    """The feature store."""
    config: dict[str, Any]
    """Resolved training configuration."""
    seconds: dict[str, float]
    """Wall-clock seconds of each stage."""
    tokens: dict[str, int]
    """Tokens each stage went through."""
    paths: dict[str, str]
    """Where everything is."""
    explained: "ExplainResult | None" = None
    """Explanations and their scores beside controls (``full`` only)."""

    def to_dict(self) -> dict[str, Any]:
        """The one JSON object of ``saelab demo --json``."""
        e = self.evaluation
        return {
            "fvu": e.fvu,
            "l0": e.l0,
            "ce_clean": e.ce_clean,
            "ce_sae": e.ce_sae,
            "ce_zero": e.ce_zero,
            "ce_mean": e.ce_mean,
            "ce_recovered": e.ce_recovered,
            "dead_fraction": e.dead_fraction,
            "d_in": e.d_in,
            "d_sae": e.d_sae,
            "k": self.config["sae"]["k"],
            "tokens_train": self.tokens["train"],
            "tokens_eval": e.n_tokens,
            "seconds": self.seconds,
            "tokens_per_second": {stage: self.tokens[stage] / self.seconds[stage] for stage in self.seconds},
            "paths": self.paths,
            **({"explained": self.explained.to_dict()} if self.explained is not None else {}),
        }


def run_demo(
    job: DemoJob,
    out: str | Path,
    *,
    full: bool = False,
    force: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> DemoResult:
    """Run the four stages into the folder ``out``; ``say`` receives a line per stage.

    ``full`` adds a fifth: explain and score every live feature, without a language model.
    """
    from saelab.features.store import open_features
    from saelab.workflows.build import BuildJob, run_build
    from saelab.workflows.evaluate import EvaluateJob, run_evaluate
    from saelab.workflows.harvest import HarvestJob, run_harvest
    from saelab.workflows.train import TrainJob, run_train

    out = prepare_output(out, force=force)
    write_manifest(out, "run", {"job": "demo", "config": job.model_dump(mode="json")})
    paths = {name: str(out / name) for name in ("store", "features")}
    seconds: dict[str, float] = {}

    started = time.perf_counter()
    harvest_job = parse_config(
        HarvestJob, {"model": "embedded", "sites": [job.site], "harvest": {"max_tokens": job.harvest_tokens}}, "demo"
    )
    harvested = run_harvest(harvest_job, paths["store"], say=say)
    seconds["harvest"] = time.perf_counter() - started

    started = time.perf_counter()
    overrides: dict[str, Any] = {"store": paths["store"], "site": job.site, "training.seed": job.seed}
    if job.train_tokens is not None:
        overrides["training.tokens"] = job.train_tokens
    config = apply_overrides(load_yaml(asset("configs", "demo-topk.yaml")), overrides)
    (fitted,) = run_train(parse_config(TrainJob, config, "configs/demo-topk.yaml"), out / "train", say=say)
    seconds["train"] = time.perf_counter() - started

    started = time.perf_counter()
    sae = str(fitted.path)
    evaluation = run_evaluate(EvaluateJob(sae=sae, max_tokens=job.eval_tokens), out / "evaluation")
    seconds["eval"] = time.perf_counter() - started

    started = time.perf_counter()
    run_build(BuildJob(sae=sae, max_tokens=job.build_tokens), paths["features"])
    seconds["build"] = time.perf_counter() - started
    features = open_features(paths["features"])
    explained = None
    if full:
        from saelab.workflows.explain import ExplainJob, run_explain

        started = time.perf_counter()
        explained = run_explain(ExplainJob(store=paths["features"], sae=sae), say=say)
        seconds["explain"] = time.perf_counter() - started
    return DemoResult(
        evaluation=evaluation,
        features=features,
        config=fitted.config,
        seconds=seconds,
        tokens={
            "harvest": harvested.n_rows,
            "train": fitted.tokens,
            "eval": evaluation.n_tokens,
            "build": features.n_tokens,
            **({"explain": features.n_tokens} if explained is not None else {}),
        },
        paths={"model": str(asset("data", "pylm")), "store": paths["store"], "sae": sae, "features": paths["features"]},
        explained=explained,
    )
