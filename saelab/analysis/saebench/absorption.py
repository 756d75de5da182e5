"""Feature absorption: a general feature stays silent where a more specific one has taken over its direction.

Chanin et al. 2024 (arXiv:2409.14507) as SAEBench computes it. A unit probe direction p tells a class (words that begin
with a letter). The *main* features are those that sparse probing finds for it: k = 1 .. 10 features as long as each
adds more than 0.03 to F1. For a word of the class with activation x and code f,

    P   = <x, p>                       q_i = f_i ||W_dec[i]|| cos(W_dec[i], p)       (in raw units)
    Q_main = sum of q_i over main      Q_abs = sum of the 3 largest q_i > 0 over other i with cos >= 0.1

    fraction = 0                        if P <= 0, Q_main >= P or Q_abs < 0.4 P
               1                        if Q_main <= 0
               a / (a + Q_main)         otherwise, a = min(Q_abs, P - Q_main)
    full     = 1 if all main features are 0, P > 0, and the feature with the largest q_i has cos >= 0.025
               and supplies at least 0.4 P; else 0

Scores are means over the words that the probe finds, then over the classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64

from saelab.analysis.saebench.examples import LabelledSet, Pooled
from saelab.analysis.saebench.probes import f1_score, fit_probe, mean_difference, top_k
from saelab.analysis.saebench.result import EvalResult, mean, skipped

EVAL = "absorption_first_letter"
MOST_MAIN, F1_JUMP, LEAST_F1 = 10, 0.03, 0.6
LEAST_COSINE, LEAST_SHARE, ABSORBERS, LEAST_FULL_COSINE = 0.1, 0.4, 3, 0.025
LEAST_WORDS = 5


@dataclass(frozen=True, eq=False)
class AbsorptionScores:
    """Scores of each example."""

    fraction: Float64[np.ndarray, " n"]
    """How much of the main features' part others have taken over, 0 to 1."""
    full: Bool[np.ndarray, " n"]
    """Whether a single other feature has taken over all of it."""


def absorption_scores(
    x: np.ndarray, codes: Any, decoder: np.ndarray, probe: np.ndarray, main: Int64[np.ndarray, " k"]
) -> AbsorptionScores:
    """Score examples: activations (n, d), codes (CSR, n by d_sae), raw-unit decoder (d_sae, d), direction (d,)."""
    direction = probe / np.linalg.norm(probe)
    norm = np.linalg.norm(decoder, axis=1)
    cosine = (decoder @ direction) / np.where(norm > 0, norm, np.inf)
    wanted = np.asarray(x, np.float64) @ direction
    share = codes.tocsr(copy=True).astype(np.float64)
    share.data *= (norm * cosine)[share.indices]
    fraction, full = np.zeros(len(wanted)), np.zeros(len(wanted), bool)
    is_main = np.zeros(len(norm), bool)
    is_main[main] = True
    for n, target in enumerate(wanted.tolist()):
        part = slice(share.indptr[n], share.indptr[n + 1])
        q, feature = share.data[part], share.indices[part]
        if target <= 0 or not len(q):
            continue
        ours = is_main[feature]
        q_main = float(q[ours].sum())
        others = q[~ours & (cosine[feature] >= LEAST_COSINE) & (q > 0)]
        q_others = float(np.sort(others)[-ABSORBERS:].sum())
        if q_main < target and q_others >= LEAST_SHARE * target:
            taken = min(q_others, target - q_main)
            fraction[n] = 1.0 if q_main <= 0 else taken / (taken + q_main)
        largest = int(q.argmax())
        silent = not (codes[n, main].toarray() if len(main) else np.zeros(1)).any()
        aligned = cosine[feature[largest]] >= LEAST_FULL_COSINE
        full[n] = silent and aligned and q[largest] >= LEAST_SHARE * target
    return AbsorptionScores(fraction, full)


def main_features(
    train: Any, y_train: np.ndarray, test: Any, y_test: np.ndarray
) -> tuple[Int64[np.ndarray, " k"], float]:
    """Return the main features of a class and the test F1 of a probe on them."""
    order = top_k(np.abs(mean_difference(train, y_train)), MOST_MAIN)
    chosen, best = order[:1], -1.0
    for k in range(1, len(order) + 1):
        probe = fit_probe(train[:, order[:k]].toarray(), y_train)
        score = f1_score(probe.predict(test[:, order[:k]].toarray()), y_test)
        if k > 1 and score <= best + F1_JUMP:
            break
        chosen, best = order[:k], score
    return chosen, best


