"""Embedding: is the explanation nearer to windows where the feature fires than to others? AUC of the cosine."""

from collections.abc import Sequence

import numpy as np

from saelab.analysis.autointerp.embedders import Embedder
from saelab.analysis.autointerp.scorers.base import Item, ScoringConfig, ranked, wording
from saelab.features.explanations import Score


class EmbeddingScorer:
    """Needs an embedder only: the windows' vectors are made once for all features, the explanations' once each."""

    name = "embedding"
    needs_explanation = True

    def __init__(self, config: ScoringConfig, embedder: Embedder) -> None:
        self.config, self.embedder = config, embedder
        self.judge_name = embedder.name

    def score(self, items: Sequence[Item]) -> list[Score]:
        """Score explanations."""
        queries = self.embedder.queries([wording(item) for item in items])
        scores = []
        for (examples, explanation), query in zip(items, queries, strict=True):
            windows = np.concatenate([examples.score.windows, examples.negatives.windows])
            likeness = examples.score.corpus.embeddings[windows] @ query
            author = explanation.author if explanation else ""
            scores.append(ranked(likeness, examples, self.name, author, self.judge_name))
        return scores
