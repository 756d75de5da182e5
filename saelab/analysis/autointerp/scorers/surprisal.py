"""Surprisal: how far the explanation lowers a language model's loss on windows where the feature fires.

With CE the loss of a window's tokens after a beginning (a worked example, then a description and the window),

    gain = CE after "various unrelated pieces of text" - CE after the explanation

and the score is the AUC of the gain, firing windows against negatives. Any base model will do; a weak one gives small
gains, which is why the mean gains are in ``detail``. The neutral loss of a window is measured once for all features.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from saelab.analysis.autointerp.examples import Corpus, FeatureExamples
from saelab.analysis.autointerp.scorers.base import Item, ScoringConfig, draws, make_score, two_samples, wording
from saelab.analysis.autointerp.scorers.losses import mean_losses_after
from saelab.features.explanations import Explanation, Score

BEGINNING = "Text with: numbers\n1, 2, 3, 14, 159\n\nText with: {}\n"
LONGEST = 48
"""Tokens of an explanation that are read."""
NEUTRAL = "various unrelated pieces of text"


class SurprisalScorer:
    """``model`` is a :class:`~saelab.models.subject.SubjectModel`: the one under study, or any other base model."""

    name = "surprisal"
    needs_explanation = True

    def __init__(self, config: ScoringConfig, model: Any) -> None:
        self.config, self.model, self.judge_name = config, model, str(model.name)
        self._neutral: dict[int, float] = {}

    def score(self, items: Sequence[Item]) -> list[Score]:
        """Score explanations; the windows of a feature share the forward pass of what stands before them."""
        chosen = [(examples, explanation, *self._windows(examples)) for examples, explanation in items]
        corpus = items[0][0].score.corpus if items else None
        if corpus is None:
            return []
        needed = {w for *_, high, low in chosen for w in (*high, *low)} - self._neutral.keys()
        neutral = sorted(needed)
        losses = mean_losses_after(self.model, self._head(NEUTRAL), [self._ids(corpus, w) for w in neutral])
        self._neutral |= dict(zip(neutral, losses, strict=True))
        scores = []
        for examples, explanation, high, low in chosen:
            windows = [*high, *low]
            head = self._head(wording((examples, explanation)))
            losses = mean_losses_after(self.model, head, [self._ids(corpus, w) for w in windows])
            gains = np.array([self._neutral[w] for w in windows]) - losses
            scores.append(self._score(examples, explanation, gains[: len(high)], gains[len(high) :]))
        return scores

    def _score(
        self, examples: FeatureExamples, explanation: Explanation | None, plus: np.ndarray, minus: np.ndarray
    ) -> Score:
        return make_score(
            two_samples(plus, minus),
            examples.feature,
            self.name,
            n=len(plus) + len(minus),
            author=explanation.author if explanation else "",
            judge=self.judge_name,
            detail={"gain_active": float(plus.mean()), "gain_inactive": float(minus.mean())},
        )

    def _windows(self, examples: FeatureExamples) -> tuple[list[int], list[int]]:
        generator = draws(self.config, self.name, examples.feature)
        found = []
        for sample in (examples.score, examples.negatives):
            count = min(self.config.surprisal, len(sample))
            found.append(sample.windows[np.sort(generator.choice(len(sample), count, replace=False))].tolist())
        return found[0], found[1]

    def _head(self, text: str) -> list[int]:
        """Token ids before a window; the end of a long description is cut, so that half of the context is left."""
        tokenizer = self.model.tokenizer
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        before, after = (self._encode(part) for part in BEGINNING.split("{}"))
        room = min(LONGEST, self.model.n_ctx // 2 - len(bos) - len(before) - len(after))
        head = [*bos, *before, *self._encode(text)[: max(room, 0)], *after]
        return head[-(self.model.n_ctx - self.model.n_ctx // 2) :]

    def _ids(self, corpus: Corpus, window: int) -> list[int]:
        """Token ids of a window, as many as half of the context: the store's own when its model is this one."""
        if corpus.store.manifest.get("model_fingerprint") == self.model.fingerprint:
            own: list[int] = corpus.window_ids(window).tolist()
        else:
            own = self._encode(corpus.window_text(window))
        return own[: self.model.n_ctx // 2]

    def _encode(self, text: str) -> list[int]:
        clean = text.encode("utf-8", "replace").decode("utf-8")
        return list(self.model.tokenizer(clean, add_special_tokens=False, verbose=False)["input_ids"])
