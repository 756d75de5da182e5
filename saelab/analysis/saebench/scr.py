"""Spurious-correlation removal: zeroing the features of one attribute should mend a probe that has mixed it up.

Two binary attributes. A probe is trained on perfectly confounded data (both positive, or both negative), where it
cannot know which of the two it is asked for. The n features with the largest
``|(mean f on + - mean f on -) <w_spurious, W_dec>|`` are zeroed (the SAE's error is kept), and the probe is tested on
balanced data of the attribute that was meant:

    SCR_n = (acc with the features zeroed - acc of the probe) / (acc of a probe trained on balanced data - acc of it)

0 where the denominator is below 0.001. Of the two directions (which attribute is meant) the one with the lower
accuracy before is reported, the first on a tie. A pair with less than 0.05 to mend in that direction is left out of the
means (its scores stay in the details): dividing by next to nothing gives scores in the tens either way.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool

from saelab.analysis.saebench.examples import Pooled
from saelab.analysis.saebench.probes import Probe, fit_probe, mean_difference, top_k
from saelab.analysis.saebench.result import EvalResult, by_dictionary, skipped
from saelab.analysis.saebench.tpp import THRESHOLDS

EVAL = "scr"
LEAST_CELL, LEAST_ROOM = 60, 0.05


@dataclass(frozen=True, eq=False)
class AttributePair:
    """Examples with two binary attributes."""

    name: str
    """Name of the data set."""
    pooled: Pooled
    """Activations and codes."""
    first: Bool[np.ndarray, " n"]
    """The first attribute."""
    second: Bool[np.ndarray, " n"]
    """The second one."""
    train: Bool[np.ndarray, " n"]
    """Whether it is a training example."""

    def smallest_cell(self) -> int:
        """Fewest examples in any of the four combinations, on either side of the split."""
        return min(
            int(((self.first == i) & (self.second == j) & (self.train == t)).sum())
            for i in (True, False)
            for j in (True, False)
            for t in (True, False)
        )


def attribute_pairs(labels: Mapping[str, Any]) -> list[AttributePair]:
    """Make pairs of the token labels of :func:`saelab.analysis.saebench.local_sets.token_sets`.

    In brackets and in a function; in brackets and deeply indented; in text (string, docstring, comment) and in a
    function. Pairs with a combination of fewer than 60 examples on a side of the split are left out.
    """
    pooled, train = labels["pooled"], labels["train"]
    binary = {
        "brackets": (labels["brackets"] >= 1, labels["brackets"] >= 0),
        "function": (labels["scope"] >= 2, labels["scope"] >= 0),
        "indented": (labels["indent"] >= 2, labels["indent"] >= 0),
        "text": (labels["text"] >= 1, labels["text"] >= 0),
    }
    pairs = []
    for one, two in (("brackets", "function"), ("brackets", "indented"), ("text", "function")):
        (first, known), (second, also) = binary[one], binary[two]
        rows = np.flatnonzero(known & also)
        pair = AttributePair(f"{one}_and_{two}", pooled.at(rows), first[rows], second[rows], train[rows])
        if len(rows) and pair.smallest_cell() >= LEAST_CELL:
            pairs.append(pair)
    return pairs


def scr(
    pairs: Sequence[AttributePair],
    decoders: Mapping[str, np.ndarray],
    *,
    train_size: int = 4000,
    test_size: int = 1000,
    thresholds: Sequence[int] = THRESHOLDS,
    seed: int = 0,
) -> EvalResult:
    """Mend the confounded probes of every pair with every dictionary."""
    config = {"n_values": list(thresholds), "train_set_size": train_size, "test_set_size": test_size}
    config |= {"random_seed": seed, "dataset_names": [pair.name for pair in pairs]}
    if not pairs:
        return skipped(EVAL, f"no pair of attributes with {LEAST_CELL} examples of each combination", config)
    details: list[dict[str, Any]] = []
    values: dict[str, dict[str, list[float]]] = {name: {} for name in decoders}
    for number, pair in enumerate(pairs):
        problem = _Problem(pair, train_size, test_size, np.random.default_rng([seed, 40, number]))
        for name, decoder in decoders.items():
            found = problem.scores(pair.pooled.codes[name], decoder, thresholds)
            if problem.room >= LEAST_ROOM:
                for key, value in found.items():
                    values[name].setdefault(key, []).append(value)
            if name == "sae":
                counts = {"to_mend": problem.room, "counted": bool(problem.room >= LEAST_ROOM)}
                details.append({"dataset_name": f"{pair.name}_results", **problem.accuracies, **counts, **found})
    if not values["sae"]:
        return skipped(EVAL, f"no pair whose confounded probe loses {LEAST_ROOM} of accuracy: nothing to mend", config)
    headline = [f"scr_metric_threshold_{n}" for n in thresholds if n in (5, 20, 100)]
    return by_dictionary(EVAL, config, values, details, group="scr_metrics", headline=headline)


class _Problem:
    """One pair: the confounded probe, the clean ones, the test examples."""

    def __init__(self, pair: AttributePair, train_size: int, test_size: int, rng: np.random.Generator) -> None:
        self.pair = pair
        self.test = self._cells(~pair.train, test_size, rng)
        self.fair = self._cells(pair.train, train_size, rng)
        mixed = self._cells(pair.train, train_size, rng, confounded=True)
        x = pair.pooled.x
        self.confounded = fit_probe(x[mixed], pair.first[mixed])
        self.clean = [fit_probe(x[self.fair], y[self.fair]) for y in (pair.first, pair.second)]
        self.before = [self._accuracy(self.confounded, y) for y in (pair.first, pair.second)]
        self.after = [self._accuracy(p, y) for p, y in zip(self.clean, (pair.first, pair.second), strict=True)]
        self.counted = 1 if self.before[0] <= self.before[1] else 2
        self.room = self.after[self.counted - 1] - self.before[self.counted - 1]
        self.accuracies = {
            "confounded_probe_on_first": self.before[0],
            "confounded_probe_on_second": self.before[1],
            "clean_probe_on_first": self.after[0],
            "clean_probe_on_second": self.after[1],
        }

    def _cells(self, side: np.ndarray, size: int, rng: np.random.Generator, confounded: bool = False) -> np.ndarray:
        """As many examples of each combination; of the two equal combinations alone when ``confounded``."""
        first, second = self.pair.first, self.pair.second
        cells = [(i, j) for i in (True, False) for j in (True, False) if i == j or not confounded]
        places = [rng.permutation(np.flatnonzero(side & (first == i) & (second == j))) for i, j in cells]
        each = min(size // len(cells), *(len(p) for p in places))
        return rng.permutation(np.concatenate([p[:each] for p in places]))

    def _accuracy(self, probe: Probe, y: np.ndarray, change: np.ndarray | None = None) -> float:
        x = self.pair.pooled.x[self.test].astype(np.float64)
        return probe.accuracy(x if change is None else x - change, y[self.test])

    def scores(self, codes: Any, decoder: np.ndarray, thresholds: Sequence[int]) -> dict[str, float]:
        """Score both directions at each threshold, and name the one that counts."""
        meant = (self.pair.first, self.pair.second)
        result: dict[str, float] = {}
        for direction in (1, 2):
            spurious = meant[2 - direction]
            difference = mean_difference(codes[self.fair], spurious[self.fair])
            effect = np.abs(difference * (decoder @ self.clean[2 - direction].weight))
            order = top_k(effect, max(thresholds))
            order = order[effect[order] != 0]
            room = self.after[direction - 1] - self.before[direction - 1]
            for n in thresholds:
                zeroed = order[:n]
                change = codes[self.test][:, zeroed] @ decoder[zeroed]
                gained = self._accuracy(self.confounded, meant[direction - 1], change) - self.before[direction - 1]
                score = gained / room if abs(room) >= 1e-3 else 0.0
                result[f"scr_dir{direction}_threshold_{n}"] = score
                if direction == self.counted:
                    result[f"scr_metric_threshold_{n}"] = score
        return result
