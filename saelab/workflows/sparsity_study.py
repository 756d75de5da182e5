"""What sparsity does to features: equal SAEs on a dense model and on sparsified ones, evaluated and matched.

For each model, SAEs of the same configuration and seeds are trained on activations of the same text and evaluated on
the same held-out text. Then the SAE of each seed on the dense model is compared, by its activations on the same tokens,
with the SAE of the *next* seed on the sparse model, and, as the control, with the SAE of the next seed on the dense
model: two SAEs of one model differ too, and only what goes beyond that is the sparsity's doing. Beside it stands the
comparison with the SAE of the *same* seed on the sparse model, which began with the same weights: it follows single
features more closely, and has no control, since on the dense model it would be that of an SAE with itself.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from saelab.core.artifacts import prepare_output, write_json, write_manifest
from saelab.core.assets import resolve_config
from saelab.core.config import Config, apply_overrides, load_yaml, parse_config
from saelab.core.errors import ConfigError
from saelab.core.result import Result
from saelab.workflows.compare import CompareJob, run_compare
from saelab.workflows.evaluate import EvaluateJob, run_evaluate
from saelab.workflows.harvest import HarvestJob, run_harvest
from saelab.workflows.train import TrainJob, run_train

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

LOST = 0.3
"""A feature is lost when no feature of the other SAE correlates with it more than this."""
MEASURES = ("fvu", "ce_recovered", "ce_clean", "dead_fraction")
SHOWN = {
    "fvu": "FVU of the SAE",
    "ce_recovered": "CE recovered",
    "ce_clean": "loss of the model (nats)",
    "dead_fraction": "dead features",
    "matched": "correlation of matched features",
    "lost": "features of the dense SAE lost",
    "matched_same": "correlation of matched features, same start",
    "lost_same": "features of the dense SAE lost, same start",
}


class StudyJob(Config):
    """A dense model, sparsified ones, and the SAE to train on each."""

    model: str = "embedded"
    """The dense model."""
    sparse: list[str] = Field(min_length=1)
    """Folders of ``saelab sparsify``; repeat the option for several."""
    site: str = "blocks.2.hook_resid_post"
    """Site to harvest."""
    text: str = "stdlib:train"
    """Text to train on."""
    heldout: str = "stdlib:heldout"
    """Text to evaluate and to compare on."""
    harvest_tokens: int = Field(default=400_000, ge=1000)
    """Tokens in each activation store."""
    eval_tokens: int = Field(default=50_000, ge=1000)
    """Held-out tokens for the evaluation and for the comparison."""
    train: str = "configs/demo-topk.yaml"
    """YAML file of ``saelab train``: the SAE and its training; store, site and seeds are set by the study."""
    train_tokens: int | None = Field(default=None, ge=1000)
    """Tokens to train on, if not as in ``train``."""
    d_sae: int | None = Field(default=None, ge=1)
    """Features, if not as in ``train``."""
    seeds: list[int] = Field(default=[0, 1, 2])
    """Seeds of the initialisation; two at least, since the control compares seeds."""


@dataclass(frozen=True, repr=False)
class Study(Result):
    """The study of one or more sparse models."""

    models: tuple[dict[str, Any], ...]
    """Per model: name, sparsity, mean and sd of FVU, CE recovered and dead share, the model's own CE, tokens/s."""
    matches: tuple[dict[str, Any], ...]
    """Per comparison (each sparse model, and the control): mean correlation of matched features, share of the dense
    SAE's live features that are lost, mean and sd over seeds. ``matched`` and ``lost`` are of SAEs of different seeds;
    ``matched_same`` and ``lost_same`` of the same seed, None for the control."""
    lost: dict[str, list[int]]
    """Per sparse model: features of the dense SAE of the first seed that are lost in the sparse model's SAE of the
    second seed and not in the dense model's."""
    seeds: tuple[int, ...]
    """Seeds of the SAEs."""

    def __repr__(self) -> str:
        rows = ", ".join(f"{m['model']} FVU {m['fvu']:.4f}" for m in self.models)
        return f"Study({rows}; {len(self.seeds)} seeds)"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    def to_frame(self) -> "pd.DataFrame":
        """One row per model, what was found by matching beside it."""
        import pandas as pd

        matches = {row["model"]: row for row in self.matches}
        return pd.DataFrame([{**row, **matches[row["model"]]} for row in self.models])

    def summary(self) -> "pd.DataFrame":
        """One row per measure and one column per model, as texts ``mean ± standard deviation``."""
        import pandas as pd

        columns = {
            row["model"]: [_shown(row[name], row[f"{name}_sd"]) for name in SHOWN]
            for row in self.to_frame().to_dict("records")
        }
        return pd.DataFrame({"measure": list(SHOWN.values()), **columns})

    def figures(self) -> "dict[str, tuple[Figure, pd.DataFrame]]":
        """FVU, CE recovered, and features lost, of each model; bars are one standard deviation."""
        from plotly.subplots import make_subplots

        from saelab.core.plotting import BLUE, template

        frame = self.to_frame()
        titles = {"fvu": "FVU", "ce_recovered": "CE recovered", "lost": "share of features lost"}
        figure = make_subplots(1, len(titles))
        for k, name in enumerate(titles, start=1):
            figure.add_bar(
                x=frame["model"], y=frame[name], row=1, col=k, marker_color=BLUE, showlegend=False,
                error_y={"type": "data", "array": frame[f"{name}_sd"]},
            )  # fmt: skip
            figure.update_xaxes(title_text="model", row=1, col=k)
            figure.update_yaxes(title_text=titles[name], row=1, col=k)
        figure.update_layout(template=template())
        return {"study": (figure, frame)}


