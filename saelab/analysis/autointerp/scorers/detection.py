"""Detection: telling windows where the feature fires from windows where it does not, by its explanation.

A judge gets the explanation and ``shown`` plain windows in random order and answers a list of 0 and 1. Without a
judge, a token set is scored by its own rule: a window with any of its tokens is called active.
"""

from collections.abc import Sequence

import numpy as np

from saelab.analysis.autointerp import prompts
from saelab.analysis.autointerp.judge import Judge, Reply, Request, ask_all
from saelab.analysis.autointerp.parse import parse_labels
from saelab.analysis.autointerp.scorers.base import (
    Item,
    Judgement,
    ScoringConfig,
    draws,
    grade,
    kind_of,
    tokens_of,
    windows_of,
)
from saelab.features.explanations import Score

RULE = "token rule"
"""Name of the judge that applies a token set by itself."""


def chances_of(reply: Reply, count: int) -> list[float]:
    """Probability of "1" at each place of a list of 0 and 1: ``p1 / (p0 + p1)``; nan when it cannot be told."""
    found = []
    for token, likeliest in reply.logprobs:
        if token.strip() not in ("0", "1"):
            continue
        p = {"0": 0.0, "1": 0.0}
        for other, logprob in likeliest:
            if other.strip() in p:
                p[other.strip()] += float(np.exp(logprob))
        total = p["0"] + p["1"]
        found.append(p["1"] / total if total > 0 else float("nan"))
    return found if len(found) == count else [float("nan")] * count


def answers(reply: Reply, count: int) -> list[tuple[bool | None, float]]:
    """Read what a judge says of each window, and how sure it is; an unreadable reply says nothing of all of them."""
    labels = None if reply.refused or reply.error else parse_labels(reply.text, count)
    if labels is None:
        return [(None, float("nan"))] * count
    return [(bool(label), chance) for label, chance in zip(labels, chances_of(reply, count), strict=True)]


class DetectionScorer:
    """See the module's docstring."""

    name = "detection"
    needs_explanation = True

    def __init__(self, config: ScoringConfig, judge: Judge | None = None) -> None:
        self.config, self.judge = config, judge
        self.judge_name = judge.name if judge else RULE

    def questions(self, item: Item) -> tuple[list[Request], list[list[int]]]:
        """Return the questions about one feature, and which windows (of ``windows_of``) each shows."""
        examples, explanation = item
        assert explanation is not None, "detection scores an explanation"
        windows = windows_of(examples)
        order = draws(self.config, self.name, examples.feature).permutation(len(windows)).tolist()
        groups = [order[k : k + self.config.shown] for k in range(0, len(order), self.config.shown)]
        requests = []
        for group in groups:
            texts = [windows[w][0].text(windows[w][1]) for w in group]
            messages = prompts.detection_messages(explanation.text, texts)
            requests.append(Request(messages, max_tokens=8 + 4 * len(group), logprobs=self.config.logprobs))
        return requests, groups

    def score(self, items: Sequence[Item]) -> list[Score]:
        """Score explanations; without a judge, those that are token sets."""
        if self.judge is None:
            return [score for item in items if (score := self._by_rule(item)) is not None]
        asked = [self.questions(item) for item in items]
        replies = iter(ask_all(self.judge, [request for requests, _ in asked for request in requests]))
        scores = []
        for (examples, explanation), (_, groups) in zip(items, asked, strict=True):
            windows, judgements = windows_of(examples), []
            for group in groups:
                for w, (said, chance) in zip(group, answers(next(replies), len(group)), strict=True):
                    sample, k, truth = windows[w]
                    judgements.append(Judgement(truth, said, int(sample.deciles[k]), kind_of(sample, k), chance))
            author = explanation.author if explanation else ""
            scores.append(grade(judgements, examples.feature, self.name, author, self.judge_name))
        return [score for score in scores if score is not None]

    def _by_rule(self, item: Item) -> Score | None:
        examples, explanation = item
        tokens = tokens_of(explanation)
        if tokens is None or explanation is None:
            return None
        known = np.zeros(len(examples.score.corpus.strings), np.bool_)
        known[tokens] = True
        judgements = [
            Judgement(truth, bool(known[sample.ids(k)].any()), int(sample.deciles[k]), kind_of(sample, k))
            for sample, k, truth in windows_of(examples)
        ]
        return grade(judgements, examples.feature, self.name, explanation.author, self.judge_name)
