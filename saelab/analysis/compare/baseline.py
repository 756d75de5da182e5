"""What similarities chance gives: random unit vectors, and activations whose tokens were shuffled.

Both controls keep the sizes (and, for activations, each feature's own values) and destroy every correspondence.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from saelab.analysis.compare.codes import CodeMatrix
from saelab.analysis.compare.matching import _mean, match
from saelab.analysis.compare.similarity import Correlation, Cosine, Similarity, tile_rows

SAMPLE = 512
"""Features whose best chance partner is looked for where the whole matching would cost too much."""


@dataclass(frozen=True)
class Baseline:
    """Means that chance gives, beside those of a :class:`~saelab.analysis.compare.matching.Matching`."""

    mean_best_a_to_b: float
    """Mean best similarity of a feature of A."""
    mean_best_b_to_a: float
    """Mean best similarity of a feature of B."""
    mean_matched: float | None
    """Mean similarity in the one-to-one matching; None where that was not computed (too many features)."""
    bound: float | None = None
    """``sqrt(2 ln n_b / d)``, the upper approximation of the expected best cosine of random unit vectors."""
    what: str = ""
    """What was randomised."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dict(vars(self))


def random_decoders(live_a: int, live_b: int, d: int, rng: np.random.Generator, *, exact_up_to: int) -> Baseline:
    """Return what random unit vectors of the same numbers and width give."""
    a = rng.standard_normal((live_a, d), np.float32)
    b = rng.standard_normal((live_b, d), np.float32)
    bound = math.sqrt(2 * math.log(max(live_b, 1)) / d)
    return _measure(Cosine(a, b), Cosine(b, a), rng, exact_up_to=exact_up_to, bound=bound, what="random unit vectors")


def shuffled_tokens(a: CodeMatrix, b: CodeMatrix, rng: np.random.Generator, *, exact_up_to: int) -> Baseline:
    """Return what the same activations give when the tokens of B are in random order."""
    shuffled = b.permuted(rng.permutation(b.n_tokens))
    forward, backward = Correlation(a, shuffled), Correlation(shuffled, a)
    return _measure(forward, backward, rng, exact_up_to=exact_up_to, bound=None, what="shuffled tokens")


def _measure(
    forward: Similarity,
    backward: Similarity,
    rng: np.random.Generator,
    *,
    exact_up_to: int,
    bound: float | None,
    what: str,
) -> Baseline:
    if max(forward.shape) <= exact_up_to:
        found = match(forward, exact_up_to=exact_up_to)
        matched: float | None = _mean(found.pair_value)
        return Baseline(_mean(found.best_b_value), _mean(found.best_a_value), matched, bound, what)
    return Baseline(_best(forward, rng), _best(backward, rng), None, bound, what)


def _best(similarity: Similarity, rng: np.random.Generator) -> float:
    """Mean best similarity of a sample of rows."""
    rows = np.sort(rng.permutation(similarity.shape[0])[:SAMPLE])
    best = []
    for part in tile_rows((len(rows), similarity.shape[1])):
        tile = similarity.tile(rows[part])
        tile[np.isnan(tile)] = -np.inf
        best.append(tile.max(1))
    return _mean(np.concatenate(best))
