"""Intruder: finding the odd window among windows of one decile. Needs no explanation: it says whether one is possible.

Each round shows ``intruder_shown - 1`` windows of one decile and an intruder, all with marked tokens: a negative with
random marks, or (``intruder_from="decile"``) a window of another decile with its own marks. Chance is one in
``intruder_shown``. Without a judge, the window least like the others by embedding is taken; then negatives that were
chosen because their embedding is most like the feature's windows (kind ``embedding``) are no intruders, since by that
choice they are never the least alike.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from saelab.analysis.autointerp import prompts
from saelab.analysis.autointerp.examples import FeatureExamples, Sample
from saelab.analysis.autointerp.explainers.language_model import strong
from saelab.analysis.autointerp.intervals import proportion
from saelab.analysis.autointerp.judge import Judge, Request, ask_all
from saelab.analysis.autointerp.parse import parse_index
from saelab.analysis.autointerp.scorers.base import Item, ScoringConfig, draws, kind_of, make_score, tally
from saelab.analysis.autointerp.scorers.fuzzing import wrong_marks
from saelab.core.errors import ConfigError
from saelab.features.explanations import Score


@dataclass(frozen=True, eq=False)
class Round:
    """One question."""

    windows: tuple[tuple[Sample, int, np.ndarray], ...]
    """What is shown: sample, number in it, marked tokens."""
    intruder: int
    """Which of them does not belong."""
    decile: int
    """Decile of the others."""

    @property
    def kind(self) -> str:
        """Kind of the intruder: of negative, or ``active`` for a window of another decile."""
        sample, k, _ = self.windows[self.intruder]
        return kind_of(sample, k)


class IntruderScorer:
    """See the module's docstring."""

    name = "intruder"
    needs_explanation = False

    def __init__(self, config: ScoringConfig, judge: Judge | None = None) -> None:
        if config.intruder_from not in ("negatives", "decile"):
            raise ConfigError(f"intruder_from is '{config.intruder_from}', expected 'negatives' or 'decile'")
        self.config, self.judge = config, judge
        self.judge_name = judge.name if judge else "embedding"

    def rounds(self, examples: FeatureExamples) -> list[Round]:
        """Return the questions about one feature; deciles in turn, those with enough windows."""
        config, score = self.config, examples.score
        generator = draws(config, self.name, examples.feature)
        right = strong(score.values, config.threshold)
        deciles = [
            d for d in np.unique(score.deciles).tolist() if (score.deciles == d).sum() >= config.intruder_shown - 1
        ]
        odd_ones = self._odd_ones(examples)
        if not deciles or not len(odd_ones) or (config.intruder_from == "decile" and len(np.unique(score.deciles)) < 2):
            return []
        found = []
        for number in range(config.intruder_rounds):
            decile = deciles[number % len(deciles)]
            inside = generator.choice(np.flatnonzero(score.deciles == decile), config.intruder_shown - 1, replace=False)
            shown = [(score, k, right[k, : len(score.ids(k))]) for k in inside.tolist()]
            if config.intruder_from == "decile":
                k = int(generator.choice(np.flatnonzero(score.deciles != decile)))
                odd = (score, k, right[k, : len(score.ids(k))])
            else:
                k = int(generator.choice(odd_ones))
                count = max(1, round(float(np.mean([marks.sum() for _, _, marks in shown]))))
                size = len(examples.negatives.ids(k))
                odd = (examples.negatives, k, wrong_marks(examples.negatives.values[k, :size], count, generator))
            place = int(generator.integers(config.intruder_shown))
            found.append(Round((*shown[:place], odd, *shown[place:]), place, decile))
        return found

    def _odd_ones(self, examples: FeatureExamples) -> np.ndarray:
        """Numbers of the negatives that may be intruders."""
        kinds = np.array(examples.negatives.kinds)
        return np.flatnonzero(kinds != "embedding") if self.judge is None else np.arange(len(kinds))

    def question(self, one: Round) -> Request:
        """Return the question of a round."""
        markers = prompts.markers_for([sample.text(k) for sample, k, _ in one.windows])
        texts = [
            prompts.highlight(sample.corpus.store.vocabulary, sample.ids(k), marks, markers)
            for sample, k, marks in one.windows
        ]
        return Request(prompts.intruder_messages(texts, markers), max_tokens=16)

    def score(self, items: Sequence[Item]) -> list[Score]:
        """Score features."""
        asked = [(examples, self.rounds(examples)) for examples, _ in items]
        said: Iterator[int | None]
        if self.judge is None:
            said = iter([self._least_alike(one) for _, rounds in asked for one in rounds])
        else:
            replies = ask_all(self.judge, [self.question(one) for _, rounds in asked for one in rounds])
            shown = self.config.intruder_shown
            said = iter([None if r.refused or r.error else parse_index(r.text, shown) for r in replies])
        scores = []
        for examples, rounds in asked:
            guesses = [(one, next(said)) for one in rounds]
            if not guesses:
                continue
            right = [guess == one.intruder for one, guess in guesses]
            deciles = tally((one.decile, hit) for (one, _), hit in zip(guesses, right, strict=True))
            kinds = tally((one.kind, hit) for (one, _), hit in zip(guesses, right, strict=True))
            scores.append(
                make_score(
                    proportion(sum(right), len(right)),
                    examples.feature,
                    self.name,
                    n=len(right),
                    failures=sum(guess is None for _, guess in guesses),
                    judge=self.judge_name,
                    detail={"chance": 1 / self.config.intruder_shown, "deciles": deciles, "kinds": kinds},
                )
            )
        return scores

    def _least_alike(self, one: Round) -> int:
        corpus = one.windows[0][0].corpus
        vectors = corpus.embeddings[[int(sample.windows[k]) for sample, k, _ in one.windows]]
        return int(np.argmin(vectors @ vectors.sum(0) - (vectors * vectors).sum(1)))