def run_study(
    job: StudyJob, out: str | Path, *, force: bool = False, say: Callable[[str], None] = lambda text: None
) -> Study:
    """Harvest, train, evaluate and compare; stores, SAEs, comparisons and the report are below ``out``.

    Raises ``ConfigError`` for fewer than two seeds or two models of one name, and what the stages raise.
    """
    if len(set(job.seeds)) < 2:
        raise ConfigError(f"the study needs at least 2 seeds, got {job.seeds}: its control compares SAEs of two seeds")
    names = _names(job)
    folder = prepare_output(out, force=force)
    models = []
    for name, path in names.items():
        say(f"{name}: {path}")
        models.append(_model(job, name, path, folder, say))
    matches, lost = [], {}
    pairs = list(zip(job.seeds, [*job.seeds[1:], job.seeds[0]], strict=True))
    control = [_compare(job, folder, ("dense", s), ("dense", t)) for s, t in pairs]
    matches.append({"model": "dense", **_match(control), **_match([], "_same")})
    for name in list(names)[1:]:
        found = [_compare(job, folder, ("dense", s), (name, t)) for s, t in pairs]
        same = [_compare(job, folder, ("dense", s), (name, s)) for s in job.seeds]
        matches.append({"model": name, **_match(found), **_match(same, "_same")})
        lost[name] = np.flatnonzero(found[0][1] & ~control[0][1]).tolist()
    study = Study(tuple(models), tuple(matches), lost, tuple(job.seeds))
    write_json(folder / "study.json", study.to_dict())
    (folder / "study.html").write_text(_report(study), encoding="utf-8")
    write_manifest(folder, "sparsity-study", {"job": job.model_dump(mode="json")})
    return study


def _names(job: StudyJob) -> dict[str, str]:
    names = {"dense": job.model}
    for path in job.sparse:
        name = Path(path).name
        if name in names:
            raise ConfigError(f"two models are called '{name}'; give folders of different names")
        names[name] = path
    return names


