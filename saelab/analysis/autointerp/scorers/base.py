"""What scorers share: their settings, the draws of a feature, and the arithmetic of yes-or-no judgements."""

import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from pydantic import Field

from saelab.analysis.autointerp.examples import ACTIVE, FeatureExamples
from saelab.analysis.autointerp.explainers.token_set import SHOWN
from saelab.analysis.autointerp.intervals import Estimate, auc, balanced
from saelab.core.config import Config
from saelab.features.explanations import Explanation, Score

Item = tuple[FeatureExamples, Explanation | None]
"""A feature's examples and the explanation to score (None for scorers that need none)."""


class ScoringConfig(Config):
    """How much each scorer looks at."""

    shown: int = Field(default=5, ge=1)
    """Windows in one question of detection and fuzzing."""
    logprobs: bool = False
    """Ask for token probabilities, which give detection and fuzzing an AUC."""
    threshold: float = Field(default=0.3, gt=0, le=1)
    """Tokens with this share of their window's largest activation are marked."""
    intruder_rounds: int = Field(default=10, ge=1)
    """Questions of the intruder scorer for each feature."""
    intruder_shown: int = Field(default=5, ge=3)
    """Windows in each of them, the intruder included."""
    intruder_from: str = "negatives"
    """Where the intruder is from: negatives, or another decile (``decile``)."""
    rounds: int = Field(default=20, ge=1)
    """Rounds of example-embedding."""
    prototypes: int = Field(default=10, ge=1)
    """Windows of each class in a round."""
    surprisal: int = Field(default=10, ge=1)
    """Windows of each class whose loss is measured."""
    simulated: int = Field(default=10, ge=1)
    """Windows that are simulated, from all deciles."""
    kl: float = Field(default=0.5, gt=0)
    """Steering strength of the intervention, as KL (nats) of the next token's distribution."""
    generated: int = Field(default=12, ge=1)
    """Tokens written under steering."""
    texts: int = Field(default=2, ge=1)
    """Beginnings that are continued under each feature, the same for all."""
    seed: int = Field(default=0, ge=0)
    """Seed of orders and draws."""


@runtime_checkable
class Scorer(Protocol):
    """Scores features, many at once so that judges are asked many questions at once."""

    name: str
    """Name of the score."""
    judge_name: str
    """Who judges."""
    needs_explanation: bool
    """Whether an explanation is scored, or the feature itself."""

    def score(self, items: Sequence[Item]) -> list[Score]:
        """Return the scores of the items that can be scored, in their order."""


def draws(config: ScoringConfig, scorer: str, feature: int) -> np.random.Generator:
    """Return the generator of one scorer's draws for one feature."""
    return np.random.default_rng([config.seed, feature, zlib.crc32(scorer.encode())])


def settings_of(*parts: Any) -> str:
    """Return a fingerprint of settings (any JSON-able values and configs)."""
    plain = [part.model_dump(mode="json") if isinstance(part, Config) else part for part in parts]
    return f"{zlib.crc32(json.dumps(plain, sort_keys=True, default=str).encode()):08x}"


@dataclass(frozen=True)
class Judgement:
    """One window that a judge called active (True), not active (False), or not at all (None)."""

    truth: bool
    """Whether it is."""
    said: bool | None
    """What the judge said; None when the answer could not be read."""
    decile: int
    """Decile of a window where the feature fires, 0 for negatives."""
    kind: str
    """``active``, or the kind of negative."""
    chance: float = float("nan")
    """Probability of "active" that the judge gave, if it was asked."""

    @property
    def right(self) -> bool:
        """An unreadable answer is a wrong one."""
        return self.said is not None and self.said == self.truth


