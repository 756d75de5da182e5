"""What the evaluations return: numbers in SAEBench's shape, their controls, and which controls match."""

import dataclasses
import math
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from saelab import __version__
from saelab.core.result import Result

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

Better = Literal["higher", "lower"]
Metrics = dict[str, dict[str, float]]
LEAST_MARGIN = 0.01
"""A control closer than this matches, whatever the spread of the parts says."""


@dataclass(frozen=True)
class Flag:
    """A number that a control reaches as well: it says nothing about this SAE."""

    metric: str
    """Name of the metric."""
    control: str
    """Name of the control."""
    value: float
    """The SAE's value."""
    control_value: float
    """The control's."""
    margin: float
    """By how much the SAE would have to be better: 1.96 standard errors of the paired difference, 0.01 at least."""


@dataclass(frozen=True, eq=False)
class EvalResult:
    """One evaluation of SAEBench's."""

    eval_type_id: str
    """SAEBench's name of it."""
    config: dict[str, Any]
    """Its settings, counts and seed."""
    metrics: Metrics
    """Groups of named numbers."""
    details: list[dict[str, Any]] = field(default_factory=list)
    """One entry per dataset, class, letter or bin count."""
    controls: dict[str, Metrics] = field(default_factory=dict)
    """The same groups for each control."""
    better: dict[str, Better] = field(default_factory=dict)
    """Headline metrics, and which direction is good."""
    parts: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """For metrics that are means over parts: the parts, for ``sae`` and for each control, in the same order."""
    skipped: str = ""
    """Why it has no numbers, if it has none."""

    def value(self, metric: str, control: str | None = None) -> float:
        """Return a metric by name; nan when there is none."""
        groups = self.metrics if control is None else self.controls.get(control, {})
        return next((group[metric] for group in groups.values() if metric in group), math.nan)

    def flags(self) -> list[Flag]:
        """Headline metrics that a control reaches."""
        found = []
        for metric, better in self.better.items():
            sign = 1.0 if better == "higher" else -1.0
            value = self.value(metric)
            for control in self.controls:
                other = self.value(metric, control)
                margin = self._margin(metric, control)
                if math.isfinite(value) and math.isfinite(other) and sign * (value - other) <= margin:
                    found.append(Flag(metric, control, value, other, margin))
        return found

    def _margin(self, metric: str, control: str) -> float:
        parts = self.parts.get(metric, {})
        if control not in parts or len(parts["sae"]) < 3:
            return LEAST_MARGIN
        difference = np.array(parts["sae"]) - np.array(parts[control])
        difference = difference[np.isfinite(difference)]
        error = float(difference.std(ddof=1) / math.sqrt(len(difference))) if len(difference) > 2 else 0.0
        return max(LEAST_MARGIN, 1.96 * error)

    def to_saebench(self, sae: Mapping[str, Any], *, eval_id: str, millis: int) -> dict[str, Any]:
        """Return SAEBench's JSON (its field names), with ``controls`` and ``flags`` of ours beside them."""
        return {
            "eval_type_id": self.eval_type_id,
            "eval_config": self.config,
            "eval_id": eval_id,
            "datetime_epoch_millis": millis,
            "eval_result_metrics": self.metrics,
            "eval_result_details": self.details,
            "sae_bench_commit_hash": f"saelab {__version__}",
            "sae_lens_id": sae.get("id", ""),
            "sae_lens_release_id": sae.get("release", ""),
            "sae_lens_version": "not used",
            "sae_cfg_dict": dict(sae),
            "eval_result_unstructured": {"skipped": self.skipped} if self.skipped else None,
            "controls": self.controls,
            "flags": [dataclasses.asdict(flag) for flag in self.flags()],
        }


