"""Comparing two SAEs by what their features mean: explanations' embeddings, beside decoder cosine and correlation.

For each explained feature of A, its best match among the explained features of B by cosine of the explanations'
embeddings; the decoder cosine and the correlation of activations of that pair; and the best match by each of those.
Both directions, since a best match is not mutual. How far to trust it depends on the explanations and the embedder:
random pairs are the control (``random_*``).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int64

from saelab.analysis.autointerp.embedders import Embedder
from saelab.core.errors import ConfigError
from saelab.core.result import Result
from saelab.features.explanations import Explanations
from saelab.features.store import FeatureStore

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

BLOCK = 2048
"""Features of A compared at once."""


@dataclass(frozen=True)
class Direction:
    """Best matches of the features of one SAE in the other."""

    name: str
    """``A to B`` or ``B to A``."""
    features: int
    """Explained features of the first."""
    mean_meaning: float
    """Mean over them of the largest cosine of explanations."""
    random_meaning: float
    """Mean cosine with the explanation of a random feature of the other."""
    mean_decoder: float
    """Mean of the largest decoder cosine; nan when the decoders are not of the same site and width."""
    matched_decoder: float
    """Mean decoder cosine of the pairs matched by meaning."""
    random_decoder: float
    """Mean decoder cosine of random pairs."""
    mean_correlation: float
    """Mean of the largest correlation of activations; nan when the texts differ."""
    matched_correlation: float
    """Mean correlation of the pairs matched by meaning."""
    random_correlation: float
    """Mean correlation of random pairs."""
    agree_decoder: float
    """Share whose best match by meaning is the one by decoder."""
    agree_correlation: float
    """Share whose best match by meaning is the one by correlation."""


@dataclass(frozen=True, eq=False, repr=False)
class SemanticSimilarity(Result):
    """Two SAEs compared by meaning."""

    directions: tuple[Direction, Direction]
    """A to B and B to A."""
    embedder: str
    """What made the vectors."""
    pairs: "pd.DataFrame"
    """One row for each explained feature of A: ``feature``, its ``match`` by meaning, the cosine of the explanations
    (``meaning``), ``decoder`` cosine and ``correlation`` of the two, and both explanations."""

    def __repr__(self) -> str:
        found = ", ".join(f"{d.name} {d.mean_meaning:.3f} (chance {d.random_meaning:.3f})" for d in self.directions)
        return f"SemanticSimilarity({found}, by {self.embedder})"

    def figures(self) -> "dict[str, tuple[Figure, pd.DataFrame]]":
        """Mean best cosine of explanations, both ways, beside random pairs."""
        from plotly import graph_objects as go

        from saelab.core.plotting import BLUE, ORANGE, figure

        frame = self.to_frame()
        columns = (("best", "mean_meaning", BLUE), ("random pair", "random_meaning", ORANGE))
        bars = [go.Bar(x=frame["name"], y=frame[c], name=name, marker={"color": colour}) for name, c, colour in columns]
        axes = {"xaxis_title": "direction", "yaxis_title": "cosine of explanations (mean)"}
        return {"meaning": (figure(*bars, barmode="group", **axes), frame)}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without the pairs."""
        return {"embedder": self.embedder, "directions": [asdict(d) for d in self.directions]}

    def to_frame(self) -> "pd.DataFrame":
        """One row for each direction."""
        import pandas as pd

        return pd.DataFrame([asdict(d) for d in self.directions])


def semantic_similarity(
    a: FeatureStore,
    b: FeatureStore,
    embedder: Embedder,
    decoders: tuple[Any, Any] | None = None,
    seed: int = 0,
) -> SemanticSimilarity:
    """Compare two stores by their explanations. ``decoders`` (each (d_sae, d_in)) adds decoder cosines.

    Correlations are taken when both stores hold the same text. Raises :class:`ConfigError` when one has no explanation.
    """
    import pandas as pd

    texts = []
    for store in (a, b):
        texts.append(Explanations(store).texts())
        if not texts[-1]:
            raise ConfigError(f"{store.path} has no explanations; run saelab explain {store.path}")
    features = [np.array(sorted(found), np.int64) for found in texts]
    vectors = [
        embedder.documents([found[i] for i in numbers.tolist()]) for found, numbers in zip(texts, features, strict=True)
    ]
    space = ("site", "model_fingerprint")
    units = None
    if decoders is not None and all(a.manifest.get(key) == b.manifest.get(key) for key in space):
        units = [_unit(w, numbers) for w, numbers in zip(decoders, features, strict=True)]
    same = ("source_fingerprint", "n_tokens", "rows", "model_fingerprint")
    codes = None
    if all(a.manifest.get(key) == b.manifest.get(key) for key in same):
        codes = [_standardised(store, numbers) for store, numbers in zip((a, b), features, strict=True)]
    forth, found = _direction("A to B", vectors, units, codes, np.random.default_rng([seed, 0]))
    units_back, codes_back = (None if of is None else of[::-1] for of in (units, codes))
    other, _ = _direction("B to A", vectors[::-1], units_back, codes_back, np.random.default_rng([seed, 1]))
    pairs = pd.DataFrame({"feature": features[0], **found, "match": features[1][found["match"]]})
    for name, of, column in (("explanation", texts[0], "feature"), ("explanation of match", texts[1], "match")):
        pairs[name] = [of[k] for k in pairs[column].tolist()]
    return SemanticSimilarity((forth, other), embedder.name, pairs)


