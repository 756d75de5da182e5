"""Core: what the reconstruction keeps, how sparse the code is, and how the features are spread.

The numbers of the running model are those of :func:`saelab.analysis.evaluate.evaluate`; ``explained_variance`` is about
the mean of the same tokens (SAEBench's code takes the mean of x squared for it), ``relative_reconstruction_bias`` is
the shrinkage ``sum ||x_hat||^2 / sum <x, x_hat>`` on centred data. Densities, norms and cosines are over a sample.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saelab.analysis.evaluate import evaluate
from saelab.analysis.evaluation import Evaluation
from saelab.analysis.saebench.result import EvalResult, Metrics
from saelab.core.code import SparseCode
from saelab.features.protocols import Dictionary, Model, Rows

EVAL = "core"


def core(  # noqa: PLR0917  three of them are one sample
    model: Model,
    site: str,
    rows: Rows,
    dictionaries: Mapping[str, Dictionary],
    x: Float[Tensor, "n d"],
    codes: Mapping[str, SparseCode],
    *,
    max_tokens: int,
    rows_per_batch: int = 16,
) -> EvalResult:
    """Evaluate every dictionary on the same rows; ``x`` and ``codes`` are the sample and its codes under each."""
    metrics: dict[str, Metrics] = {}
    found: dict[str, Evaluation] = {}
    for name, dictionary in dictionaries.items():
        found[name] = evaluate(model, dictionary, rows, site, max_tokens=max_tokens, rows_per_batch=rows_per_batch)
        metrics[name] = {**_groups(found[name]), **_sample(x, dictionary, codes[name].positive(), found[name])}
    ours = metrics.pop("sae")
    config: dict[str, Any] = {
        "n_eval_tokens": found["sae"].n_tokens,
        "n_predictions": found["sae"].n_predictions,
        "n_sample_tokens": len(x),
        "ablation": "zero (ce_loss_score, kl_div_score); mean (the same with _mean)",
        "positions": found["sae"].splice,
        "text": found["sae"].source,
        "text_fingerprint": found["sae"].source_fingerprint,
    }
    headline = ("ce_loss_score", "kl_div_score", "explained_variance", "cossim")
    return EvalResult(EVAL, config, ours, controls=metrics, better=dict.fromkeys(headline, "higher"))


def _groups(e: Evaluation) -> Metrics:
    """SAEBench's groups and names, from an evaluation."""
    return {
        "model_behavior_preservation": {
            "kl_div_score": e.kl_score,
            "kl_div_score_mean": e.kl_score_mean,
            "kl_div_with_ablation": e.kl_zero,
            "kl_div_with_sae": e.kl_sae,
        },
        "model_performance_preservation": {
            "ce_loss_score": e.ce_recovered,
            "ce_loss_score_mean": e.ce_recovered_mean,
            "ce_loss_with_ablation": e.ce_zero,
            "ce_loss_with_sae": e.ce_sae,
            "ce_loss_without_sae": e.ce_clean,
            "ce_loss_increase_nats": e.ce_sae - e.ce_clean,
        },
        "reconstruction_quality": {"explained_variance": e.explained_variance, "mse": e.mse, "cossim": e.cosine},
        "token_stats": {"total_tokens_eval_reconstruction": float(e.n_tokens)},
    }


def _sample(x: Tensor, dictionary: Dictionary, code: SparseCode, e: Evaluation) -> Metrics:
    """Norms, sparsity, densities and cosines over the sample."""
    x_hat = dictionary.decode(code).cpu().double()
    norm, norm_hat = x.double().norm(dim=1), x_hat.norm(dim=1)
    density = np.bincount(code.indices.cpu().numpy(), minlength=code.d_sae) / code.n_tokens
    over = {"1": density > 0.01, "10": density > 0.1}
    total = max(float(density.sum()), 1e-12)
    misc = {f"freq_over_{p}_percent": float(mask.mean()) for p, mask in over.items()}
    misc |= {f"normalized_freq_over_{p}_percent": float(density[mask].sum()) / total for p, mask in over.items()}
    return {
        "shrinkage": {
            "l2_norm_in": float(norm.mean()),
            "l2_norm_out": float(norm_hat.mean()),
            "l2_ratio": float((norm_hat / norm.clamp_min(1e-12)).mean()),
            "relative_reconstruction_bias": e.shrinkage,
        },
        "sparsity": {"l0": e.l0, "l1": float(code.values.double().abs().sum()) / code.n_tokens},
        "misc_metrics": {
            **misc,
            "average_max_encoder_cosine_sim": max_cosine(dictionary.W_enc.T),
            "average_max_decoder_cosine_sim": max_cosine(dictionary.W_dec),
            "frac_alive": 1 - e.dead_fraction,
        },
    }


def max_cosine(rows: Float[Tensor, "n d"], block: int = 2048) -> float:
    """Mean over rows of the largest cosine with another row."""
    unit = torch.nn.functional.normalize(rows.detach().float().cpu(), dim=1)
    best = []
    for start in range(0, len(unit), block):
        cosine = unit[start : start + block] @ unit.T
        cosine[torch.arange(cosine.shape[0]), start + torch.arange(cosine.shape[0])] = -1
        best.append(cosine.max(1).values)
    return float(torch.cat(best).mean())