def grade(judgements: Sequence[Judgement], feature: int, scorer: str, author: str, judge: str) -> Score | None:
    """Return balanced accuracy with its parts; None when a class has no window.

    ``detail``: ``tpr``, ``tnr``, ``precision``, ``f1`` (the real one, of precision and recall), ``auc`` (when there are
    probabilities), ``deciles`` and ``kinds``: right answers and windows of each.
    """
    positives = [j for j in judgements if j.truth]
    negatives = [j for j in judgements if not j.truth]
    if not positives or not negatives:
        return None
    hits, rejections = sum(j.right for j in positives), sum(j.right for j in negatives)
    alarms = sum(j.said is True for j in negatives)
    estimate = balanced(hits, len(positives), rejections, len(negatives))
    detail: dict[str, Any] = {
        "tpr": hits / len(positives),
        "tnr": rejections / len(negatives),
        "precision": hits / (hits + alarms) if hits + alarms else 0.0,
        "f1": 2 * hits / (hits + alarms + len(positives)),
        "deciles": tally((j.decile, j.right) for j in positives),
        "kinds": tally((j.kind, j.right) for j in negatives),
    }
    chances = np.array([j.chance for j in judgements])
    if np.isfinite(chances).all():
        detail["auc"] = auc(chances, np.array([j.truth for j in judgements])).value
    failures = sum(j.said is None for j in judgements)
    return make_score(
        estimate, feature, scorer, n=len(judgements), failures=failures, author=author, judge=judge, detail=detail
    )


def ranked(likeness: np.ndarray, examples: FeatureExamples, scorer: str, author: str, judge: str) -> Score:
    """AUC of a number given to each score window and then to each negative; per decile and per kind in ``detail``."""
    count = len(examples.score)
    high, low, kinds = likeness[:count], likeness[count:], np.array(examples.negatives.kinds)
    deciles = examples.score.deciles
    detail = {
        "deciles": {int(d): two_samples(high[deciles == d], low).value for d in np.unique(deciles)},
        "kinds": {kind: two_samples(high, low[kinds == kind]).value for kind in dict.fromkeys(kinds.tolist())},
    }
    estimate = two_samples(high, low)
    return make_score(estimate, examples.feature, scorer, n=len(likeness), author=author, judge=judge, detail=detail)


def two_samples(high: np.ndarray, low: np.ndarray) -> Estimate:
    """AUC of telling ``high`` from ``low``: the chance that one of the first is larger than one of the second."""
    return auc(np.concatenate([high, low]), np.arange(len(high) + len(low)) < len(high))


def make_score(
    estimate: Estimate,
    feature: int,
    scorer: str,
    *,
    n: int,
    failures: int = 0,
    author: str = "",
    judge: str = "",
    detail: dict[str, Any] | None = None,
) -> Score:
    """Return a score; control and settings are put in by the caller of the scorer."""
    return Score(
        *(feature, scorer, estimate.value, estimate.low, estimate.high, n, failures, author),
        judge=judge,
        detail=detail or {},
    )


def tally(pairs: Iterable[tuple[Any, bool]]) -> dict[Any, list[int]]:
    """Right answers and answers of each key, keys in order."""
    found: dict[Any, list[int]] = {}
    for key, right in pairs:
        cell = found.setdefault(key, [0, 0])
        cell[0] += right
        cell[1] += 1
    return dict(sorted(found.items()))


def windows_of(examples: FeatureExamples) -> list[tuple[Any, int, bool]]:
    """Return every window to score: (sample, number in it, whether the feature fires there)."""
    return [(examples.score, k, True) for k in range(len(examples.score))] + [
        (examples.negatives, k, False) for k in range(len(examples.negatives))
    ]


def tokens_of(explanation: Explanation | None) -> np.ndarray | None:
    """Token ids of a token-set explanation; None for any other."""
    tokens = explanation.detail.get("tokens") if explanation is not None else None
    return np.asarray(tokens, np.int64) if isinstance(tokens, list | tuple) else None


def wording(item: Item) -> str:
    """What a model or an embedder reads: the words of an explanation; of a token set its tokens as they are in texts.

    (In the words of a token set tokens stand in quotation marks, and a newline as a sign: neither is in any text.)
    """
    examples, explanation = item
    tokens = tokens_of(explanation)
    if tokens is None:
        return explanation.text if explanation is not None else ""
    strings = examples.score.corpus.strings
    return " ".join(strings[token] for token in tokens[:SHOWN].tolist())


def kind_of(sample: Any, k: int) -> str:
    """Kind of a window; ``active`` where the feature fires."""
    return str(sample.kinds[k]) if len(sample.kinds) else ACTIVE
