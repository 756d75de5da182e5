"""``Training``: what a call of train made, one SAE or a grid of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from saelab.core.errors import ConfigError, nearest
from saelab.core.result import Result
from saelab.training.loop import LOG, FitResult
from saelab.workflows.runs import read_log

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

    from saelab.sae.base import SAE

CURVES = {"fvu": "FVU", "l0": "L0: active features per token", "dead_fraction": "share of dead features",
          "loss": "loss (scaled units)"}  # fmt: skip
"""Metrics of the log that are drawn, and their axis titles."""


@dataclass(frozen=True, eq=False, repr=False)
class Training(Result, Sequence[FitResult]):
    """The SAEs of one training: a sequence of :class:`FitResult`, by number or by name."""

    folder: Path
    """Folder of the training, with an SAE folder for each run."""
    runs: tuple[FitResult, ...]
    """What was trained, in the order of the grid."""

    @property
    def path(self) -> Path:
        """SAE folder, where there is one run; :class:`ConfigError` names the runs of a grid."""
        if len(self.runs) > 1:
            raise ConfigError(f"{self.folder} holds {len(self.runs)} SAEs; choose one: {', '.join(self.names())}")
        return self.runs[0].path

    def names(self) -> list[str]:
        """Names of the runs."""
        return [run.name for run in self.runs]

    def load(self, which: int | str = 0, device: str = "cpu") -> "SAE":
        """Load the SAE of a run."""
        from saelab.sae.folder import load_sae

        return load_sae(self[which].path, device)

    def log(self, which: int | str = 0) -> "pd.DataFrame":
        """Return the training log of a run: one row per line of ``training.jsonl``."""
        return read_log(self[which].path / LOG)

    def to_frame(self) -> "pd.DataFrame":
        """One row per run: name, architecture, sizes, and the metrics over the last tenth of the training."""
        import pandas as pd

        keys = ("architecture", "d_sae", "k")
        return pd.DataFrame(
            [
                {"name": r.name, **{k: r.config["sae"][k] for k in keys if k in r.config["sae"]}, "tokens": r.tokens}
                | r.metrics
                for r in self.runs
            ]
        )

    def figures(self) -> "dict[str, tuple[Figure, pd.DataFrame]]":
        """``fvu``, ``l0``, ``dead_fraction`` and ``loss`` against the tokens trained on."""
        from saelab.analysis.figures import training_curves

        logs = {run.name: self.log(run.name) for run in self.runs}
        return {metric: training_curves(logs, metric, title) for metric, title in CURVES.items()}

    def __repr__(self) -> str:
        if len(self.runs) == 1:
            return f"Training({self.runs[0]!r})"
        return f"Training({str(self.folder)!r}: {len(self.runs)} SAEs: {', '.join(self.names())})"

    def __len__(self) -> int:
        return len(self.runs)

    def __iter__(self) -> Iterator[FitResult]:
        return iter(self.runs)

    def __getitem__(self, which: int | str) -> FitResult:  # type: ignore[override]  # names instead of slices
        """Return a run by number or by name."""
        if isinstance(which, str):
            if which not in self.names():
                raise ConfigError(
                    f"no run '{which}'{nearest(which, self.names())} (there are {', '.join(self.names())})"
                )
            return self.runs[self.names().index(which)]
        return self.runs[which]
