"""Fuzzing: telling the right highlighted tokens from wrong ones, by the explanation.

Every other firing window of each decile is shown with its strong tokens marked (the right ones). The others, and
every other negative, are shown with as many wrong tokens marked as firing windows have strong ones on average: tokens
on which the feature does not fire. On firing windows (kind ``wrong tokens``) only the place can tell; knowing the
topic is no help. Each window is shown once. Without a judge, a token set calls the marks right when most marked
tokens are in it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool

from saelab.analysis.autointerp import prompts
from saelab.analysis.autointerp.examples import FeatureExamples, Sample
from saelab.analysis.autointerp.explainers.language_model import strong
from saelab.analysis.autointerp.judge import Judge, Request, ask_all
from saelab.analysis.autointerp.scorers.base import Item, Judgement, ScoringConfig, draws, grade, tokens_of
from saelab.analysis.autointerp.scorers.detection import RULE, answers
from saelab.features.explanations import Score

WRONG = "wrong tokens"
"""Kind of a firing window with the wrong tokens marked."""


@dataclass(frozen=True, eq=False)
class Marked:
    """A window with some tokens marked."""

    sample: Sample
    """Where the window is from."""
    k: int
    """Its number there."""
    marks: Bool[np.ndarray, " tokens"]
    """Which tokens are marked."""
    right: bool
    """Whether they are those on which the feature fires strongly."""
    kind: str
    """``active``, ``wrong tokens``, or the kind of negative."""


def wrong_marks(values: np.ndarray, count: int, generator: np.random.Generator) -> Bool[np.ndarray, " tokens"]:
    """Mark ``count`` tokens on which the feature does not fire (all of them when there are fewer)."""
    free = np.flatnonzero(values <= 0)
    marks = np.zeros(len(values), np.bool_)
    marks[generator.choice(free, min(count, len(free)), replace=False)] = True
    return marks


class FuzzingScorer:
    """See the module's docstring."""

    name = "fuzzing"
    needs_explanation = True

    def __init__(self, config: ScoringConfig, judge: Judge | None = None) -> None:
        self.config, self.judge = config, judge
        self.judge_name = judge.name if judge else RULE

    def marked(self, examples: FeatureExamples) -> list[Marked]:
        """Return the windows to show, in random order."""
        generator = draws(self.config, self.name, examples.feature)
        score, negatives = examples.score, examples.negatives
        right = strong(score.values, self.config.threshold)
        count = math.ceil(right.sum(1).mean())
        found: list[Marked] = []
        for place, k in enumerate(np.lexsort((generator.random(len(score)), score.deciles)).tolist()):
            size = len(score.ids(k))
            if place % 2 == 0:
                found.append(Marked(score, k, right[k, :size], True, score.kinds[k]))
            else:
                marks = wrong_marks(score.values[k, :size], count, generator)
                if marks.any():  # a feature that fires on every token has no wrong ones
                    found.append(Marked(score, k, marks, False, WRONG))
        for k in range(0, len(negatives), 2):
            marks = wrong_marks(negatives.values[k, : len(negatives.ids(k))], count, generator)
            found.append(Marked(negatives, k, marks, False, negatives.kinds[k]))
        return [found[i] for i in generator.permutation(len(found)).tolist()]

    def questions(self, item: Item) -> tuple[list[Request], list[Marked]]:
        """Return the questions about one feature and the windows they show, ``shown`` in each."""
        examples, explanation = item
        assert explanation is not None, "fuzzing scores an explanation"
        windows, shown = self.marked(examples), self.config.shown
        vocabulary = examples.score.corpus.store.vocabulary
        requests = []
        for k in range(0, len(windows), shown):
            group = windows[k : k + shown]
            markers = prompts.markers_for([w.sample.text(w.k) for w in group])
            texts = [prompts.highlight(vocabulary, w.sample.ids(w.k), w.marks, markers) for w in group]
            messages = prompts.fuzzing_messages(explanation.text, texts, markers)
            requests.append(Request(messages, max_tokens=8 + 4 * len(group), logprobs=self.config.logprobs))
        return requests, windows

    def score(self, items: Sequence[Item]) -> list[Score]:
        """Score explanations; without a judge, those that are token sets."""
        if self.judge is None:
            return [score for item in items if (score := self._by_rule(item)) is not None]
        asked = [self.questions(item) for item in items]
        replies = iter(ask_all(self.judge, [request for requests, _ in asked for request in requests]))
        scores = []
        for item, (requests, windows) in zip(items, asked, strict=True):
            said: list[tuple[Any, float]] = []
            for k in range(len(requests)):
                size = min(self.config.shown, len(windows) - k * self.config.shown)
                said += answers(next(replies), size)
            scores.append(self._graded(item, windows, said))
        return [score for score in scores if score is not None]

    def _by_rule(self, item: Item) -> Score | None:
        tokens = tokens_of(item[1])
        if tokens is None:
            return None
        known = np.zeros(len(item[0].score.corpus.strings), np.bool_)
        known[tokens] = True
        windows = self.marked(item[0])
        said = [(bool(known[w.sample.ids(w.k)][w.marks].mean() > 0.5), float("nan")) for w in windows]
        return self._graded(item, windows, said)

    def _graded(self, item: Item, windows: list[Marked], said: list[tuple[Any, float]]) -> Score | None:
        judgements = [
            Judgement(w.right, label, int(w.sample.deciles[w.k]), w.kind, chance)
            for w, (label, chance) in zip(windows, said, strict=True)
        ]
        author = item[1].author if item[1] else ""
        return grade(judgements, item[0].feature, self.name, author, self.judge_name)
