r"""One-to-many: the number of features of one SAE that it takes to predict one feature of the other.

For each target b, with all features standardised over T tokens,

    min_w  1/(2 T) ||b - A w||^2 + lambda ||w||_1   =   min_w  1/2 - c.w + 1/2 w.G w + lambda ||w||_1

where ``G`` is the correlation matrix of the predictors and ``c`` their correlations with the target: the data enter
through correlations only. Coordinate descent runs over a few candidates for a batch of targets at once; candidates
that the solution lacks (those that break the optimality condition ``|c - G w| <= lambda`` among *all* predictors) are
added until none is left, so the solution is the one over all predictors. Li et al. 2015, arXiv:1511.07543, section 4.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int64
from scipy import sparse

from saelab.analysis.compare.codes import CodeMatrix, correlation, covariance
from saelab.analysis.compare.similarity import tile_rows

LAMBDAS = (0.3, 0.1, 0.03, 0.01, 0.003)
BATCH = 64
FIRST, MORE, ROUNDS = 32, 16, 3
SWEEPS, TOLERANCE = 200, 1e-5
KEPT = 8
MOST_PREDICTORS = 20_000
"""Predictors whose correlation matrix (4 bytes for each pair) is held in memory; with more, LASSO is left out."""


@dataclass(frozen=True, eq=False)
class OneToMany:
    """Sparse prediction of some targets from all features of the other SAE."""

    targets: Int64[np.ndarray, " t"]
    """The predicted features."""
    lambdas: tuple[float, ...]
    """Penalties, falling."""
    r2: Float64[np.ndarray, "t l"]
    """Share of each target's variance that is predicted, for each penalty."""
    nonzero: Int64[np.ndarray, "t l"]
    """Number of predictors used."""
    best_single: Float64[np.ndarray, " t"]
    """Share of variance that the single best predictor gives (its squared correlation)."""
    needed: Int64[np.ndarray, " t"]
    """Fewest predictors, along the penalties, that reach 90 % of what the smallest penalty reaches."""
    predictors: Int64[np.ndarray, "t 8"]
    """The strongest predictors (by weight in standard units) at that penalty; -1 beyond the last."""
    weights: Float64[np.ndarray, "t 8"]
    """Their weights in raw units (activation of the target per activation of the predictor)."""
    violations: int
    """Predictors left out against the optimality condition when the rounds ran out (0: all solutions are exact)."""

    def summary(self) -> dict[str, Any]:
        """Means over the targets, for each penalty."""
        single = _median(self.best_single)
        path = [
            {
                "lambda": value,
                "r2_mean": float(self.r2[:, k].mean()),
                "r2_median": _median(self.r2[:, k]),
                "nonzero_mean": float(self.nonzero[:, k].mean()),
            }
            for k, value in enumerate(self.lambdas)
        ]
        shares = {str(n): float((self.needed == n).mean()) for n in (1, 2, 3)}
        shares["more"] = float((self.needed > 3).mean())
        return {
            "targets": len(self.targets),
            "best_single_r2_mean": float(self.best_single.mean()),
            "best_single_r2_median": single,
            "path": path,
            "needed": shares,
            "violations": self.violations,
        }


def one_to_many(
    predictors: CodeMatrix,
    targets: CodeMatrix,
    of: Int64[np.ndarray, " t"],
    *,
    lambdas: tuple[float, ...] = LAMBDAS,
) -> OneToMany:
    """Predict the features ``of`` (all of them varying) of ``targets`` from all features of ``predictors``.

    Holds the predictors' correlation matrix in float32: 1 GB for 16,384 of them.
    """
    lambdas = tuple(sorted(lambdas, reverse=True))
    gram = _correlations(predictors)
    groups = [of[start : start + BATCH] for start in range(0, len(of), BATCH)]
    parts = [_Batch(predictors, targets, group, gram).run(lambdas) for group in groups]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0] if name != "violations"}
    return OneToMany(targets=of, lambdas=lambdas, violations=sum(int(part["violations"]) for part in parts), **columns)


def _correlations(a: CodeMatrix) -> Float32[np.ndarray, "n n"]:
    """Correlations within A: 0 with a feature that does not vary, 1 on the diagonal."""
    gram = np.zeros((a.n_features, a.n_features), np.float32)
    for of in tile_rows(gram.shape):
        gram[of] = np.nan_to_num(correlation(a, of, a))
    np.fill_diagonal(gram, 1.0)
    return gram


