"""Circuits in Python: the functions behind ``saelab circuits``, one for each of its commands.

    import saelab

    circuit = saelab.circuits.find("induction", "induction-trained")
    circuit.faithfulness, circuit.plot()

See :mod:`saelab.workflows.call` for the convention they share.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saelab.analysis.circuits.attribution.graph import AttributionGraph
from saelab.analysis.circuits.circuit import Circuit
from saelab.analysis.circuits.codes import CodeScores
from saelab.analysis.circuits.compare import Comparison
from saelab.analysis.circuits.explained import AttentionExplanation
from saelab.analysis.circuits.features.circuit import FeatureCircuit
from saelab.workflows.api import Model, Sae
from saelab.workflows.call import described_by, job_of
from saelab.workflows.circuits import CompareJob, FindJob, HeadsJob, run_compare, run_find, run_heads
from saelab.workflows.circuits_features import (
    AttentionJob,
    FeaturesJob,
    GraphJob,
    run_attention,
    run_features,
    run_graph,
)

__all__ = ["attention", "compare", "features", "find", "graph", "heads"]


@described_by(FindJob)
def find(
    task: str | Path | FindJob,
    model: Model | None = None,
    *,
    out: str | Path | None = None,
    force: bool = False,
    **keys: Any,
) -> Circuit:
    """Find the smallest circuit of edges that is faithful on a task, and judge it on held-out prompts."""
    return run_find(
        job_of(FindJob, "circuits.find", _first(task, FindJob, "task"), model=model, **keys), out, force=force
    )


@described_by(HeadsJob)
def heads(task: str | Path | HeadsJob, model: Model | None = None, **keys: Any) -> CodeScores:
    """Score the heads of a model on a task by the discrete codes of an SAE; ``pooling`` must be chosen."""
    return run_heads(job_of(HeadsJob, "circuits.heads", _first(task, HeadsJob, "task"), model=model, **keys))


@described_by(CompareJob)
def compare(task: str | Path | CompareJob, model: Model | None = None, **keys: Any) -> Comparison:
    """Run all circuit methods on one task and judge them against what is known of it; ``pooling`` must be chosen."""
    return run_compare(job_of(CompareJob, "circuits.compare", _first(task, CompareJob, "task"), model=model, **keys))


@described_by(FeaturesJob)
def features(
    saes: Sae | Sequence[Sae] | FeaturesJob,
    task: str | Path | None = None,
    *,
    model: Model | None = None,
    out: str | Path | None = None,
    force: bool = False,
    **keys: Any,
) -> FeatureCircuit:
    """Find the circuit of SAE features of a task, and judge it on held-out prompts."""
    first = saes if isinstance(saes, FeaturesJob) else {"saes": _several(saes)}
    return run_features(
        job_of(FeaturesJob, "circuits.features", first, task=task, model=model, **keys), out, force=force
    )


@described_by(AttentionJob)
def attention(
    sae: Sae | AttentionJob,
    feature: int | None = None,
    prompt: str | None = None,
    *,
    model: Model | None = None,
    **keys: Any,
) -> AttentionExplanation:
    """Explain one feature of an attention SAE on a prompt: heads, source positions, tree."""
    first = _first(sae, AttentionJob, "sae")
    return run_attention(
        job_of(AttentionJob, "circuits.attention", first, feature=feature, prompt=prompt, model=model, **keys)
    )


@described_by(GraphJob)
def graph(
    transcoders: Sequence[Sae] | GraphJob,
    prompt: str | None = None,
    *,
    model: Model | None = None,
    out: str | Path | None = None,
    force: bool = False,
    **keys: Any,
) -> AttributionGraph:
    """Attribute the next token of a prompt to features, with one transcoder for each MLP."""
    first = transcoders if isinstance(transcoders, GraphJob) else {"transcoders": _several(transcoders)}
    return run_graph(job_of(GraphJob, "circuits.graph", first, prompt=prompt, model=model, **keys), out, force=force)


def _first(given: Any, job: type, key: str) -> Any:
    return given if isinstance(given, job) else {key: given}


def _several(given: Any) -> list[Any]:
    return list(given) if isinstance(given, list | tuple) else [given]
