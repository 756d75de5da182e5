"""The report: each score's mean over features beside what it is on the controls."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from saelab.analysis.autointerp.controls import CONTROLS
from saelab.analysis.autointerp.intervals import mean
from saelab.core.result import Result
from saelab.features.explanations import SHUFFLED, Score

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

ORDER = (
    "detection", "fuzzing", "intruder", "simulation", "surprisal", "embedding", "example_embedding", "surface",
    "intervention",
)  # fmt: skip
"""Scorers in the order of the report."""


@dataclass(frozen=True)
class ReportRow:
    """One score on the SAE or on one control."""

    author: str
    """Whose explanations; empty for scorers that need none."""
    scorer: str
    """Which score."""
    control: str
    """Empty for the SAE."""
    mean: float
    """Mean over features."""
    low: float
    """Lower end of its 95 % interval over features."""
    high: float
    """Upper end."""
    weighted: float
    """Mean weighted by how often each feature fires; nan for controls other than ``shuffled``."""
    difference: float
    """For ``shuffled``: mean over the same features of (own explanation - another's); else nan."""
    difference_low: float
    """Lower end of its 95 % interval."""
    difference_high: float
    """Upper end."""
    features: int
    """Features scored."""
    undefined: int
    """Features whose score is not a number; left out of the mean."""
    judgements: int
    """Judgements in all."""
    failures: int
    """Judgements that could not be read, counted as wrong."""
    tpr: float
    """Mean true positive rate, where there is one."""
    tnr: float
    """Mean true negative rate."""
    judge: str
    """Who judged."""


@dataclass(frozen=True, repr=False)
class ExplainReport(Result):
    """All scores of one feature store."""

    rows: tuple[ReportRow, ...]
    """By author, scorer and control; the SAE before its controls."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"rows": [asdict(row) for row in self.rows]}

    def to_frame(self) -> "pd.DataFrame":
        """One row for each score on the SAE or a control."""
        import pandas as pd

        return pd.DataFrame([asdict(row) for row in self.rows], columns=list(ReportRow.__dataclass_fields__))

    def side_by_side(self) -> "pd.DataFrame":
        """One row for each score: its mean on the SAE and on each control, as ``0.712 ± 0.010``."""
        import pandas as pd

        table: dict[tuple[str, str], dict[str, str]] = {}
        for row in self.rows:
            half = (row.high - row.low) / 2
            cell = f"{row.mean:.3f} ± {half:.3f}" if np.isfinite(half) else f"{row.mean:.3f}"
            cells = table.setdefault((row.author, row.scorer), {"author": row.author or "-", "score": row.scorer})
            cells[row.control or "SAE"] = cell
            if not row.control:
                cells |= {"features": f"{row.features:,}", "failed": f"{row.failures:,}"}
        columns = ["author", "score", "SAE", *CONTROLS, "features", "failed"]
        return pd.DataFrame([{name: cells.get(name, "") for name in columns} for cells in table.values()])

    def to_markdown(self) -> str:
        """The same as a Markdown table."""
        frame = self.side_by_side()
        lines = ["| " + " | ".join(frame.columns) + " |", "|" + "---|" * len(frame.columns)]
        lines += ["| " + " | ".join(map(str, row)) + " |" for row in frame.itertuples(index=False)]
        return "\n".join(lines)

    def __repr__(self) -> str:
        scores = ", ".join(f"{r.scorer} {r.mean:.3f}" for r in self.rows if not r.control)
        return f"ExplainReport({scores or 'no scores'})"

    def figures(self) -> "dict[str, tuple[Figure, pd.DataFrame]]":
        """Bars with intervals: SAE and controls, score by score, for the author of the first row."""
        import pandas as pd
        from plotly import graph_objects as go

        from saelab.core.plotting import PALETTE, figure

        authors = {"", *[row.author for row in self.rows if row.author][:1]}
        rows = [row for row in self.rows if row.author in authors and row.scorer != "intervention"]
        bars = []
        for k, control in enumerate(("", *CONTROLS)):
            mine = [row for row in rows if row.control == control]
            bars.append(
                go.Bar(
                    x=[row.scorer.replace("_", "-") for row in mine],
                    y=[row.mean for row in mine],
                    error_y={"type": "data", "array": [(row.high - row.low) / 2 for row in mine]},
                    name=control or "SAE",
                    marker={"color": PALETTE[k % len(PALETTE)]},
                )
            )
        axes = {"xaxis_title": "score", "yaxis_title": "mean over features (95 % interval)"}
        frame = pd.DataFrame([asdict(row) for row in rows])
        return {"scores": (figure(*bars, height=320, barmode="group", **axes), frame)}


def report(scores: Iterable[Score], density: Float[np.ndarray, " n_features"]) -> ExplainReport:
    """Average scores over features. ``density`` is that of the SAE's features, for the firing-weighted mean."""
    groups: dict[tuple[str, str, str], list[Score]] = {}
    for score in scores:
        groups.setdefault((score.author, score.scorer, score.control), []).append(score)
    places = {name: k for k, name in enumerate(("", *CONTROLS))}
    ranks = {name: k for k, name in enumerate(ORDER)}
    order = sorted(groups, key=lambda g: (g[0], ranks.get(g[1], 99), g[1], places.get(g[2], 99), g[2]))
    own = {key[:2]: {s.feature: s.value for s in group} for key, group in groups.items() if not key[2]}
    return ExplainReport(tuple(_row(key, groups[key], density, own.get(key[:2], {})) for key in order))


def _row(
    key: tuple[str, str, str], group: list[Score], density: Float[np.ndarray, " n"], own: Mapping[int, float]
) -> ReportRow:
    values = np.array([score.value for score in group], np.float64)
    average = mean(values)
    weighted = difference = mean(np.zeros(0))
    if key[2] in ("", SHUFFLED):
        weights = np.asarray(density, np.float64)[[score.feature for score in group]]
        weighted = mean(values, weights)
    if key[2] == SHUFFLED:
        difference = mean(np.array([own.get(s.feature, float("nan")) - s.value for s in group], np.float64))
    rates = [
        mean(np.array([score.detail.get(name, float("nan")) for score in group], np.float64)).value
        for name in ("tpr", "tnr")
    ]
    return ReportRow(
        *key,
        *(average.value, average.low, average.high, weighted.value),
        *(difference.value, difference.low, difference.high),
        features=len(group),
        undefined=int(np.isnan(values).sum()),
        judgements=sum(score.n for score in group),
        failures=sum(score.failures for score in group),
        tpr=rates[0],
        tnr=rates[1],
        judge=", ".join(sorted({score.judge for score in group})),
    )
