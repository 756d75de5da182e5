"""Linear probes: logistic regression in float64, and the scores that the evaluations need."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64

STEPS = 500


@dataclass(frozen=True, eq=False)
class Probe:
    """``p(y = 1 | x) = sigmoid(x . weight + bias)`` in the units of x."""

    weight: Float64[np.ndarray, " d"]
    """Direction."""
    bias: float
    """Offset."""

    def logits(self, x: Any) -> Float64[np.ndarray, " n"]:
        """Log-odds of each row of a dense or SciPy sparse matrix."""
        result: np.ndarray = np.asarray(x @ self.weight, np.float64).ravel() + self.bias
        return result

    def predict(self, x: Any) -> Bool[np.ndarray, " n"]:
        """Whether each row is classed as positive."""
        return self.logits(x) > 0

    def accuracy(self, x: Any, y: Bool[np.ndarray, " n"]) -> float:
        """Share of rows classed rightly."""
        return float((self.predict(x) == y).mean())


def fit_probe(x: Any, y: Bool[np.ndarray, " n"], penalty: float = 1.0) -> Probe:
    """Fit a logistic regression to a dense or SciPy sparse matrix (n, d).

    The matrix is divided by one number, the root mean variance of its columns that vary, so that ``penalty / 2 |w|^2``
    beside the summed loss means the same at every scale; one number for all columns, so that directions of activations
    keep their meaning (dividing each column by its own would turn them). L-BFGS in float64; no randomness.
    """
    from scipy import sparse
    from scipy.optimize import minimize

    y = np.asarray(y, np.float64)
    n, width = x.shape
    if sparse.issparse(x):
        x = x.tocsr().astype(np.float64)
        mean = np.zeros(width)
        variance = np.asarray(x.multiply(x).mean(0)).ravel() - np.asarray(x.mean(0)).ravel() ** 2
    else:
        x = np.asarray(x, np.float64)
        mean, variance = x.mean(0), x.var(0)
    varies = variance > 1e-24
    scale = float(np.sqrt(variance[varies].mean())) if varies.any() else 1.0

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        weight = w[:-1] / scale
        logit = x @ weight - mean @ weight + w[-1]
        value = np.logaddexp(0, logit).sum() - y @ logit + penalty / 2 * (w[:-1] @ w[:-1])
        error = 1 / (1 + np.exp(-np.clip(logit, -500, 500))) - y
        gradient = (np.asarray(x.T @ error).ravel() - mean * error.sum()) / scale + penalty * w[:-1]
        return value / n, np.append(gradient, error.sum()) / n

    found = minimize(loss, np.zeros(width + 1), jac=True, method="L-BFGS-B", options={"maxiter": STEPS}).x
    weight = found[:-1] / scale
    return Probe(weight, float(found[-1] - mean @ weight))


def f1_score(predicted: Bool[np.ndarray, " n"], y: Bool[np.ndarray, " n"]) -> float:
    """Harmonic mean of precision and recall; 0 when nothing is found."""
    right = float((predicted & y).sum())
    return 2 * right / float(predicted.sum() + y.sum()) if right else 0.0


def mean_difference(x: Any, y: Bool[np.ndarray, " n"]) -> Float64[np.ndarray, " d"]:
    """Mean of the positive rows minus that of the negative ones."""
    positive, negative = (np.asarray(x[side].mean(0), np.float64).ravel() for side in (y, ~y))
    result: np.ndarray = positive - negative
    return result


def top_k(scores: np.ndarray, k: int) -> Int64[np.ndarray, " k"]:
    """Places of the k largest scores, the largest first; equals go to the smaller place."""
    return np.argsort(-scores, kind="stable")[:k].astype(np.int64)


def balanced(y: Bool[np.ndarray, " n"], most: int, rng: np.random.Generator) -> Int64[np.ndarray, " m"]:
    """Rows with as many positives as negatives, at most ``most`` in all, in random order."""
    positive, negative = rng.permutation(np.flatnonzero(y)), rng.permutation(np.flatnonzero(~y))
    each = min(len(positive), len(negative), most // 2)
    return rng.permutation(np.concatenate([positive[:each], negative[:each]])).astype(np.int64)
