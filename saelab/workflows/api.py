"""The public functions, from a model to features: what ``import saelab`` offers, and what the commands call.

See :mod:`saelab.workflows.call` for the convention they share.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

from saelab.activations.store import ActivationStore
from saelab.analysis.evaluation import Evaluation
from saelab.analysis.saebench.result import FullEvaluation
from saelab.features.store import FeatureStore
from saelab.models.subject import SubjectModel
from saelab.models.text import TextSource
from saelab.sae.base import SAE
from saelab.training.loop import FitResult
from saelab.training.run import Objective
from saelab.workflows.build import BuildJob, run_build
from saelab.workflows.call import described_by, job_of, model_keys
from saelab.workflows.evaluate import EvaluateJob, run_evaluate
from saelab.workflows.harvest import HarvestJob, run_harvest
from saelab.workflows.train import TrainJob, run_train
from saelab.workflows.trained import Training

Say = Callable[[str], None]
Model = SubjectModel | str | Path
Text = TextSource | str | Path | Sequence[str]
Sae = SAE | FitResult | Training | str | Path
Store = ActivationStore | str | Path


def silent(text: str) -> None:
    """Say nothing."""


@described_by(HarvestJob)
def harvest(
    model: Model | HarvestJob = "embedded",
    sites: str | Sequence[str] | None = None,
    *,
    out: str | Path,
    text: Text | None = None,
    max_tokens: int | None = None,
    force: bool = False,
    resume: bool = False,
    say: Say = silent,
    **keys: Any,
) -> ActivationStore:
    """Write the activations of a model at some sites on a text to an activation store in the folder ``out``.

        store = saelab.harvest("embedded", "blocks.2.hook_resid_post", max_tokens=200_000, out="runs/store")

    ``resume`` goes on with an interrupted harvest and opens a finished one; ``force`` replaces what is in ``out``.
    ``say`` is told what happens, a line at a time. Raises ``SiteError``, ``TextError``, ``ModelError``,
    ``ActivationError``, ``OutputExistsError``, ``OutputError``, ``ResumeError``.
    """
    if isinstance(model, HarvestJob):
        return run_harvest(job_of(HarvestJob, "harvest", model, **keys), out, force=force, resume=resume, say=say)
    names = [sites] if isinstance(sites, str) else sites
    given = {"model": model, "sites": names, "text": text, "harvest.max_tokens": max_tokens}
    job = job_of(HarvestJob, "harvest", **given, **model_keys(model, keys), **keys)
    return run_harvest(job, out, force=force, resume=resume, say=say)


@described_by(TrainJob)
def train(
    config: TrainJob | Mapping[str, Any] | str | Path | None = None,
    *,
    out: str | Path,
    store: Store | None = None,
    site: str | None = None,
    objective: Objective | None = None,
    force: bool = False,
    resume: bool = False,
    say: Say = silent,
    **keys: Any,
) -> Training:
    """Train an SAE, or a grid of them on one pass over the data, into the folder ``out``.

        trained = saelab.train("configs/demo-topk.yaml", store=store, out="runs/sae", sae={"d_sae": 1024, "k": 16})
        sae = trained.load()

    ``config`` is a YAML file (your own, or one of saelab's by name) that the keys override. Instead of ``store``, the
    key ``live`` (a model and a text) trains without anything on disk. ``objective`` gives the losses of a step, a
    function of (SAE, raw batch, :class:`saelab.sae.step.StepContext`), instead of the SAE's own.
    """
    job = job_of(TrainJob, "train", config, store=store, site=site, **keys)
    results = run_train(job, out, force=force, resume=resume, say=say, objective=objective)
    return Training(Path(out), tuple(results))


@overload
def evaluate(
    sae: Sae | EvaluateJob,
    *,
    full: Literal[False] = False,
    model: Model | None = None,
    site: str | None = None,
    text: Text | None = None,
    max_tokens: int | None = None,
    out: str | Path | None = None,
    force: bool = False,
    **keys: Any,
) -> Evaluation: ...
@overload
def evaluate(
    sae: Sae | EvaluateJob,
    *,
    full: Literal[True],
    model: Model | None = None,
    site: str | None = None,
    text: Text | None = None,
    max_tokens: int | None = None,
    out: str | Path | None = None,
    force: bool = False,
    **keys: Any,
) -> FullEvaluation: ...


@described_by(EvaluateJob)
def evaluate(
    sae: Sae | EvaluateJob,
    *,
    full: bool = False,
    model: Model | None = None,
    site: str | None = None,
    text: Text | None = None,
    max_tokens: int | None = None,
    out: str | Path | None = None,
    force: bool = False,
    **keys: Any,
) -> Evaluation | FullEvaluation:
    """Measure an SAE on text it was not trained on: reconstruction, sparsity, and what it costs the model.

        saelab.evaluate("runs/sae/sae", max_tokens=20_000)

    Model, site and text default to what the SAE was trained on (the held-out part of the standard library). An SAE made
    in memory needs ``model``, ``site`` and ``text``. ``full=True`` runs SAEBench's offline evaluations beside their
    controls, with the further keys ``evals`` (names, comma-separated), ``labels`` (a JSONL file) and ``seed``. With
    ``out``, the result is also written there.
    """
    extra = {name: keys.pop(name) for name in ("evals", "labels", "seed") if full and name in keys}
    given = {"model": model, "site": site, "text": text, "max_tokens": max_tokens, **_device(model, keys), **keys}
    job = job_of(EvaluateJob, "evaluate", sae if isinstance(sae, EvaluateJob) else {"sae": sae}, **given)
    if full:
        from saelab.workflows.full_evaluation import run_full_evaluation

        return run_full_evaluation(job, out, force=force, **extra)
    return run_evaluate(job, out, force=force)


@described_by(BuildJob)
def build_features(
    sae: Sae | BuildJob,
    *,
    out: str | Path,
    model: Model | None = None,
    site: str | None = None,
    text: Text | None = None,
    max_tokens: int | None = None,
    force: bool = False,
    **keys: Any,
) -> FeatureStore:
    """Run a text through model and SAE and keep every activation of every feature, in the folder ``out``.

        features = saelab.build_features("runs/sae/sae", max_tokens=100_000, out="runs/features")

    Model, site and text default as in :func:`evaluate`.
    """
    given = {"model": model, "site": site, "text": text, "max_tokens": max_tokens, **_device(model, keys), **keys}
    return run_build(
        job_of(BuildJob, "build_features", sae if isinstance(sae, BuildJob) else {"sae": sae}, **given),
        out,
        force=force,
    )


def _device(model: Any, keys: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in model_keys(model, keys).items() if name == "device"}
