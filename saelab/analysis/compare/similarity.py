"""Similarities between all features of A and all of B, tile by tile."""

from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from saelab.analysis.compare.codes import CodeMatrix, correlation

TILE_BYTES = 64 << 20
"""Tiles are cut so that one stays below this."""


@runtime_checkable
@runtime_checkable
class Similarity(Protocol):
    """An (n_a, n_b) matrix of similarities that is computed when asked for, rows at a time."""

    @property
    def shape(self) -> tuple[int, int]:
        """(n_a, n_b)."""

    def tile(self, of: np.ndarray) -> np.ndarray:
        """Rows ``of``, dense (len(of), n_b); NaN where a feature has no similarity (dead, constant)."""


class Cosine:
    """Cosine between rows of two decoders, in the space they share."""

    def __init__(
        self,
        a: Float[np.ndarray, "n_a d"],
        b: Float[np.ndarray, "n_b d"],
        live_a: np.ndarray | None = None,
        live_b: np.ndarray | None = None,
    ) -> None:
        """Normalise the rows; those that are zero or not ``live`` get NaN."""
        self._a, self._b = unit_rows(a, live_a), unit_rows(b, live_b)

    @property
    def shape(self) -> tuple[int, int]:
        """(n_a, n_b)."""
        return len(self._a), len(self._b)

    def tile(self, of: np.ndarray) -> np.ndarray:
        """Cosines of the rows ``of`` with all of B."""
        result: np.ndarray = self._a[of] @ self._b.T
        return result


class Correlation:
    """Pearson correlation between activations on the same tokens."""

    def __init__(self, a: CodeMatrix, b: CodeMatrix) -> None:
        self.a, self.b = a, b

    @property
    def shape(self) -> tuple[int, int]:
        """(n_a, n_b)."""
        return self.a.n_features, self.b.n_features

    def tile(self, of: np.ndarray) -> np.ndarray:
        """Correlations of the features ``of`` of A with all of B."""
        return correlation(self.a, of, self.b)


def unit_rows(matrix: np.ndarray, live: np.ndarray | None = None) -> Float[np.ndarray, "n d"]:
    """Rows at norm 1; NaN in rows that are zero or not ``live``."""
    matrix = np.asarray(matrix, np.float32)
    norm = np.linalg.norm(matrix, axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        unit: np.ndarray = matrix / norm
    unit[norm[:, 0] == 0] = np.nan
    if live is not None:
        unit[~live] = np.nan
    return unit


def tile_rows(shape: tuple[int, int]) -> list[np.ndarray]:
    """Row numbers of the tiles of a similarity of this shape."""
    step = max(1, TILE_BYTES // (8 * max(1, shape[1])))
    return [np.arange(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]