@dataclass(frozen=True, eq=False, repr=False)
class FullEvaluation(Result):
    """All evaluations of one SAE."""

    evals: dict[str, EvalResult]
    """By SAEBench's name."""
    sae: dict[str, Any]
    """What the SAE is: folder, architecture, sizes, model, site."""
    seed: int
    """Seed of samples, probes and controls."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time that each took."""
    eval_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    """Identity of this run, in every JSON file."""
    datetime_epoch_millis: int = field(default_factory=lambda: int(time.time() * 1000))
    """When."""
    saelab_version: str = __version__
    """Version that took the numbers."""

    def flags(self) -> list[Flag]:
        """Headline metrics that a control reaches, over all evaluations."""
        return [flag for result in self.evals.values() for flag in result.flags()]

    def to_dict(self) -> dict[str, Any]:
        """Return everything, each evaluation in SAEBench's shape."""
        run, when = self.eval_id, self.datetime_epoch_millis
        return {
            "sae": self.sae,
            "seed": self.seed,
            "seconds": self.seconds,
            "evals": {n: r.to_saebench(self.sae, eval_id=run, millis=when) for n, r in self.evals.items()},
            "flags": [dataclasses.asdict(flag) for flag in self.flags()],
            "saelab_version": self.saelab_version,
        }

    def to_frame(self) -> "pd.DataFrame":
        """One row per headline metric: the SAE, each control, and which of these match."""
        import pandas as pd

        rows = []
        for name, result in self.evals.items():
            flags = result.flags()
            for metric, better in result.better.items():
                row: dict[str, Any] = {"eval": name, "metric": metric, "better": better, "sae": result.value(metric)}
                row |= {control: result.value(metric, control) for control in result.controls}
                row["matched_by"] = ", ".join(flag.control for flag in flags if flag.metric == metric)
                rows.append(row)
        return pd.DataFrame(rows)

    def figures(self) -> "dict[str, tuple[Figure, pd.DataFrame]]":
        """Headline metrics of the SAE and of its controls, one bar each (those between 0 and 1)."""
        from plotly import graph_objects as go

        from saelab.core.plotting import BLUE, ORANGE, SKY, figure

        frame = self.to_frame()
        shown = frame[frame["sae"].between(-1, 1.05)]
        labels = shown["metric"] + ["  (matched)" if matched else "" for matched in shown["matched_by"]]
        bars = [
            go.Bar(
                y=labels,
                x=shown[name].clip(-1, 1.05),
                customdata=shown[name],
                name=name,
                orientation="h",
                marker={"color": colour},
                hovertemplate=f"{name} %{{customdata:.4g}}<extra></extra>",
            )
            for name, colour in (("sae", BLUE), ("untrained", ORANGE), ("shuffled", SKY))
            if name in shown
        ]
        layout = {"barmode": "group", "height": 120 + 44 * len(shown), "xaxis_title": "value"}
        return {"headline": (figure(*bars, yaxis={"title": "metric", "autorange": "reversed"}, **layout), shown)}

    def __repr__(self) -> str:
        return f"FullEvaluation({', '.join(self.evals)}; {len(self.flags())} numbers matched by a control)"


def by_dictionary(
    eval_type_id: str,
    config: Mapping[str, Any],
    values: Mapping[str, Mapping[str, list[float]]],
    details: list[dict[str, Any]],
    *,
    group: str,
    headline: Sequence[str],
) -> EvalResult:
    """Return the means of ``values`` (dictionary -> metric -> one number per part), the SAE's and its controls'.

    ``group`` is the name SAEBench gives to the metrics; of the ``headline`` ones larger is better, and their parts are
    kept for the flags.
    """
    metrics = {name: {group: {key: mean(v) for key, v in found.items()}} for name, found in values.items()}
    return EvalResult(
        eval_type_id,
        dict(config),
        metrics.pop("sae"),
        details,
        controls=metrics,
        better=dict.fromkeys(headline, "higher"),
        parts={key: {name: found[key] for name, found in values.items()} for key in headline},
    )


def skipped(eval_type_id: str, why: str, config: Mapping[str, Any] | None = None) -> EvalResult:
    """Return the result of an evaluation that could not be made."""
    return EvalResult(eval_type_id, dict(config or {}), {}, skipped=why)


def mean(values: Sequence[float]) -> float:
    """Mean of the finite values; nan without any."""
    kept = [value for value in values if math.isfinite(value)]
    return float(np.mean(kept)) if kept else math.nan
