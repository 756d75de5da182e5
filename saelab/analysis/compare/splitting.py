"""Feature splitting and novel features, from a smaller SAE to a larger one in the same space.

A feature of the small SAE is *split* when several features of the large one write in its direction (decoder cosine
over ``threshold``) and their activations, weighted to fit, reproduce its own better than the best of them alone. A
feature of the large SAE is *novel* when no feature of the small one writes in its direction: its largest cosine is
below ``threshold`` (Leask et al. 2025, arXiv:2502.04878, use 0.7 to tell the two apart).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64

from saelab.analysis.compare.codes import CodeMatrix, pair_statistics
from saelab.analysis.compare.similarity import Cosine, tile_rows

THRESHOLD, GAIN = 0.7, 0.05


@dataclass(frozen=True, eq=False)
class Splitting:
    """Which features of the small SAE are split, and which of the large one are new."""

    small: str
    """``a`` or ``b``: the side with fewer features."""
    threshold: float
    """Decoder cosine over which two features count as one direction."""
    groups: tuple[Int64[np.ndarray, " _"], ...]
    """For each feature of the small SAE, the large SAE's features over the threshold, the closest first."""
    r2_single: Float64[np.ndarray, " n_small"]
    """Share of its activation's variance that the best one of the group explains (NaN without activations or group)."""
    r2_group: Float64[np.ndarray, " n_small"]
    """Share that the whole group, weighted to fit, explains."""
    split: Bool[np.ndarray, " n_small"]
    """Two or more in the group, and the group explains at least 0.05 more than its best member (by activations,
    where there are any; otherwise by the number alone)."""
    largest_cosine: Float64[np.ndarray, " n_large"]
    """Largest cosine of each large-SAE feature with the small SAE (NaN for a dead one)."""

    @property
    def novel(self) -> Bool[np.ndarray, " n_large"]:
        """Whether each large-SAE feature has no counterpart in the small SAE; False for dead ones."""
        return self.largest_cosine < self.threshold

    def summary(self) -> dict[str, Any]:
        """Counts, and the share of novel features at several thresholds."""
        live = self.largest_cosine[np.isfinite(self.largest_cosine)]
        sizes = np.array([len(group) for group in self.groups])
        several = sizes > 1
        return {
            "small": self.small,
            "threshold": self.threshold,
            "with_one": int((sizes == 1).sum()),
            "with_several": int(several.sum()),
            "with_none": int((sizes == 0).sum()),
            "split": int(self.split.sum()),
            "r2_single_of_several": _mean(self.r2_single[several]),
            "r2_group_of_several": _mean(self.r2_group[several]),
            "novel": int(self.novel.sum()),
            "novel_share": float((live < self.threshold).mean()) if len(live) else float("nan"),
            "novel_share_below": {str(t): float((live < t).mean()) for t in (0.3, 0.5, 0.7, 0.9)} if len(live) else {},
        }


def splitting(
    small: np.ndarray,
    large: np.ndarray,
    *,
    name: str,
    codes: tuple[CodeMatrix, CodeMatrix] | None = None,
    threshold: float = THRESHOLD,
) -> Splitting:
    """Compare decoders (n_small, d) and (n_large, d); ``codes`` are the activations of both on the same tokens."""
    live = (codes[0].varies, codes[1].varies) if codes else (None, None)
    cosine = Cosine(small, large, *live)
    n_small, n_large = cosine.shape
    groups: list[np.ndarray] = []
    largest = np.full(n_large, -np.inf)
    single, group_r2 = np.full(n_small, np.nan), np.full(n_small, np.nan)
    for of in tile_rows((n_small, n_large)):
        tile = cosine.tile(of).astype(np.float64)
        largest = np.fmax(largest, np.nan_to_num(tile, nan=-np.inf).max(0))
        for row, feature in enumerate(of.tolist()):
            near = np.flatnonzero(tile[row] > threshold)
            near = near[np.argsort(-tile[row, near], kind="stable")].astype(np.int64)
            groups.append(near)
            if codes is not None and len(near) > 1:
                single[feature], group_r2[feature] = _fit(*codes, feature, near)
    if codes is not None:  # groups of one, all at once
        alone = np.array([feature for feature, group in enumerate(groups) if len(group) == 1], np.int64)
        partner = np.array([groups[feature][0] for feature in alone], np.int64)
        single[alone] = group_r2[alone] = pair_statistics(codes[0], alone, codes[1], partner)["correlation"] ** 2
    sizes = np.array([len(group) for group in groups])
    split = (sizes > 1) & (group_r2 >= single + GAIN if codes is not None else sizes > 1)
    largest[~np.isfinite(largest)] = np.nan
    return Splitting(name, threshold, tuple(groups), single, group_r2, split, largest)


def _fit(small: CodeMatrix, large: CodeMatrix, feature: int, group: np.ndarray) -> tuple[float, float]:
    """Share of a feature's variance that the best of a group, and the whole group by least squares, explains."""
    n = small.n_tokens
    columns = large.columns[:, group]
    gram = (columns.T @ columns).toarray() / n - np.outer(large.mean[group], large.mean[group])
    cross = (columns.T @ small.columns[:, [feature]]).toarray()[:, 0] / n - large.mean[group] * small.mean[feature]
    variance = small.std[feature] ** 2
    alone = float((cross**2 / np.diag(gram)).max() / variance)
    weights = np.linalg.lstsq(gram, cross, rcond=1e-10)[0]
    return alone, float(cross @ weights / variance)


def _mean(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else float("nan")
