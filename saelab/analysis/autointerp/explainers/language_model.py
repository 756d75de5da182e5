"""An explanation written by a language model that is shown windows with the strong tokens marked.

Variants: ``llm``; ``llm-contrastive``, which also sees hard negatives; ``llm-logits``, which also sees the tokens whose
logits the feature raises most.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int64

from saelab.analysis.autointerp import prompts
from saelab.analysis.autointerp.examples import FeatureExamples, Sample
from saelab.analysis.autointerp.judge import Judge, Request, ask_all
from saelab.analysis.autointerp.parse import parse_explanation
from saelab.features.explanations import Explanation

VARIANTS = ("llm", "llm-contrastive", "llm-logits")
THRESHOLD = 0.3
"""Tokens with at least this share of their window's largest activation are marked."""
LISTED = 10
"""Strong tokens listed with their activations below each window."""
CONTRASTIVE_WINDOWS = 15
"""Active windows that the contrastive variant shows, beside its hard negatives."""
MAX_TOKENS = 500


def strong(values: Float32[np.ndarray, "n length"], threshold: float = THRESHOLD) -> np.ndarray:
    """Return which tokens are strong in their window: at least ``threshold`` of its maximum, and active at all."""
    marked: np.ndarray = (values > 0) & (values >= threshold * values.max(1, keepdims=True, initial=0.0))
    return marked


def levels(values: Float32[np.ndarray, " n"], maximum: float) -> Int64[np.ndarray, " n"]:
    """Return activations as 0 .. 10: ``clamp(ceil(10 a / a_max), 0, 10)``."""
    scaled = np.ceil(10 * np.asarray(values, np.float64) / max(maximum, 1e-30) - 1e-6)
    return np.clip(scaled, 0, 10).astype(np.int64)


class LanguageModelExplainer:
    """Explains features with a judge; a reply without an explanation gives none, and is counted."""

    def __init__(self, judge: Judge, variant: str = "llm") -> None:
        assert variant in VARIANTS, f"{variant} is no variant"
        self.judge, self.name = judge, variant
        self.author = f"{variant}:{judge.name}:v{prompts.VERSION}"
        self.failures = 0
        """Replies in which there was no explanation."""

    def request(self, examples: FeatureExamples) -> Request:
        """Return the question for one feature."""
        shown, contrast = examples.explain, []
        if self.name == "llm-contrastive":
            places = np.linspace(0, len(shown) - 1, min(CONTRASTIVE_WINDOWS, len(shown))).astype(np.int64)
            shown = shown.take(places)
            contrast = [examples.contrast.text(k) for k in range(len(examples.contrast))]
        markers = prompts.markers_for([shown.text(k) for k in range(len(shown))])
        texts, tokens = zip(*(self._shown(shown, k, examples.maximum, markers) for k in range(len(shown))), strict=True)
        messages = prompts.explain_messages(
            texts, tokens, markers, contrast=contrast, promoted=self._promoted(examples)
        )
        return Request(messages, max_tokens=MAX_TOKENS)

    def _shown(
        self, sample: Sample, k: int, maximum: float, markers: tuple[str, str]
    ) -> tuple[str, list[tuple[str, int]]]:
        ids, values = sample.ids(k), sample.values[k]
        marked = strong(values[None])[0]
        text = prompts.highlight(sample.corpus.store.vocabulary, ids, marked, markers)
        level = levels(values, maximum)
        best = np.sort(np.argsort(-values, kind="stable")[:LISTED])
        pairs = [(sample.corpus.strings[ids[j]], int(level[j])) for j in best.tolist() if j < len(ids) and marked[j]]
        return text, pairs

    def _promoted(self, examples: FeatureExamples) -> list[str]:
        store = examples.explain.corpus.store
        if self.name != "llm-logits" or "logit_top_ids" not in store.columns:
            return []
        return store.vocabulary.strings(store.column("logit_top_ids")[examples.feature])

    def explain(self, examples: Sequence[FeatureExamples], control: str = "") -> list[Explanation]:
        """Return an explanation for each feature that got one."""
        replies = ask_all(self.judge, [self.request(one) for one in examples])
        found = []
        for one, reply in zip(examples, replies, strict=True):
            text = parse_explanation(reply.text)
            if text is None:
                self.failures += 1
                continue
            found.append(
                Explanation(
                    *(one.feature, self.author, text),
                    explainer=self.name,
                    model=self.judge.name,
                    prompt=prompts.VERSION,
                    control=control,
                )
            )
        return found