def _direction(
    name: str, vectors: Sequence[np.ndarray], units: Any, codes: Any, generator: np.random.Generator
) -> tuple[Direction, dict[str, np.ndarray]]:
    """Match the features of the first by meaning; also the matches, with their similarities of each kind."""
    meaning = _best(vectors[0], vectors[1])
    other = generator.integers(len(vectors[1]), size=len(vectors[0]))
    nothing = np.full(len(other), np.nan)
    decoder: list[np.ndarray] = [nothing, nothing]
    correlation: list[np.ndarray] = [nothing, nothing]
    by_decoder = by_correlation = None
    if units is not None:
        by_decoder = _best(units[0], units[1])
        decoder = [(units[0] * units[1][pair]).sum(1) for pair in (meaning[0], other)]
    if codes is not None:
        by_correlation = _best_correlation(codes[0], codes[1])
        correlation = [_correlation(codes[0], codes[1], pair) for pair in (meaning[0], other)]
    direction = Direction(
        name,
        len(vectors[0]),
        float(meaning[1].mean()),
        float((vectors[0] * vectors[1][other]).sum(1).mean()),
        *(_mean(by_decoder), *(float(values.mean()) for values in decoder)),
        *(_mean(by_correlation), *(float(values.mean()) for values in correlation)),
        *(_agreement(meaning, best) for best in (by_decoder, by_correlation)),
    )
    matches = {"match": meaning[0], "meaning": meaning[1], "decoder": decoder[0], "correlation": correlation[0]}
    return direction, matches


Best = tuple[Int64[np.ndarray, " n"], Float[np.ndarray, " n"]]


def _best(x: np.ndarray, y: np.ndarray) -> Best:
    where, value = np.zeros(len(x), np.int64), np.zeros(len(x))
    for k in range(0, len(x), BLOCK):
        cosine = x[k : k + BLOCK] @ y.T
        where[k : k + BLOCK], value[k : k + BLOCK] = cosine.argmax(1), cosine.max(1)
    return where, value


def _unit(decoder: Any, features: np.ndarray) -> np.ndarray:
    rows = decoder.detach().float().cpu().numpy()[features]
    made: np.ndarray = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
    return made


def _standardised(store: FeatureStore, features: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, int]:
    """Activations (features, tokens), sparse; their means and standard deviations over the kept tokens."""
    from scipy.sparse import csr_matrix

    lists = [store.feature(i) for i in features.tolist()]
    offsets = np.concatenate([[0], np.cumsum([len(tokens) for tokens, _ in lists])])
    tokens = np.concatenate([tokens for tokens, _ in lists]).astype(np.int64)
    values = np.concatenate([values for _, values in lists]).astype(np.float64)
    matrix = csr_matrix((values, tokens, offsets), (len(features), store.n_tokens))
    mean = np.asarray(matrix.sum(1)).ravel() / store.n_kept
    square = np.asarray(matrix.multiply(matrix).sum(1)).ravel() / store.n_kept
    return matrix, mean, np.sqrt(np.maximum(square - mean**2, 0)), store.n_kept


def _best_correlation(x: tuple[Any, ...], y: tuple[Any, ...]) -> Best:
    where, value = np.zeros(x[0].shape[0], np.int64), np.zeros(x[0].shape[0])
    for k in range(0, len(where), BLOCK):
        part = slice(k, k + BLOCK)
        cross = (x[0][part] @ y[0].T).toarray() / x[3] - x[1][part, None] * y[1][None]
        scale = x[2][part, None] * y[2][None]
        r = np.divide(cross, scale, out=np.zeros_like(cross), where=scale > 0)
        where[part], value[part] = r.argmax(1), r.max(1)
    return where, value


def _correlation(x: tuple[Any, ...], y: tuple[Any, ...], pair: np.ndarray) -> np.ndarray:
    """Correlation of each feature of x with one of y."""
    cross = np.asarray(x[0].multiply(y[0][pair]).sum(1)).ravel() / x[3] - x[1] * y[1][pair]
    scale = x[2] * y[2][pair]
    found: np.ndarray = np.divide(cross, scale, out=np.zeros_like(cross), where=scale > 0)
    return found


def _mean(found: Best | None) -> float:
    return float("nan") if found is None else float(found[1].mean())


def _agreement(meaning: Best, found: Best | None) -> float:
    return float("nan") if found is None else float((meaning[0] == found[0]).mean())
