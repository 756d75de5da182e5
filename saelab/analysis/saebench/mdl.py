"""Minimum description length: bits per token that the code costs when its values are quantised.

For each feature, whether it is on costs ``H_b(p)`` bits, and its value, when it is on, ``H(bin | on)``; the sum over
features is bits per token (Ayonrinde et al. 2024, arXiv:2410.11179). Bins are equally wide from 0 to the feature's
maximum, as many for every feature. A number of bins is accepted when quantising to the middle of the bins raises the
FVU by at most 0.01; the headline is the least cost among the accepted ones. (SAEBench's code bins the zeros as well,
which counts the off state twice; here the value's entropy is over tokens where the feature is on.)
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saelab.analysis.reconstruction import Reconstruction
from saelab.analysis.saebench.result import EvalResult, Metrics
from saelab.core.code import SparseCode
from saelab.features.protocols import Dictionary

EVAL = "mdl"
BINS = (4, 6, 8, 12, 16, 32)
TOLERANCE = 0.01


def quantise(code: SparseCode, bins: int) -> tuple[SparseCode, np.ndarray]:
    """Return the code with values at the middle of their bins, and the bin of each entry. Entries must be positive."""
    top = torch.zeros(code.d_sae, dtype=code.values.dtype).scatter_reduce(0, code.indices, code.values, "amax")
    width = top[code.indices] / bins
    number = (code.values / width).ceil().clamp(1, bins) - 1
    return SparseCode(code.indices, (number + 0.5) * width, code.offsets, code.d_sae), number.long().numpy()


def description_length(code: SparseCode, bins: int) -> float:
    """Bits per token of a code whose entries are positive."""
    _, number = quantise(code, bins)
    feature = code.indices.numpy()
    counts = np.bincount(feature * bins + number, minlength=code.d_sae * bins).reshape(code.d_sae, bins)
    on = counts.sum(1)
    p = on / code.n_tokens
    value = _entropy(counts / np.maximum(on, 1)[:, None]).sum(1)
    return float((_entropy(p) + _entropy(1 - p) + p * value).sum())


def mdl(x: Float[Tensor, "n d"], dictionaries: Mapping[str, Dictionary], codes: Mapping[str, SparseCode]) -> EvalResult:
    """Measure the codes of the same n tokens under every dictionary."""
    config = {"num_bins_values": list(BINS), "fvu_tolerance": TOLERANCE, "n_tokens": len(x)}
    metrics: dict[str, Metrics] = {}
    details: list[dict[str, Any]] = []
    for name, dictionary in dictionaries.items():
        rows = _bin_counts(x, dictionary, codes[name].positive())
        accepted = [row for row in rows if row["within_threshold"]] or [rows[-1]]
        best = min(accepted, key=lambda row: row["description_length"])
        metrics[name] = {
            "mdl": {
                "description_length": best["description_length"],
                "bits_per_active_feature": best["description_length"] / max(best["l0"], 1e-12),
                "num_bins": float(best["num_bins"]),
                "fvu_quantised": best["fvu_quantised"],
            }
        }
        if name == "sae":
            details = rows
    ours = metrics.pop("sae")
    better = {"description_length": "lower", "fvu_quantised": "lower"}
    return EvalResult(EVAL, config, ours, details, controls=metrics, better=better)  # type: ignore[arg-type]


def _bin_counts(x: Tensor, dictionary: Dictionary, code: SparseCode) -> list[dict[str, Any]]:
    plain = _fvu(x, dictionary, code)
    rows = []
    for bins in BINS:
        fvu = _fvu(x, dictionary, quantise(code, bins)[0])
        row = {
            "num_bins": bins,
            "description_length": description_length(code, bins),
            "fvu": plain,
            "fvu_quantised": fvu,
        }
        rows.append({**row, "l0": code.nnz / code.n_tokens, "within_threshold": bool(fvu <= plain + TOLERANCE)})
    return rows


def _fvu(x: Tensor, dictionary: Dictionary, code: SparseCode) -> float:
    total = Reconstruction(x.mean(0))
    total.update(x, dictionary.decode(code).cpu())
    return total.result().fvu


def _entropy(p: np.ndarray) -> np.ndarray:
    """``-p log2 p``, 0 at 0."""
    result: np.ndarray = -p * np.log2(np.where(p > 0, p, 1.0))
    return result
