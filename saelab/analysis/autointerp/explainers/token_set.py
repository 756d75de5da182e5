"""The token set: "fires on these tokens". Needs no language model, and is the floor that every other must beat.

S is the smallest set of tokens that covers ``COVER`` of the feature's activation mass in the explain half of the text.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from saelab.analysis.autointerp.examples import Corpus, FeatureExamples
from saelab.features.explanations import FLOOR, Explanation
from saelab.features.render import visible

NAME = FLOOR
COVER = 0.9
"""Share of the activation mass that the set covers."""
SHOWN = 8
"""Tokens named in the text; the set itself is in the explanation's ``detail``."""
KEPT = 1000
"""Most tokens of a set."""


class TokenSetExplainer:
    """Explains a feature by the tokens it fires on."""

    name = NAME
    author = NAME

    def explain(self, examples: Sequence[FeatureExamples], control: str = "") -> list[Explanation]:
        """Return one explanation for each feature. ``detail``: ``tokens`` (ids, largest mass first), ``cover``."""
        return [self._explain(one, control) for one in examples]

    def _explain(self, examples: FeatureExamples, control: str) -> Explanation:
        corpus = examples.explain.corpus
        ids, shares = token_masses(corpus, examples.feature)
        count = min(int(np.searchsorted(np.cumsum(shares), COVER - 1e-9)) + 1, len(ids), KEPT)
        kept, cover = ids[:count].tolist(), float(shares[:count].sum())
        named = ", ".join(f"“{visible(corpus.strings[i])}”" for i in kept[:SHOWN])
        more = f" and {count - SHOWN} more" if count > SHOWN else ""
        detail = {"tokens": kept, "cover": cover}
        return Explanation(examples.feature, NAME, f"{named}{more}", explainer=NAME, control=control, detail=detail)


def token_masses(corpus: Corpus, feature: int) -> tuple[Int64[np.ndarray, " tokens"], np.ndarray]:
    """Tokens on which a feature fires in the explain half, and their shares of its activation, largest first."""
    tokens, values = corpus.store.feature(feature)
    window = corpus.windows.of_token[tokens]
    inside = (window >= 0) & ~corpus.windows.scored[window]
    ids, place = np.unique(corpus.ids[tokens[inside]], return_inverse=True)
    mass = np.bincount(place, np.asarray(values[inside], np.float64), minlength=len(ids))
    order = np.argsort(-mass, kind="stable")
    return ids[order].astype(np.int64), mass[order] / max(float(mass.sum()), 1e-30)