def _model(job: StudyJob, name: str, path: str, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Harvest one model, train an SAE per seed on one pass, evaluate each."""
    data = {"model": path, "sites": [job.site], "text": job.text, "harvest": {"max_tokens": job.harvest_tokens}}
    sparse = "off" if name == "dense" else "auto"
    store = folder / name / "store"
    harvested = run_harvest(parse_config(HarvestJob, {**data, "sparse": sparse}, "study"), store, say=say)
    keys: dict[str, Any] = {"store": str(store), "site": job.site, "grid": {"training.seed": job.seeds}}
    if job.train_tokens is not None:
        keys["training.tokens"] = job.train_tokens
    if job.d_sae is not None:
        keys["sae.d_sae"] = job.d_sae
    training = apply_overrides(load_yaml(resolve_config(job.train)), keys)
    run_train(parse_config(TrainJob, training, job.train), folder / name / "sae", say=say)
    found = [
        run_evaluate(EvaluateJob(sae=str(_sae(folder, name, seed)), text=job.heldout, max_tokens=job.eval_tokens))
        for seed in job.seeds
    ]
    assert harvested.report is not None, "harvest reports"
    row: dict[str, Any] = {"model": name, "tokens_per_second": harvested.report.tokens_per_second}
    for measure in MEASURES:
        values = [float(getattr(evaluation, measure)) for evaluation in found]
        row |= {measure: statistics.mean(values), f"{measure}_sd": statistics.stdev(values)}
    return row


def _sae(folder: Path, name: str, seed: int) -> Path:
    return folder / name / "sae" / f"seed={seed}"


def _compare(job: StudyJob, folder: Path, left: tuple[str, int], right: tuple[str, int]) -> tuple[float, np.ndarray]:
    """Return the mean correlation of matched features, and which features of the left SAE have no counterpart."""
    (a, seed_a), (b, seed_b) = left, right
    result = run_compare(
        CompareJob(
            a=str(_sae(folder, a, seed_a)),
            b=str(_sae(folder, b, seed_b)),
            text=job.heldout,
            max_tokens=job.eval_tokens,
            targets=0,
        ),
        folder / "comparisons" / f"{a}-{seed_a}-{b}-{seed_b}",
    )
    assert result.activations is not None, "activations were asked for"
    return result.activations.summary()["mean_matched"], result.activations.best_b_value < LOST


def _match(found: Sequence[tuple[float, np.ndarray]], suffix: str = "") -> dict[str, float | None]:
    """Return mean and standard deviation of the matched correlation and of the share lost; None of no comparison."""
    row: dict[str, float | None] = {}
    for name, values in (
        ("matched", [value for value, _ in found]),
        ("lost", [float(lost.mean()) for _, lost in found]),
    ):
        row[f"{name}{suffix}"] = statistics.mean(values) if values else None
        row[f"{name}{suffix}_sd"] = statistics.stdev(values) if values else None
    return row


def _shown(mean: float | None, spread: float | None) -> str:
    """``mean ± standard deviation``; a dash where there is none (pandas makes NaN of None)."""
    return "-" if mean is None or spread is None or math.isnan(mean) else f"{mean:.4f} ± {spread:.4f}"


def _report(study: Study) -> str:
    """One HTML page that needs nothing from outside."""
    from html import escape

    from saelab.analysis.html import page, table

    lost = "".join(
        f"<h2>Lost in {escape(name)}</h2><p>{len(features):,} features of the dense SAE (seed {study.seeds[0]}) are "
        f"lost in that model's SAE of seed {study.seeds[1]} and not in the dense model's: "
        f"{', '.join(map(str, features[:200]))}"
        f"{' and so on' if len(features) > 200 else ''}</p>"
        for name, features in study.lost.items()
    )
    control = (
        f"<p>Mean and standard deviation over {len(study.seeds)} seeds. A feature of an SAE of the dense model is lost "
        f"when no feature of the other SAE has a correlation of {LOST} with it. The two SAEs of a comparison have "
        "different seeds, and the column <i>dense</i> is the control: both of the dense model. <i>Same start</i>: SAEs "
        "of the same seed, which began with the same weights; there is no control for that.</p>"
    )
    figure = study.plot().to_html(full_html=False, include_plotlyjs=False)
    return page("What sparsity does to features", f"{control}{table(study.summary())}{figure}{lost}")
