"""``Comparison``: everything that :func:`saelab.analysis.compare.compare` found."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from saelab import __version__
from saelab.analysis.compare.baseline import Baseline
from saelab.analysis.compare.lasso import OneToMany
from saelab.analysis.compare.matching import Matching
from saelab.analysis.compare.spectral import Cluster, cluster_summary
from saelab.analysis.compare.splitting import Splitting
from saelab.core.errors import ConfigError
from saelab.core.result import Result

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure


@dataclass(frozen=True)
class SideInfo:
    """One of the two dictionaries."""

    name: str
    """What it is called: its folder."""
    n_features: int
    """Features."""
    dead: int | None
    """Features that never fire (or never vary) on the tokens compared; None where no activations were compared."""
    space: str
    """What its decoder writes into: model fingerprint and site, empty when not said."""


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(Result):
    """Correspondences between the features of A and of B. Parts that were not computed are None (see ``skipped``)."""

    a: SideInfo
    """The first dictionary."""
    b: SideInfo
    """The second one."""
    decoders: Matching | None
    """Matching by decoder cosine; its mean best similarities are the MMCS of both directions."""
    decoder_baseline: Baseline | None
    """What random unit vectors give."""
    activations: Matching | None
    """Matching by correlation of activations on the same tokens."""
    activation_baseline: Baseline | None
    """What the same activations give when the tokens of B are shuffled."""
    pairs: dict[str, np.ndarray]
    """Of each pair matched by activation: ``either`` (correlation over the tokens where one of them is active),
    ``jaccard`` of their supports, and ``cosine`` of their decoder rows where these share a space."""
    b_from_a: OneToMany | None
    """Features of B predicted from all of A (LASSO)."""
    a_from_b: OneToMany | None
    """Features of A predicted from all of B."""
    clusters: tuple[Cluster, ...] | None
    """Groups of features of both sides (spectral clustering of |correlation|)."""
    splitting: Splitting | None
    """Split features of the smaller SAE, novel ones of the larger."""
    n_tokens: int
    """Tokens whose activations were compared; 0 without."""
    text: str
    """Where they come from."""
    seed: int
    """Seed of everything random in it."""
    settings: dict[str, Any]
    """Thresholds and sizes that were used."""
    skipped: tuple[str, ...]
    """What was left out, and why."""
    saelab_version: str = __version__
    """Version that made it."""

    def to_dict(self) -> dict[str, Any]:
        """All summaries as plain values; the per-feature arrays are in :meth:`to_frame` and in the saved folder."""
        result: dict[str, Any] = {
            "a": dataclasses.asdict(self.a),
            "b": dataclasses.asdict(self.b),
            "n_tokens": self.n_tokens,
            "text": self.text,
            "seed": self.seed,
            "settings": self.settings,
            "skipped": list(self.skipped),
            "saelab_version": self.saelab_version,
        }
        for name in ("decoders", "activations", "b_from_a", "a_from_b", "splitting"):
            part = getattr(self, name)
            result[name] = None if part is None else part.summary()
        for name in ("decoder_baseline", "activation_baseline"):
            part = getattr(self, name)
            result[name] = None if part is None else part.to_dict()
        result["clusters"] = None if self.clusters is None else cluster_summary(list(self.clusters))
        result["pairs"] = {name: _mean(values) for name, values in self.pairs.items()}
        return result

    def to_frame(self, side: str = "a") -> "pd.DataFrame":
        """One row per feature of a side: its best and its one-to-one partner, by decoder and by activation."""
        import pandas as pd

        if side not in ("a", "b"):
            raise ConfigError(f"side is '{side}', expected 'a' or 'b'")
        n = (self.a if side == "a" else self.b).n_features
        frame = pd.DataFrame(index=pd.RangeIndex(n, name="feature"))
        for name, found in (("decoder", self.decoders), ("activation", self.activations)):
            if found is None:
                continue
            here, there = (found.pair_a, found.pair_b) if side == "a" else (found.pair_b, found.pair_a)
            frame[f"{name}_best"] = found.best_b if side == "a" else found.best_a
            frame[f"{name}_best_value"] = found.best_b_value if side == "a" else found.best_a_value
            partner, value = np.full(n, -1, np.int64), np.full(n, np.nan)
            partner[here], value[here] = there, found.pair_value
            frame[f"{name}_match"], frame[f"{name}_match_value"] = partner, value
            if name == "activation":
                for column, values in self.pairs.items():
                    frame[f"match_{column}"] = np.nan
                    frame.loc[here, f"match_{column}"] = values
        if self.clusters is not None:
            label = np.full(n, -1, np.int64)
            for number, cluster in enumerate(self.clusters):
                label[cluster.a if side == "a" else cluster.b] = number
            frame["cluster"] = label
        if self.splitting is not None:
            if self.splitting.small == side:
                frame["group_size"] = [len(group) for group in self.splitting.groups]
                frame["split"] = self.splitting.split
            else:
                frame["novel"] = self.splitting.novel
        return frame

    def figures(self) -> "dict[str, tuple[Figure, pd.DataFrame]]":
        """Matching curves beside chance, cosine against correlation, LASSO, clusters, novel features."""
        from saelab.analysis.compare.figures import figures

        return figures(self)

    def __repr__(self) -> str:
        parts = [f"{self.a.name} ({self.a.n_features}) and {self.b.name} ({self.b.n_features})"]
        for name, found in (("decoder cosine", self.decoders), ("correlation", self.activations)):
            if found is not None:
                parts.append(f"matched {name} {found.summary()['mean_matched']:.3f}")
        return f"Comparison({', '.join(parts)}, {self.n_tokens} tokens)"


def _mean(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else float("nan")
