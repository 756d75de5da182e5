"""``CodeMatrix``: the codes of one SAE on many tokens as one sparse matrix, and its moments."""

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64
from scipy import sparse

from saelab.core.code import SparseCode
from saelab.core.errors import ActivationError

CONSTANT = 1e-12
"""A feature whose variance is below this share of its mean square counts as constant: it has no correlation."""


class CodeMatrix:
    """Codes of T tokens over n features: a sparse (T, n) matrix in float64 and the moments of its columns.

    Everything a comparison needs of activations are sums of products of columns, so the dense matrix is never made.
    12 bytes for each entry: a million tokens with 32 features each take 0.4 GB.
    """

    def __init__(self, matrix: Any) -> None:
        """Take any SciPy sparse (T, n) matrix; entries that are 0 are dropped. NaN is an ``ActivationError``."""
        self.columns = sparse.csc_matrix(matrix, dtype=np.float64)
        """The matrix by feature."""
        self.columns.sum_duplicates()
        self.columns.eliminate_zeros()
        if not np.isfinite(self.columns.data).all():
            raise ActivationError("codes hold NaN or infinity; the SAE's weights or the activations are broken")

    @staticmethod
    def from_codes(codes: Iterable[SparseCode]) -> "CodeMatrix":
        """Stack the codes of consecutive batches of tokens; entries that are not positive are dropped."""
        parts = []
        for code in codes:
            kept = code.detach().positive()
            arrays = (kept.values.cpu().numpy(), kept.indices.cpu().numpy(), kept.offsets.cpu().numpy())
            parts.append(sparse.csr_matrix(arrays, shape=(kept.n_tokens, kept.d_sae)))
        assert parts, "no codes"
        return CodeMatrix(sparse.vstack(parts, format="csc"))

    @cached_property
    def rows(self) -> Any:
        """The matrix by token (CSR)."""
        return self.columns.tocsr()

    @property
    def n_tokens(self) -> int:
        """Number of tokens T."""
        return int(self.columns.shape[0])

    @property
    def n_features(self) -> int:
        """Number of features n."""
        return int(self.columns.shape[1])

    @cached_property
    def counts(self) -> Int64[np.ndarray, " n"]:
        """Tokens on which each feature is active."""
        counts: np.ndarray = np.diff(self.columns.indptr).astype(np.int64)
        return counts

    @cached_property
    def mean(self) -> Float64[np.ndarray, " n"]:
        """Mean activation of each feature over all tokens."""
        mean: np.ndarray = np.asarray(self.columns.sum(0), np.float64).ravel() / self.n_tokens
        return mean

    @cached_property
    def std(self) -> Float64[np.ndarray, " n"]:
        """Standard deviation of each feature; 0 for one that is constant (or never active)."""
        square = np.asarray(self.columns.multiply(self.columns).sum(0), np.float64).ravel() / self.n_tokens
        variance = square - self.mean**2
        std: np.ndarray = np.sqrt(np.where(variance > CONSTANT * square, variance, 0.0))
        return std

    @cached_property
    def varies(self) -> np.ndarray:
        """Whether each feature varies, so that it has correlations."""
        return self.std > 0

    def permuted(self, order: Int64[np.ndarray, " t"]) -> "CodeMatrix":
        """Return the same codes with the tokens in another order."""
        return CodeMatrix(self.rows[order])


def covariance(a: CodeMatrix, of: np.ndarray, b: CodeMatrix) -> Float64[np.ndarray, "m n"]:
    """Covariances of the features ``of`` of A with all of B, dense (m, n)."""
    product = (a.columns[:, of].T.tocsr() @ b.rows).toarray()
    product /= a.n_tokens
    product -= np.outer(a.mean[of], b.mean)
    result: np.ndarray = product
    return result


def correlation(a: CodeMatrix, of: np.ndarray, b: CodeMatrix) -> Float64[np.ndarray, "m n"]:
    """Pearson correlations of the features ``of`` of A with all of B; NaN where a feature does not vary."""
    result = covariance(a, of, b)
    with np.errstate(divide="ignore", invalid="ignore"):
        result /= a.std[of, None]
        result /= b.std
    result[~a.varies[of]] = np.nan
    result[:, ~b.varies] = np.nan
    return result


def pair_statistics(
    a: CodeMatrix, of_a: np.ndarray, b: CodeMatrix, of_b: np.ndarray, block: int = 2048
) -> dict[str, Float64[np.ndarray, " pairs"]]:
    """Return ``correlation``, ``either`` and ``jaccard`` of pairs of features (of_a[k], of_b[k]).

    ``either`` is the correlation over the tokens on which at least one of the two is active: that of sparse features
    over all tokens is dominated by their common zeros. ``jaccard`` is |both active| / |at least one active|.
    """
    columns: dict[str, list[np.ndarray]] = {"correlation": [], "either": [], "jaccard": []}
    for start in range(0, len(of_a), block):
        i, j = of_a[start : start + block], of_b[start : start + block]
        product = a.columns[:, i].multiply(b.columns[:, j]).tocsc()
        cross = np.asarray(product.sum(0), np.float64).ravel()
        both = np.diff(product.indptr).astype(np.float64)
        either = a.counts[i] + b.counts[j] - both
        sums = (a.mean[i] * a.n_tokens, b.mean[j] * b.n_tokens)
        squares = tuple((x.std[f] ** 2 + x.mean[f] ** 2) * x.n_tokens for x, f in ((a, i), (b, j)))
        columns["correlation"].append(_pearson(cross, sums, squares, np.full(len(i), float(a.n_tokens))))
        columns["either"].append(_pearson(cross, sums, squares, either))
        with np.errstate(divide="ignore", invalid="ignore"):
            columns["jaccard"].append(both / either)
    return {name: np.concatenate(parts) if parts else np.zeros(0) for name, parts in columns.items()}


def _pearson(cross: np.ndarray, sums: tuple[Any, ...], squares: tuple[Any, ...], n: np.ndarray) -> np.ndarray:
    """Correlation from sums over n tokens; NaN where one of the two is constant on them."""
    with np.errstate(divide="ignore", invalid="ignore"):
        top = cross - sums[0] * sums[1] / n
        left, right = (q - s**2 / n for s, q in zip(sums, squares, strict=True))
        value = top / np.sqrt(left * right)
        constant = (left <= CONSTANT * squares[0]) | (right <= CONSTANT * squares[1])
    result: np.ndarray = np.where(constant, np.nan, np.clip(value, -1, 1))
    return result