def absorption(
    data: LabelledSet | None,
    decoders: Mapping[str, np.ndarray],
    *,
    eval_type_id: str = EVAL,
    config: Mapping[str, Any] | None = None,
    directions: np.ndarray | None = None,
) -> EvalResult:
    """Score every class of a data set; ``directions`` (classes, d) replace the probes where they are known.

    Classes whose probe has a test F1 below 0.6 are skipped: there the model does not know the class, and nothing can be
    said about how the SAE represents it.
    """
    settings: dict[str, Any] = {"f1_jump_threshold": F1_JUMP, "max_k_value": MOST_MAIN, "least_probe_f1": LEAST_F1}
    settings |= dict(config or {})
    if data is None:
        return skipped(eval_type_id, "no words to spell: the tokenizer has no words that are single tokens", settings)
    details: list[dict[str, Any]] = []
    values: dict[str, dict[str, list[float]]] = {name: {} for name in decoders}
    unknown = []
    for k, letter in enumerate(data.classes):
        found = _class_scores(data, k, decoders, None if directions is None else directions[k])
        if found is None:
            unknown.append(letter)
            continue
        for name, scores in found.items():
            for key, value in scores.items():
                values[name].setdefault(key, []).append(value)
        ours = found["sae"]
        details.append(
            {
                "first_letter": letter,
                "mean_absorption_fraction": ours["mean_absorption_fraction_score"],
                "full_absorption_rate": ours["mean_full_absorption_score"],
                "num_probe_true_positives": ours["words"],
                "num_split_features": ours["mean_num_split_features"],
                "probe_f1": ours["probe_f1"],
                "main_features_f1": ours["main_features_f1"],
            }
        )
    settings["classes_scored"], settings["classes_skipped"] = len(details), unknown
    if not details:
        return skipped(
            eval_type_id, f"no class that a probe tells with F1 >= {LEAST_F1}: the model cannot spell", settings
        )
    groups = {name: {"mean": _means(found)} for name, found in values.items()}
    headline = ["mean_absorption_fraction_score", "mean_full_absorption_score"]
    return EvalResult(
        eval_type_id,
        settings,
        groups.pop("sae"),
        details,
        controls=groups,
        better={**dict.fromkeys(headline, "lower"), "main_features_f1": "higher"},
        parts={key: {name: values[name][key] for name in decoders} for key in [*headline, "main_features_f1"]},
    )


def _means(found: dict[str, list[float]]) -> dict[str, float]:
    """SAEBench's means and standard deviations over classes, and the F1s."""
    result = {}
    for key in ("mean_absorption_fraction_score", "mean_full_absorption_score", "mean_num_split_features"):
        result[key] = mean(found[key])
        result["std_dev_" + key.removeprefix("mean_")] = float(np.std(found[key], ddof=min(1, len(found[key]) - 1)))
    return {**result, "probe_f1": mean(found["probe_f1"]), "main_features_f1": mean(found["main_features_f1"])}


def _class_scores(
    data: LabelledSet, k: int, decoders: Mapping[str, np.ndarray], direction: np.ndarray | None
) -> dict[str, dict[str, float]] | None:
    """Scores of one class for each dictionary; None when the probe does not know the class."""
    y, train, test = data.y == k, np.flatnonzero(data.train), np.flatnonzero(~data.train)
    pooled: Pooled = data.pooled
    if y[train].sum() < LEAST_WORDS or y[test].sum() < LEAST_WORDS:
        return None
    probe = fit_probe(pooled.x[train], y[train])
    predicted = probe.predict(pooled.x[test])
    score = f1_score(predicted, y[test])
    words = test[predicted & y[test]]
    if score < LEAST_F1 or not len(words):
        return None
    result = {}
    for name, decoder in decoders.items():
        codes = pooled.codes[name]
        main, main_f1 = main_features(codes[train], y[train], codes[test], y[test])
        aimed = probe.weight if direction is None else direction
        found = absorption_scores(pooled.x[words], codes[words], decoder, aimed, main)
        result[name] = {
            "mean_absorption_fraction_score": float(found.fraction.mean()),
            "mean_full_absorption_score": float(found.full.mean()),
            "mean_num_split_features": float(len(main)),
            "probe_f1": score,
            "main_features_f1": main_f1,
            "words": float(len(words)),
        }
    return result
