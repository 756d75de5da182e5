"""Baselines for the prediction of error norms: one number per token, or which token it is."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float, Int64


def baseline_r2(
    target: Float[np.ndarray, " n"],
    predictors: Mapping[str, Float[np.ndarray, " n"]],
    token_id: Int64[np.ndarray, " n"],
    fit: Bool[np.ndarray, " n"],
) -> dict[str, float]:
    """R2 on the test tokens of ``target`` predicted from each predictor alone (straight line) and from token identity.

    Token identity predicts the mean of that token over the fit, the overall mean for a token not seen there. A
    predictor is nan at tokens where it is not defined (the loss at the last token of a context): those are left out of
    its fit and its R2.
    """
    result = {"token": _token_r2(target, token_id, fit)}
    for name, values in predictors.items():
        known = np.isfinite(values)
        result[name] = line_r2(target, values, fit & known, ~fit & known)
    return result


def line_r2(
    target: Float[np.ndarray, " n"],
    predictors: Float[np.ndarray, " n"] | Float[np.ndarray, "n p"],
    fit: Bool[np.ndarray, " n"],
    test: Bool[np.ndarray, " n"],
) -> float:
    """R2 on ``test`` of ``target ~ [predictors, 1]`` fitted on ``fit``; nan when there is nothing to explain."""
    x = np.asarray(predictors, np.float64).reshape(len(target), -1)
    y = np.asarray(target, np.float64)
    if not fit.any() or not test.any():
        return float("nan")
    mean, spread = x[fit].mean(0), x[fit].std(0)
    scaled = (x - mean) / np.where(spread > 0, spread, 1.0)
    design = np.concatenate([scaled, np.ones((len(y), 1))], 1)
    weights = np.linalg.lstsq(design[fit], y[fit], rcond=None)[0]
    return _r2(y[test], design[test] @ weights)


def _token_r2(target: Float[np.ndarray, " n"], token_id: Int64[np.ndarray, " n"], fit: Bool[np.ndarray, " n"]) -> float:
    y = np.asarray(target, np.float64)
    size = int(token_id.max()) + 1
    count = np.bincount(token_id[fit], minlength=size)
    total = np.bincount(token_id[fit], weights=y[fit], minlength=size)
    mean = np.where(count > 0, total / np.maximum(count, 1), y[fit].mean())
    return _r2(y[~fit], mean[token_id[~fit]])


def _r2(y: Float[np.ndarray, " n"], predicted: Float[np.ndarray, " n"]) -> float:
    spread = float(np.square(y - y.mean()).sum())
    return 1 - float(np.square(y - predicted).sum()) / spread if spread > 0 else float("nan")