class _Batch:
    """Some targets, each with its own candidates among the predictors."""

    def __init__(self, a: CodeMatrix, b: CodeMatrix, of: np.ndarray, gram: np.ndarray) -> None:
        self.a, self.b, self.of, self.gram = a, b, of, gram
        cross = covariance(b, of, a)  # (t, n_a)
        with np.errstate(divide="ignore", invalid="ignore"):
            cross /= b.std[of, None] * a.std
        cross[:, ~a.varies] = 0.0
        self.c_all = cross
        m = min(FIRST, a.n_features)
        order = np.argpartition(-np.abs(cross), m - 1, axis=1)[:, :m]
        self.candidates: np.ndarray = np.sort(order, axis=1)
        self.w: np.ndarray = np.zeros(self.candidates.shape)
        self._gather()

    def _gather(self) -> None:
        """Correlations of each target's candidates with the target and with one another."""
        self.g = self.gram[self.candidates[:, :, None], self.candidates[:, None, :]].astype(np.float64)
        self.c = np.take_along_axis(self.c_all, self.candidates, 1)

    def run(self, lambdas: tuple[float, ...]) -> dict[str, Any]:
        """Solve along the penalties, each from the last solution."""
        t = len(self.of)
        r2, nonzero = np.zeros((t, len(lambdas))), np.zeros((t, len(lambdas)), np.int64)
        solutions, violations = [], 0
        for k, penalty in enumerate(lambdas):
            for round_ in range(ROUNDS + 1):
                self._descend(penalty)
                missing = self._missing(penalty)
                if not missing.any():
                    break
                if round_ < ROUNDS:
                    self._extend(missing)
            violations += int((missing > 0).sum())
            r2[:, k] = 2 * (self.c * self.w).sum(1) - np.einsum("ti,tij,tj->t", self.w, self.g, self.w)
            nonzero[:, k] = (self.w != 0).sum(1)
            solutions.append((self.candidates.copy(), self.w.copy()))
        good = r2 >= 0.9 * r2[:, -1:]
        chosen = good.argmax(1)
        needed = np.where(r2[:, -1] > 0, nonzero[np.arange(t), chosen], 0)
        names, weights = self._strongest(solutions, chosen)
        return {
            "r2": r2,
            "nonzero": nonzero,
            "best_single": (self.c_all**2).max(1),
            "needed": needed,
            "predictors": names,
            "weights": weights,
            "violations": violations,
        }

    def _descend(self, penalty: float) -> None:
        """Coordinate descent, all targets at once."""
        gradient = self.c - np.einsum("tij,tj->ti", self.g, self.w)
        for _ in range(SWEEPS):
            largest = 0.0
            for j in range(self.w.shape[1]):
                old = self.w[:, j]
                wish = gradient[:, j] + old
                new = np.sign(wish) * np.maximum(np.abs(wish) - penalty, 0.0)
                step = new - old
                size = float(np.abs(step).max())
                if size:
                    gradient -= self.g[:, :, j] * step[:, None]
                    self.w[:, j] = new
                    largest = max(largest, size)
            if largest < TOLERANCE:
                break

    def _missing(self, penalty: float) -> np.ndarray:
        """By how much each predictor outside the candidates breaks the optimality condition; (t, n_a), 0 where not."""
        t, m = self.w.shape
        weights = sparse.csr_matrix(
            (self.w.flatten(), self.candidates.flatten(), np.arange(0, t * m + 1, m)), shape=(t, self.a.n_features)
        )
        weights.eliminate_zeros()
        # In float32 like the matrix: in float64 SciPy would make a copy of it, 2 GB at 16,384 features.
        product = weights.astype(np.float32) @ self.gram  # (t, n_a), dense
        excess = np.abs(self.c_all - product) - penalty - 1e-3 * penalty - 1e-4
        np.put_along_axis(excess, self.candidates, 0.0, 1)
        result: np.ndarray = np.maximum(excess, 0.0)
        return result

    def _extend(self, missing: np.ndarray) -> None:
        """Add the worst-missed predictors of each target to its candidates."""
        more = min(MORE, missing.shape[1] - self.candidates.shape[1])
        masked = missing.copy()
        np.put_along_axis(masked, self.candidates, -1.0, 1)
        added = np.argpartition(-masked, more - 1, axis=1)[:, :more]
        self.candidates = np.concatenate([self.candidates, added], 1)
        self.w = np.concatenate([self.w, np.zeros_like(added, np.float64)], 1)
        self._gather()

    def _strongest(
        self, solutions: list[tuple[np.ndarray, np.ndarray]], chosen: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        names = np.full((len(self.of), KEPT), -1, np.int64)
        weights = np.zeros((len(self.of), KEPT))
        for row, k in enumerate(chosen.tolist()):
            candidates, w = solutions[k][0][row], solutions[k][1][row]
            order = np.argsort(-np.abs(w), kind="stable")[:KEPT]
            order = order[w[order] != 0]
            names[row, : len(order)] = candidates[order]
            weights[row, : len(order)] = w[order] * self.b.std[self.of[row]] / self.a.std[candidates[order]]
        return names, weights


def _median(values: np.ndarray) -> float:
    return float(np.median(values)) if len(values) else float("nan")
