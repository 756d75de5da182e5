"""Circuits: a task and a model by name in, a result of :mod:`saelab.analysis.circuits` out."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from saelab.core.config import Config
from saelab.core.errors import ConfigError
from saelab.core.named import Named, Ref

if TYPE_CHECKING:
    from saelab.analysis.circuits.circuit import Circuit
    from saelab.analysis.circuits.codes import CodeScores
    from saelab.analysis.circuits.compare import Comparison

_METHODS = ("codes", "patching", "patching-nodes", "acdc", "eap", "eap-ig", "dfa")


class TaskJob(Config):
    """A model, a task, and how a run is judged."""

    task: str
    """Task of data/tasks, a YAML file of that form, or a prompt file (.csv, .json, .jsonl)."""
    model: Ref = "embedded"
    """Model: embedded, a folder, a hub id, or one of hand-induction, reverse, proportion, induction-trained."""
    device: str = "cpu"
    """Torch device of the model."""
    n: int = Field(default=64, ge=2)
    """Prompt pairs to find the circuit on."""
    n_heldout: int = Field(default=64, ge=2)
    """Unseen prompt pairs to judge it on."""
    metric: Literal["logit_diff", "logit_margin", "prob_diff", "kl", "nll"] | None = None
    """Metric of a run; null: the task's own."""
    ablation: Literal["corrupted", "mean", "zero"] = "corrupted"
    """What a removed edge carries: the corrupted prompt's value, the mean of those, or 0."""
    positions: Literal["all", "readout"] = "all"
    """Where removed edges carry it."""
    seed: int = 0
    """Of the prompts and of everything drawn."""


class HeadsJob(TaskJob):
    """What ``saelab circuits heads`` needs."""

    pooling: Literal["last", "mean", "max", "each"] = Field()
    """How a head's outputs on a prompt become integers: readout position, mean, largest, or each position."""
    latents: int = Field(default=200, gt=0)
    """Latents of the SAE."""
    l1: float = Field(default=0.02, ge=0)
    """L1 penalty, on outputs scaled to mean square 1."""
    examples: int = Field(default=10, gt=0)
    """Prompts the SAE is trained on."""
    epochs: int = Field(default=100, gt=0)
    """Most training steps of the SAE; it ends earlier on a plateau."""
    score: Literal["difference", "unique"] = "difference"
    """Score of a head: chi-squared of what positives show more often, or the count of codes on positives only."""
    shuffles: int = Field(default=100, ge=20)
    """Relabellings of the prompts for the null."""


class CompareJob(HeadsJob):
    """What ``saelab circuits compare`` needs."""

    methods: list[str] = Field(default_factory=lambda: list(_METHODS))
    """Methods to compare."""
    tau: float = Field(default=0.01, gt=0)
    """ACDC's threshold, as a share of what removing every edge does to the metric."""
    steps: int = Field(default=5, gt=0)
    """Midpoints of EAP-IG."""
    fraction: float = Field(default=0.1, gt=0, le=1)
    """Share of edges at which faithfulness is shown."""
    reference_share: float = Field(default=0.02, gt=0)
    """Without a known circuit: edges that alone move the metric by this share of all count as true."""


class FindJob(TaskJob):
    """What ``saelab circuits find`` needs."""

    method: Literal["patching", "acdc", "eap", "eap-ig"] = "eap-ig"
    """Method whose scores choose the edges."""
    target: float = Field(default=0.8, gt=0)
    """Faithfulness wanted on the prompts it is found on."""
    tau: float = Field(default=0.01, gt=0)
    """ACDC's threshold, as a share of what removing every edge does to the metric."""
    steps: int = Field(default=10, gt=0)
    """Midpoints of EAP-IG."""
    n_random: int = Field(default=20, ge=1)
    """Random circuits with as many edges to compare with."""


def open_model(name: str, device: str = "cpu") -> Any:
    """Load a model for circuits: like ``load_model``, and the models with known circuits by name."""
    from saelab.analysis.circuits.known import KNOWN, write_known
    from saelab.analysis.circuits.trained import trained_induction_folder
    from saelab.models.subject import load_model

    if isinstance(name, Named):
        return load_model(name)
    if name in KNOWN and not Path(name).exists():
        with tempfile.TemporaryDirectory() as folder:
            model = load_model(str(write_known(name, folder)), device=device)
        model.name = name
        return model
    if name == "induction-trained" and not Path(name).exists():
        model = load_model(str(trained_induction_folder()), device=device)
        model.name = name
        return model
    return load_model(name, device=device)


def open_task(job: TaskJob) -> tuple[Any, Any, Any, Any]:
    """(parts, train batch, held-out batch, setting) of a job."""
    from saelab.analysis.circuits.run import Setting
    from saelab.analysis.circuits.tasks import load_task, task_batch
    from saelab.models.components import Components

    model = open_model(job.model, job.device)
    train = task_batch(job.task, model, job.n, job.seed, "train")
    heldout = task_batch(job.task, model, job.n_heldout, job.seed, "heldout")
    is_file = Path(job.task).suffix in (".csv", ".json", ".jsonl")
    metric = job.metric or ("logit_diff" if is_file else load_task(job.task).metric)
    return Components(model), train, heldout, Setting(metric, job.ablation, job.positions)


