"""The public functions that ask something of a model and its SAE; the commands of the same names call them.

See :mod:`saelab.workflows.call` for the convention they share.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saelab.analysis.compare.result import Comparison
from saelab.analysis.contrast import ContrastReport
from saelab.analysis.core_neurons import CoreNeurons
from saelab.analysis.dark_matter.result import DarkMatter
from saelab.analysis.lazy_neurons import LazyNeurons
from saelab.core.assets import resolve_config
from saelab.core.config import load_yaml
from saelab.features.store import FeatureStore
from saelab.models.subject import SubjectModel
from saelab.workflows.api import Model, Sae, Say, Store, Text, silent
from saelab.workflows.call import described_by, job_of, model_keys
from saelab.workflows.compare import CompareJob, run_compare
from saelab.workflows.contrast import ContrastJob, run_contrast
from saelab.workflows.core_neurons import CoreNeuronsJob, run_core_neurons
from saelab.workflows.dark_matter import DarkMatterJob, run_dark_matter
from saelab.workflows.explain import ExplainJob, ExplainResult, run_explain
from saelab.workflows.lazy_neurons import LazyNeuronsJob, run_lazy_neurons
from saelab.workflows.sparsify import SparsifyJob, SparsityReport, run_sparsify


@described_by(DarkMatterJob)
def dark_matter(
    sae: Sae | DarkMatterJob,
    store: Store | None = None,
    *,
    out: str | Path,
    ladder: Sequence[Sae] | None = None,
    max_tokens: int | None = None,
    force: bool = False,
    say: Say = silent,
    **keys: Any,
) -> DarkMatter:
    """Split the error of an SAE into a linear and a nonlinear part, and study both (Engels et al. 2024).

        result = saelab.dark_matter("runs/sae/sae", "runs/heldout-store", out="runs/dark-matter")

    ``store`` holds activations, best of text that no SAE was trained on; ``ladder`` more SAEs of the same site. SAEs
    are read from their folders.
    """
    job = _job(DarkMatterJob, "dark_matter", sae, "sae", store=store, ladder=ladder, max_tokens=max_tokens, **keys)
    return run_dark_matter(job, out, force=force, say=say)


@described_by(ExplainJob)
def explain(
    store: FeatureStore | str | Path | ExplainJob,
    *,
    sae: Sae | None = None,
    model: Model | None = None,
    features: Sequence[int] | None = None,
    max_features: int | None = None,
    say: Say = silent,
    **keys: Any,
) -> ExplainResult:
    """Explain the features of a store, and score the explanations beside controls; both are kept beside the store.

        result = saelab.explain("runs/features", max_features=100)

    Without ``judge`` (``{"model": ..., "endpoint": ...}``) no language model is asked: token sets, and the scores that
    need none.
    """
    chosen = None if features is None else [int(i) for i in features]
    given = {"sae": sae, "model": model, "features": chosen, "max_features": max_features, **keys}
    return run_explain(_job(ExplainJob, "explain", store, "store", **given), say=say)


@described_by(CompareJob)
def compare(
    a: Sae | FeatureStore | CompareJob,
    b: Sae | FeatureStore | None = None,
    *,
    store: Store | None = None,
    text: Text | None = None,
    max_tokens: int | None = None,
    out: str | Path | None = None,
    force: bool = False,
    **keys: Any,
) -> Comparison:
    """Find which features of one SAE are features of another, beside what chance gives.

        saelab.compare("runs/sae/seed=0", "runs/sae/seed=1", max_tokens=50_000)

    Both are SAEs, or both are feature stores on the same text.
    """
    job = _job(CompareJob, "compare", a, "a", b=b, store=store, text=text, max_tokens=max_tokens, **keys)
    return run_compare(job, out, force=force)


@described_by(SparsifyJob)
def sparsify(
    model: Model | SparsifyJob = "embedded",
    recipe: Mapping[str, Any] | str | Path | None = None,
    *,
    out: str | Path,
    calibration: Text | None = None,
    text: Text | None = None,
    force: bool = False,
    **keys: Any,
) -> SparsityReport:
    """Prune the weights of a model; the sparse model in ``out`` is a model folder that everything else takes.

        saelab.sparsify("embedded", {"method": {"name": "wanda"}, "sparsity": 0.5}, out="runs/sparse")

    ``recipe`` may be a YAML file. A model that is open is read again from where it came from, and stays as it is.
    """
    name = model.name if isinstance(model, SubjectModel) else model
    read = load_yaml(resolve_config(recipe)) if isinstance(recipe, str | Path) else recipe
    given = {"recipe": read, "calibration": calibration, "text": text, **model_keys(model, keys), **keys}
    return run_sparsify(_job(SparsifyJob, "sparsify", name, "model", **given), out, force=force)


@described_by(LazyNeuronsJob)
def lazy_neurons(
    model: Model | LazyNeuronsJob = "embedded",
    *,
    sae: Sae | None = None,
    text: Text | None = None,
    max_tokens: int | None = None,
    out: str | Path | None = None,
    force: bool = False,
    **keys: Any,
) -> LazyNeurons:
    """Measure how few neurons of a model's MLPs are active per token; with ``sae``, against an SAE at equal L0."""
    given = {"sae": sae, "text": text, "max_tokens": max_tokens, **model_keys(model, keys), **keys}
    return run_lazy_neurons(_job(LazyNeuronsJob, "lazy_neurons", model, "model", **given), out, force=force)


@described_by(CoreNeuronsJob)
def core_neurons(
    model: Model | CoreNeuronsJob = "embedded",
    *,
    text: Text | None = None,
    max_tokens: int | None = None,
    out: str | Path | None = None,
    force: bool = False,
    **keys: Any,
) -> CoreNeurons:
    """Measure a model that runs on the neurons that the start of each text used most: loss, speed, stability."""
    given = {"text": text, "max_tokens": max_tokens, **model_keys(model, keys), **keys}
    return run_core_neurons(_job(CoreNeuronsJob, "core_neurons", model, "model", **given), out, force=force)


@described_by(ContrastJob)
def contrast(sae: Sae | ContrastJob, *, text: Text | None = None, **keys: Any) -> ContrastReport:
    """Report what the halves of a contrastive SAE know, on pairs it was not trained on."""
    return run_contrast(_job(ContrastJob, "contrast", sae, "sae", text=text, **keys))


def _job(cls: Any, function: str, first: Any, key: str, **keys: Any) -> Any:
    """Return the job: ``first`` is one, or the value of its key ``key``."""
    return job_of(cls, function, first if isinstance(first, cls) else {key: first}, **keys)
