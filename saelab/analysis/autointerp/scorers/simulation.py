"""Simulation: a judge predicts the activation of every token from the explanation; Pearson's r with the true ones.

Windows are taken from all deciles. r is over all their tokens together, and per decile in ``detail``; it is nan when
the judge predicts one number everywhere. An answer that cannot be read predicts 0 everywhere, and is counted.
"""

from collections.abc import Sequence

import numpy as np

from saelab.analysis.autointerp import prompts
from saelab.analysis.autointerp.examples import FeatureExamples
from saelab.analysis.autointerp.intervals import correlation
from saelab.analysis.autointerp.judge import Judge, Request, ask_all
from saelab.analysis.autointerp.parse import parse_numbers
from saelab.analysis.autointerp.scorers.base import Item, ScoringConfig, draws
from saelab.features.explanations import Score


def simulation_score(
    true: Sequence[np.ndarray], predicted: Sequence[Sequence[float] | None], deciles: Sequence[int]
) -> tuple[float, float, float, int, int, dict[str, object]]:
    """Return r, its interval, tokens, answers that could not be read, and the details, of predicted activations."""
    guessed = [
        np.zeros(len(t)) if p is None else np.asarray(p, np.float64) for t, p in zip(true, predicted, strict=True)
    ]
    estimate = correlation(np.concatenate(true).astype(np.float64), np.concatenate(guessed))
    by_decile = {}
    for decile in sorted(set(deciles)):
        mine = [k for k, d in enumerate(deciles) if d == decile]
        r = correlation(np.concatenate([true[k] for k in mine]), np.concatenate([guessed[k] for k in mine]))
        by_decile[decile] = r.value
    failures = sum(p is None for p in predicted)
    n = sum(len(t) for t in true)
    return estimate.value, estimate.low, estimate.high, n, failures, {"deciles": by_decile}


class SimulationScorer:
    """See the module's docstring."""

    name = "simulation"
    needs_explanation = True

    def __init__(self, config: ScoringConfig, judge: Judge) -> None:
        self.config, self.judge, self.judge_name = config, judge, judge.name

    def windows(self, examples: FeatureExamples) -> list[int]:
        """Return the windows to simulate: deciles in turn, the strongest decile first."""
        generator = draws(self.config, self.name, examples.feature)
        deciles = examples.score.deciles
        queues = {d: generator.permutation(np.flatnonzero(deciles == d)).tolist() for d in np.unique(deciles).tolist()}
        chosen: list[int] = []
        while any(queues.values()) and len(chosen) < self.config.simulated:
            for decile in sorted(queues, reverse=True):
                if queues[decile] and len(chosen) < self.config.simulated:
                    chosen.append(queues[decile].pop())
        return chosen

    def score(self, items: Sequence[Item]) -> list[Score]:
        """Score explanations."""
        asked = [(examples, explanation, self.windows(examples)) for examples, explanation in items]
        requests = [
            Request(
                prompts.simulation_messages(explanation.text if explanation else "", examples.score.tokens(k)),
                max_tokens=16 + 4 * len(examples.score.ids(k)),
            )
            for examples, explanation, chosen in asked
            for k in chosen
        ]
        replies = iter(ask_all(self.judge, requests))
        scores = []
        for examples, explanation, chosen in asked:
            true = [examples.score.values[k, : len(examples.score.ids(k))] for k in chosen]
            found = [next(replies) for _ in chosen]
            predicted = [
                None if r.refused or r.error else parse_numbers(r.text, len(t))
                for r, t in zip(found, true, strict=True)
            ]
            deciles = [int(examples.score.deciles[k]) for k in chosen]
            value, low, high, n, failures, detail = simulation_score(true, predicted, deciles)
            scores.append(
                Score(
                    *(examples.feature, self.name, value, low, high, n, failures),
                    author=explanation.author if explanation else "",
                    judge=self.judge_name,
                    detail=detail,
                )
            )
        return scores
