"""Example-embedding: are held-out firing windows more like firing windows than others are? Needs no explanation.

In each of ``rounds`` rounds, 10 firing windows of one decile and 10 negatives are prototypes; a held-out firing window
of that decile and a held-out negative are queries, and

    delta(query) = mean cosine to the firing prototypes - mean cosine to the negative ones

The score is the AUC of delta between the two kinds of queries; ``detail`` has the mean deltas. A query is never among
its own prototypes, also when texts are equal.
"""

from collections.abc import Sequence

import numpy as np

from saelab.analysis.autointerp.embedders import Embedder
from saelab.analysis.autointerp.examples import FeatureExamples
from saelab.analysis.autointerp.scorers.base import Item, ScoringConfig, draws, make_score, two_samples
from saelab.features.explanations import Score


class ExampleEmbeddingScorer:
    """See the module's docstring."""

    name = "example_embedding"
    needs_explanation = False

    def __init__(self, config: ScoringConfig, embedder: Embedder) -> None:
        self.config, self.embedder = config, embedder
        self.judge_name = embedder.name

    def score(self, items: Sequence[Item]) -> list[Score]:
        """Score features that have two windows in some decile and two negatives."""
        return [score for examples, _ in items if (score := self._score(examples)) is not None]

    def _score(self, examples: FeatureExamples) -> Score | None:
        config, deciles = self.config, examples.score.deciles
        usable = [d for d in np.unique(deciles).tolist() if (deciles == d).sum() >= 2]
        if not usable or len(examples.negatives) < 2:
            return None
        generator = draws(config, self.name, examples.feature)
        vectors = examples.score.corpus.embeddings
        high, low = vectors[examples.score.windows], vectors[examples.negatives.windows]
        all_of = np.concatenate([high, low])
        plus, minus = np.zeros(config.rounds), np.zeros(config.rounds)
        for number in range(config.rounds):
            decile = usable[int(generator.integers(len(usable)))]
            query, *same = generator.permutation(np.flatnonzero(deciles == decile)).tolist()
            other, *rest = generator.permutation(len(low)).tolist()
            contrast = high[same[: config.prototypes]].mean(0) - low[rest[: config.prototypes]].mean(0)
            plus[number], minus[number] = all_of[[query, len(high) + other]] @ contrast
        return make_score(
            two_samples(plus, minus),
            examples.feature,
            self.name,
            n=2 * config.rounds,
            judge=self.judge_name,
            detail={"delta_plus": float(plus.mean()), "delta_minus": float(minus.mean())},
        )