def run_heads(job: HeadsJob) -> "CodeScores":
    """Discrete-code scores of all heads: :class:`saelab.analysis.circuits.codes.CodeScores`."""
    from saelab.analysis.circuits.codes import discrete_codes

    parts, train, _, _ = open_task(job)
    return discrete_codes(parts, train, codes_config(job))


def codes_config(job: HeadsJob) -> Any:
    """The settings of the discrete codes in a job."""
    from saelab.analysis.circuits.code_sae import CodesConfig

    names = ("pooling", "latents", "l1", "examples", "epochs", "score", "shuffles", "seed")
    return CodesConfig(**{name: getattr(job, name) for name in names})


def run_compare(job: CompareJob) -> "Comparison":
    """All methods side by side: :class:`saelab.analysis.circuits.compare.Comparison`."""
    from saelab.analysis.circuits.compare import compare
    from saelab.analysis.circuits.run import EdgeRunner
    from saelab.core.errors import nearest

    for name in job.methods:
        if name not in _METHODS:
            raise ConfigError(f"no method '{name}'{nearest(name, _METHODS)} (known: {', '.join(_METHODS)})")
    parts, train, heldout, setting = open_task(job)
    return compare(
        parts,
        train,
        heldout,
        setting,
        codes_config(job),
        truth=known_truth(job, parts),
        methods=tuple(job.methods),
        tau=job.tau * _range(EdgeRunner(parts, heldout, setting)),
        steps=job.steps,
        fraction=job.fraction,
        reference_share=job.reference_share,
        seed=job.seed,
    )


def known_truth(job: TaskJob, parts: Any) -> Any:
    """The known circuit for a job's model and task and ablation, or None."""
    from saelab.analysis.circuits.graph import EdgeGraph
    from saelab.analysis.circuits.tasks import load_task, task_names
    from saelab.analysis.circuits.truth import truth_for, truth_names, truth_spec

    graph = EdgeGraph.of(parts)
    task_truth = load_task(job.task).truth if job.task in task_names() else None
    for name in filter(None, (job.model if job.model in truth_names() else None, task_truth)):
        spec = truth_spec(name)
        known_by_hand = spec.model == name
        if known_by_hand and job.ablation == "zero" and job.model == spec.model:
            return truth_for(name, graph)
        if not known_by_hand and Path(job.model).name in (spec.model, f"{spec.model}-small"):
            return truth_for(name, graph)
    return None


def run_find(job: FindJob, out: str | Path | None = None, *, force: bool = False) -> "Circuit":
    """Smallest faithful circuit of a task; with ``out`` also written as a folder of kind ``circuit``."""
    from saelab.analysis.circuits.acdc import acdc
    from saelab.analysis.circuits.circuit import save_circuit, smallest_circuit
    from saelab.analysis.circuits.eap import eap
    from saelab.analysis.circuits.exact import patch_edges
    from saelab.analysis.circuits.run import EdgeRunner
    from saelab.core.artifacts import check_output

    if out is not None:
        check_output(out, force=force)
    parts, train, heldout, setting = open_task(job)
    runner, judge = EdgeRunner(parts, train, setting), EdgeRunner(parts, heldout, setting)
    if job.method == "patching":
        scores = patch_edges(runner)
    elif job.method == "acdc":
        scores = acdc(runner, job.tau * _range(runner))
    else:
        scores = eap(runner, 1 if job.method == "eap" else job.steps)
    circuit = smallest_circuit(runner, judge, scores, target=job.target, n_random=job.n_random, seed=job.seed)
    if out is not None:
        save_circuit(circuit, out, force=force)
    return circuit


@dataclass(frozen=True, eq=False)
class CircuitFolder:
    """What is in a folder of kind ``circuit``, whatever its content: for the app and notebooks."""

    manifest: dict[str, Any]
    """``content`` says ``edges``, ``features`` or ``attribution``."""
    data: dict[str, Any]
    """``circuit.json`` or ``graph.json``."""
    figure: Any
    """Plotly figure of the graph."""


def open_circuit(folder: str | Path) -> CircuitFolder:
    """Read a circuit folder of any content."""
    from saelab.analysis.circuits.figure import read_figure
    from saelab.core.artifacts import read_json, read_manifest

    manifest = read_manifest(folder, "circuit")
    name = "graph.json" if manifest.get("content") == "attribution" else "circuit.json"
    return CircuitFolder(manifest, read_json(Path(folder) / name), read_figure(folder))


def _range(runner: Any) -> float:
    """What removing every edge does to the metric: the unit of tau."""
    found: float = abs(float(runner.scores(runner.graph.valid[None])[0]) - runner.clean_score)
    if found == 0:
        raise ConfigError(
            f"removing every edge does not change {runner.setting.metric}; choose another metric or ablation"
        )
    return found
