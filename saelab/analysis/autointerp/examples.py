"""Examples of a feature, from the feature store alone: windows to explain it by, windows to score on, and negatives.

A *negative* is a window of the same half in which the feature does not fire at all. Its kinds:

* ``random``: any such window;
* ``decoder``, ``coactive``: a window where a neighbour of the feature (by decoder cosine; by tokens in common) fires
  strongly;
* ``embedding``: a window whose text is most like the windows that the feature is explained by.

Random negatives alone flatter any explanation that names the topic; the other kinds are hard, and reported by kind.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64
from pydantic import Field

from saelab.analysis.autointerp.embedders import Embedder
from saelab.analysis.autointerp.neighbours import coactive_neighbours, decoder_neighbours
from saelab.analysis.autointerp.samplers import SAMPLERS, deciles_of, quantile
from saelab.analysis.autointerp.windows import Windows, cut_windows, window_matrix, window_maxima
from saelab.core.config import Config
from saelab.features import layout
from saelab.features.store import FeatureStore

ACTIVE = "active"
"""Kind of a window in which the feature fires."""
KINDS = ("random", "decoder", "coactive", "embedding")
"""Kinds of negatives."""
MOST_LOOKED_AT = 20_000
"""Windows compared by embedding; of more, this many drawn at random."""


class ExamplesConfig(Config):
    """Which windows a feature is explained by and scored on."""

    length: int = Field(default=32, ge=2)
    """Tokens in a window."""
    explain: int = Field(default=40, ge=1)
    """Windows to explain a feature by."""
    score: int = Field(default=50, ge=1)
    """Windows where it fires to score on."""
    sampler: str = "quantile"
    """How the windows to explain by are chosen: quantile, top, mixed, random. Those to score on are by quantile."""
    contrast: int = Field(default=5, ge=0)
    """Hard negatives shown to a contrastive explainer."""
    random: int = Field(default=20, ge=0)
    """Random negatives to score on."""
    decoder: int = Field(default=10, ge=0)
    """Negatives from neighbours by decoder cosine (these need the SAE; without it, the store's nearest feature)."""
    coactive: int = Field(default=10, ge=0)
    """Negatives from neighbours by tokens in common."""
    embedding: int = Field(default=10, ge=0)
    """Negatives by likeness of the text (these need an embedder)."""
    neighbours: int = Field(default=10, ge=1)
    """Neighbours looked at for each kind."""
    least: int = Field(default=2, ge=1)
    """A feature with fewer windows than this in either half is left out."""
    seed: int = Field(default=0, ge=0)
    """Seed of the halves and of all draws."""


@dataclass(frozen=True, eq=False)
class Sample:
    """Some windows and one feature's values in them. Row k of every array is window k."""

    corpus: "Corpus"
    """Where the text is."""
    windows: Int64[np.ndarray, " n"]
    """Numbers of the windows."""
    values: Float32[np.ndarray, "n length"]
    """The feature's value at each token, 0 where it does not fire."""
    deciles: Int64[np.ndarray, " n"]
    """Decile of the feature's windows that each is in, 1 weakest to 10; 0 for negatives."""
    kinds: tuple[str, ...]
    """``active``, or the kind of negative."""

    def __len__(self) -> int:
        return len(self.windows)

    def take(self, chosen: Int64[np.ndarray, " k"]) -> "Sample":
        """Return some of the windows, in the order given."""
        kinds = tuple(self.kinds[i] for i in chosen.tolist())
        return Sample(self.corpus, self.windows[chosen], self.values[chosen], self.deciles[chosen], kinds)

    def ids(self, k: int) -> Int64[np.ndarray, " tokens"]:
        """Token ids of window k."""
        return self.corpus.window_ids(int(self.windows[k]))

    def tokens(self, k: int) -> list[str]:
        """Texts of the tokens of window k."""
        strings = self.corpus.strings
        return [strings[i] for i in self.ids(k).tolist()]

    def text(self, k: int) -> str:
        """Text of window k."""
        return self.corpus.store.vocabulary.text(self.ids(k))

    @property
    def maxima(self) -> Float32[np.ndarray, " n"]:
        """Largest value in each window."""
        largest: np.ndarray = self.values.max(1, initial=0.0)
        return largest


@dataclass(frozen=True, eq=False)
class FeatureExamples:
    """All that is shown of one feature. ``explain`` and ``contrast`` share no row of text with the other two."""

    feature: int
    """The feature."""
    maximum: float
    """Its largest value in the store."""
    explain: Sample
    """Windows where it fires, to explain it by, strongest first."""
    contrast: Sample
    """Hard negatives of the explain half."""
    background: Sample
    """Random negatives of the explain half, as many as ``explain`` has windows."""
    score: Sample
    """Windows where it fires, to score on: the same number from each decile."""
    negatives: Sample
    """Windows of the score half where it does not fire."""


class Corpus:
    """A feature store cut into windows: gives the examples of its features.

    ``W_dec`` (d_sae, d_in) gives decoder neighbours, ``embedder`` embedding neighbours; kinds of negatives whose means
    are not there are replaced by random ones.
    """

    def __init__(
        self,
        store: FeatureStore,
        config: ExamplesConfig,
        *,
        features: Sequence[int] | np.ndarray | None = None,
        W_dec: Any = None,
        embedder: Embedder | None = None,
    ) -> None:
        self.store, self.config, self.embedder = store, config, embedder
        self.windows: Windows = cut_windows(store, config.length, config.seed)
        self.features = np.arange(store.n_features) if features is None else np.asarray(features, np.int64)
        self._place = {feature: k for k, feature in enumerate(self.features.tolist())}
        self._halves = {scored: np.flatnonzero(self.windows.scored == scored) for scored in (False, True)}
        self._neighbours = self._find_neighbours(W_dec)
        self._sampler = SAMPLERS[config.sampler]

    def _find_neighbours(self, W_dec: Any) -> dict[str, np.ndarray]:
        config, found = self.config, {}
        if (config.decoder or config.contrast) and len(self.features):
            if W_dec is not None:
                found["decoder"] = decoder_neighbours(W_dec, self.features, config.neighbours)
            elif "nearest" in self.store.columns:
                found["decoder"] = np.asarray(self.store.column("nearest"), np.int64)[self.features][:, None]
        if config.coactive and len(self.features):
            found["coactive"] = coactive_neighbours(self.store, self.features, config.neighbours)
        return found

    # text -------------------------------------------------------------------------------------------------------

    @cached_property
    def strings(self) -> list[str]:
        """Text of every token id."""
        return self.store.vocabulary.strings(range(len(self.store.vocabulary)))

    @cached_property
    def ids(self) -> Int64[np.ndarray, " tokens"]:
        """Id of every token of the store."""
        return np.asarray(self.store.array(layout.IDS), np.int64)

    def window_ids(self, window: int) -> Int64[np.ndarray, " tokens"]:
        """Token ids of a window."""
        return self.ids[self.windows.starts[window] : self.windows.stops[window]]

    def window_text(self, window: int) -> str:
        """Text of a window."""
        return self.store.vocabulary.text(self.window_ids(window))

    @cached_property
    def texts(self) -> list[str]:
        """Text of every window."""
        return [self.window_text(window) for window in range(len(self.windows))]

    @cached_property
    def embeddings(self) -> Float32[np.ndarray, "windows d"]:
        """Embedding, of norm 1, of every window; made once, whatever the number of features."""
        assert self.embedder is not None, "embeddings without an embedder"
        return self.embedder.documents(self.texts)

    def share_embeddings(self, embeddings: Float32[np.ndarray, "windows d"]) -> None:
        """Take the embeddings of another corpus of the same windows."""
        assert len(embeddings) == len(self.windows), "embeddings of other windows"
        self.__dict__["embeddings"] = embeddings

    # examples ---------------------------------------------------------------------------------------------------

    def examples(self, feature: int) -> FeatureExamples | None:
        """Return the examples of a feature; None when it has too few windows, or fires in all of them."""
        config = self.config
        fired, values = window_maxima(self.store, self.windows, feature)
        scored = self.windows.scored[fired]
        if min(np.count_nonzero(scored), np.count_nonzero(~scored)) < config.least:
            return None
        deciles = deciles_of(values)
        generators = [np.random.default_rng([config.seed, feature, stream]) for stream in range(5)]

        def active(half: bool, sampler: Any, count: int) -> Sample:
            mine = np.flatnonzero(scored == half)
            chosen = mine[sampler(values[mine], deciles[mine], count, generators[half])]
            return self._sample(feature, fired[chosen], deciles[chosen], (ACTIVE,) * len(chosen))

        explain = active(False, self._sampler, config.explain)
        score = active(True, quantile, config.score)
        wanted = {kind: getattr(config, kind) for kind in KINDS}
        negatives = self._negatives(fired, True, wanted, explain, feature=feature, generator=generators[2])
        if not len(negatives):
            return None
        hard = {"decoder": -(-config.contrast // 2), "coactive": config.contrast // 2}
        contrast = self._negatives(fired, False, hard, explain, feature=feature, generator=generators[3])
        plain = {"random": len(explain)}
        background = self._negatives(fired, False, plain, explain, feature=feature, generator=generators[4])
        maximum = float(self.store.column("max")[feature])
        return FeatureExamples(feature, maximum, explain, contrast, background, score, negatives)

    def _sample(
        self, feature: int, chosen: Int64[np.ndarray, " n"], deciles: Int64[np.ndarray, " n"], kinds: tuple[str, ...]
    ) -> Sample:
        return Sample(self, chosen, window_matrix(self.store, self.windows, feature, chosen), deciles, kinds)

    def _negatives(
        self,
        fired: Int64[np.ndarray, " m"],
        scored: bool,
        wanted: dict[str, int],
        explain: Sample,
        *,
        feature: int,
        generator: np.random.Generator,
    ) -> Sample:
        half = self._halves[scored]
        free = np.zeros(len(self.windows), np.bool_)
        free[half] = True
        free[fired] = False
        chosen: list[int] = []
        kinds: list[str] = []

        def take(kind: str, windows: Sequence[int]) -> None:
            free[list(windows)] = False
            chosen.extend(windows)
            kinds.extend([kind] * len(windows))

        for kind in ("decoder", "coactive"):
            if wanted.get(kind) and kind in self._neighbours:
                neighbours = self._neighbours[kind][self._place[feature]]
                take(kind, self._of_neighbours(neighbours, free, wanted[kind]))
        if wanted.get("embedding") and self.embedder is not None:
            take("embedding", self._alike(explain, np.flatnonzero(free), wanted["embedding"], generator))
        missing = sum(wanted.values()) - len(chosen)
        candidates = np.flatnonzero(free)
        drawn = generator.choice(candidates, min(missing, len(candidates)), replace=False)
        take("random", np.sort(drawn).tolist())
        numbers = np.asarray(chosen, np.int64)
        values = np.zeros((len(numbers), self.windows.length), np.float32)
        return Sample(self, numbers, values, np.zeros(len(numbers), np.int64), tuple(kinds))

    def _of_neighbours(self, neighbours: np.ndarray, free: np.ndarray, count: int) -> list[int]:
        """Windows where neighbours fire strongest, the same number from each neighbour as far as they have them."""
        found: list[list[int]] = []
        for neighbour in neighbours.tolist():
            if neighbour < 0:
                continue
            tokens, _ = self.store.feature(neighbour)
            windows = self.windows.of_token[tokens[self.store.strongest(neighbour, True)]]
            windows = windows[windows >= 0]
            found.append(windows[free[windows]].tolist())
        chosen: dict[int, None] = {}
        for place in range(max(map(len, found), default=0)):
            for windows_of_one in found:
                if place < len(windows_of_one) and len(chosen) < count:
                    chosen.setdefault(windows_of_one[place])
        return list(chosen)

    def _alike(
        self, explain: Sample, candidates: Int64[np.ndarray, " m"], count: int, generator: np.random.Generator
    ) -> list[int]:
        if len(candidates) > MOST_LOOKED_AT:
            candidates = np.sort(generator.choice(candidates, MOST_LOOKED_AT, replace=False))
        centre = self.embeddings[explain.windows].mean(0)
        likeness = self.embeddings[candidates] @ centre
        best: list[int] = candidates[np.argsort(-likeness, kind="stable")[:count]].tolist()
        return best
