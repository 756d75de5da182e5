"""Targeted probe perturbation: the features that belong to a class should change its probe and no other.

For each class of a data set a one-vs-rest probe reads the pooled activation. The features with the largest
``max(0, mean f on the class - mean f on the rest) <w_class, W_dec>`` are zeroed (the SAE's error is kept), and

    TPP_n = mean over classes of [ drop of its own probe's accuracy - mean drop of the other probes ]
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from saelab.analysis.saebench.examples import LabelledSet
from saelab.analysis.saebench.probes import Probe, balanced, fit_probe, mean_difference, top_k
from saelab.analysis.saebench.result import EvalResult, by_dictionary, mean, skipped

EVAL = "tpp"
THRESHOLDS = (2, 5, 10, 20, 50, 100, 500)


def tpp(
    sets: Sequence[LabelledSet],
    decoders: Mapping[str, np.ndarray],
    *,
    train_size: int = 4000,
    test_size: int = 1000,
    thresholds: Sequence[int] = THRESHOLDS,
    seed: int = 0,
) -> EvalResult:
    """Perturb the probes of every data set of three or more classes.

    ``decoders`` are the raw-unit write directions (d_sae, d) of each dictionary in the codes.
    """
    chosen = [data for data in sets if len(data.classes) >= 3]
    config = {"n_values": list(thresholds), "train_set_size": train_size, "test_set_size": test_size}
    config |= {"random_seed": seed, "dataset_names": [data.name for data in chosen]}
    if not chosen:
        return skipped(EVAL, "no data set with three classes or more", config)
    details: list[dict[str, Any]] = []
    values: dict[str, dict[str, list[float]]] = {name: {} for name in decoders}
    for number, data in enumerate(chosen):
        rng = np.random.default_rng([seed, 30, number])
        problem = _Problem(data, train_size, test_size, rng)
        for name, decoder in decoders.items():
            found = problem.drops(data.pooled.codes[name], decoder, thresholds)
            for key, per_class in found.items():
                values[name].setdefault(key, []).extend(per_class)
            if name == "sae":
                details.append({"dataset_name": f"{data.name}_tpp", **{key: mean(v) for key, v in found.items()}})
    headline = [f"tpp_threshold_{n}_total_metric" for n in thresholds if n in (5, 20, 100)]
    return by_dictionary(EVAL, config, values, details, group="tpp_metrics", headline=headline)


class _Problem:
    """One data set: its probes and its test examples, the same for every dictionary."""

    def __init__(self, data: LabelledSet, train_size: int, test_size: int, rng: np.random.Generator) -> None:
        self.data = data
        self.train: list[np.ndarray] = []
        self.test: list[np.ndarray] = []
        self.probes: list[Probe] = []
        for k in range(len(data.classes)):
            y = data.y == k
            train = np.flatnonzero(data.train)[balanced(y[data.train], train_size, rng)]
            self.train.append(train)
            self.test.append(np.flatnonzero(~data.train)[balanced(y[~data.train], test_size, rng)])
            self.probes.append(fit_probe(data.pooled.x[train], y[train]))
        self.clean = [self.accuracy(k, None) for k in range(len(self.probes))]

    def accuracy(self, k: int, change: np.ndarray | None) -> float:
        """Accuracy of probe k on its test examples, with ``change`` (n, d) taken off the activations."""
        rows, y = self.test[k], self.data.y == k
        x = self.data.pooled.x[rows].astype(np.float64)
        return self.probes[k].accuracy(x if change is None else x - change[rows], y[rows])

    def drops(self, codes: Any, decoder: np.ndarray, thresholds: Sequence[int]) -> dict[str, list[float]]:
        """Per class: the total metric, and the drop of its own and of the other probes, at each threshold."""
        result: dict[str, list[float]] = {}
        for k, probe in enumerate(self.probes):
            rows = self.train[k]
            difference = mean_difference(codes[rows], self.data.y[rows] == k)
            effect = np.maximum(difference, 0) * (decoder @ probe.weight)
            order = top_k(effect, max(thresholds))
            order = order[effect[order] != 0]
            for n in thresholds:
                zeroed = order[:n]
                change = codes[:, zeroed] @ decoder[zeroed]
                drops = [self.clean[j] - self.accuracy(j, change) for j in range(len(self.probes))]
                others = float(np.mean(drops[:k] + drops[k + 1 :]))
                result.setdefault(f"tpp_threshold_{n}_total_metric", []).append(drops[k] - others)
                result.setdefault(f"tpp_threshold_{n}_intended_diff_only", []).append(drops[k])
                result.setdefault(f"tpp_threshold_{n}_unintended_diff_only", []).append(others)
        return result
