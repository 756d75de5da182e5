"""Surface: what characters alone give away. A classifier of window embeddings, trained for each feature on its own.

Ridge regression (in its dual form, labels +1 and -1, penalty ``PENALTY``) from the vectors of the explain half, firing
windows against background, scored by AUC on the score half. An explanation that does not beat it says no more about
when a feature fires than the look of the text does. Needs no explanation.
"""

from collections.abc import Sequence

import numpy as np

from saelab.analysis.autointerp.embedders import Embedder
from saelab.analysis.autointerp.scorers.base import Item, ScoringConfig, ranked
from saelab.features.explanations import NO_AUTHOR, Score

PENALTY = 1.0


class SurfaceScorer:
    """See the module's docstring."""

    name = "surface"
    needs_explanation = False

    def __init__(self, config: ScoringConfig, embedder: Embedder) -> None:
        self.config, self.embedder = config, embedder
        self.judge_name = f"ridge on {embedder.name}"

    def score(self, items: Sequence[Item]) -> list[Score]:
        """Score features that have background windows to train against."""
        scores = []
        for examples, _ in items:
            if not len(examples.background):
                continue
            vectors = examples.score.corpus.embeddings
            train = vectors[np.concatenate([examples.explain.windows, examples.background.windows])]
            labels = np.where(np.arange(len(train)) < len(examples.explain), 1.0, -1.0)
            labels -= labels.mean()
            gram = train @ train.T
            dual = np.linalg.solve(gram + PENALTY * np.eye(len(train)), labels)
            windows = np.concatenate([examples.score.windows, examples.negatives.windows])
            likeness = vectors[windows] @ (train.T @ dual).astype(np.float32)
            scores.append(ranked(likeness, examples, self.name, NO_AUTHOR, self.judge_name))
        return scores
