"""``compare``: run every part of a comparison that its two sides allow."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from saelab.analysis.compare.baseline import random_decoders, shuffled_tokens
from saelab.analysis.compare.codes import CodeMatrix, pair_statistics
from saelab.analysis.compare.lasso import LAMBDAS, MOST_PREDICTORS, OneToMany, one_to_many
from saelab.analysis.compare.matching import CANDIDATES, EXACT_UP_TO, match
from saelab.analysis.compare.result import Comparison, SideInfo
from saelab.analysis.compare.similarity import Correlation, Cosine, unit_rows
from saelab.analysis.compare.spectral import EDGE, LARGEST, clusters
from saelab.analysis.compare.splitting import THRESHOLD, splitting
from saelab.core.errors import ActivationError, ConfigError, StoreError
from saelab.core.progress import progress

LEAST_TOKENS = 1000
"""Fewer tokens than this say nothing about features that fire on one token in a hundred."""


@dataclass(frozen=True, eq=False)
class Side:
    """One of the two dictionaries to compare: its decoder, its codes on the common tokens, or both."""

    name: str
    """What to call it."""
    decoder: np.ndarray | None = None
    """Write directions (n, d)."""
    codes: CodeMatrix | None = None
    """Codes (T, n) on the tokens that both sides share."""
    space: str = ""
    """What the decoder writes into (model fingerprint and site). Decoders of different spaces are not compared."""

    @property
    def n_features(self) -> int:
        """Number of features."""
        if self.codes is not None:
            return self.codes.n_features
        assert self.decoder is not None
        return len(self.decoder)

    def info(self) -> SideInfo:
        """What the result records of it."""
        dead = None if self.codes is None else int((~self.codes.varies).sum())
        return SideInfo(self.name, self.n_features, dead, self.space)


def compare(
    a: Side,
    b: Side,
    *,
    text: str = "",
    seed: int = 0,
    targets: int = 256,
    lambdas: tuple[float, ...] = LAMBDAS,
    threshold: float = THRESHOLD,
    edge: float = EDGE,
    largest_cluster: int = LARGEST,
    exact_up_to: int = EXACT_UP_TO,
    candidates: int = CANDIDATES,
    least_tokens: int = LEAST_TOKENS,
) -> Comparison:
    """Compare two dictionaries by their decoders, by their activations on the same tokens, or by both.

    Features that never fire (or never vary) on those tokens are left out everywhere and counted. ``targets`` features
    of each side, drawn by ``seed`` among those that vary, are predicted from the other side by LASSO along
    ``lambdas``. ``threshold`` is the decoder cosine over which two features write in one direction (splitting, novel
    features); ``edge`` the least |correlation| in the affinity of the clusters. One-to-one matching is exact up to
    ``exact_up_to`` features and otherwise the best among ``candidates`` per feature.

    Raises :class:`StoreError` when the codes are not over the same tokens or over fewer than ``least_tokens``,
    :class:`ActivationError` for NaN in decoders or codes, :class:`ConfigError` when there is nothing to compare.
    """
    _check(a, b, least_tokens)
    skipped: list[str] = []
    shared = _shared_space(a, b, skipped)
    both = a.codes is not None and b.codes is not None
    if not both:
        skipped.append("activations: no codes on common tokens were given")
    if not shared and not both:
        raise ConfigError(f"nothing to compare between {a.name} and {b.name}: {'; '.join(skipped)}")
    limits = {"exact_up_to": exact_up_to, "candidates": candidates}
    parts: dict[str, Any] = {}
    with progress("compare", 5, "parts") as bar:
        parts |= _by_decoder(a, b, seed, limits) if shared else {"decoders": None, "decoder_baseline": None}
        bar.advance(1)
        parts |= _by_activation(a, b, seed, limits, shared) if both else _NO_ACTIVATIONS
        bar.advance(1)
        if both:
            parts["b_from_a"] = _predict(a, b, targets, lambdas, [seed, 2], skipped)
            parts["a_from_b"] = _predict(b, a, targets, lambdas, [seed, 3], skipped)
        bar.advance(1)
        if both:
            decoders = (_decoder(a), _decoder(b)) if shared else None
            found = clusters(_codes(a), _codes(b), decoders=decoders, seed=seed, edge=edge, largest=largest_cluster)
            parts["clusters"] = tuple(found)
        bar.advance(1)
        parts["splitting"] = _split(a, b, threshold) if shared else None
        bar.advance(1)
    settings = {"targets": targets, "lambdas": list(lambdas), "threshold": threshold, "edge": edge}
    return Comparison(
        a=a.info(),
        b=b.info(),
        n_tokens=_codes(a).n_tokens if both else 0,
        text=text,
        seed=seed,
        settings={**settings, "largest_cluster": largest_cluster, **limits},
        skipped=tuple(skipped),
        **parts,
    )


_NO_ACTIVATIONS: dict[str, Any] = {
    "activations": None,
    "activation_baseline": None,
    "pairs": {},
    "b_from_a": None,
    "a_from_b": None,
    "clusters": None,
}


def _codes(side: Side) -> CodeMatrix:
    assert side.codes is not None
    return side.codes


def _decoder(side: Side) -> np.ndarray:
    assert side.decoder is not None
    return side.decoder


def _check(a: Side, b: Side, least_tokens: int) -> None:
    for side in (a, b):
        if side.decoder is not None and not np.isfinite(side.decoder).all():
            raise ActivationError(f"the decoder of {side.name} holds NaN or infinity; its weights are broken")
        if side.codes is not None and side.decoder is not None and side.codes.n_features != len(side.decoder):
            raise StoreError(
                f"the codes of {side.name} are over {side.codes.n_features} features, its decoder has "
                f"{len(side.decoder)}; give the store of this SAE"
            )
    if a.codes is not None and b.codes is not None:
        if a.codes.n_tokens != b.codes.n_tokens:
            raise StoreError(
                f"{a.name} has codes on {a.codes.n_tokens} tokens, {b.name} on {b.codes.n_tokens}; "
                "encode the same tokens with both"
            )
        if a.codes.n_tokens < least_tokens:
            raise StoreError(
                f"only {a.codes.n_tokens} tokens to compare on, at least {least_tokens} are needed; give more text"
            )
        for side in (a, b):
            if not _codes(side).varies.any():
                raise ActivationError(
                    f"no feature of {side.name} ever fires on these tokens; is it the SAE of this model and site?"
                )


def _shared_space(a: Side, b: Side, skipped: list[str]) -> bool:
    """Whether decoder directions can be compared; the reason, when not, goes to ``skipped``."""
    if a.decoder is None or b.decoder is None:
        skipped.append("decoders: they were not given for both sides")
    elif a.decoder.shape[1] != b.decoder.shape[1]:
        skipped.append(f"decoders: they are {a.decoder.shape[1]} and {b.decoder.shape[1]} wide")
    elif a.space != b.space:
        skipped.append(f"decoders: they write into different spaces ({a.space or '?'} and {b.space or '?'})")
    else:
        return True
    return False


def _by_decoder(a: Side, b: Side, seed: int, limits: dict[str, int]) -> dict[str, Any]:
    live = [None if side.codes is None else side.codes.varies for side in (a, b)]
    found = match(Cosine(_decoder(a), _decoder(b), *live), **limits)
    rng = np.random.default_rng([seed, 0])
    width = _decoder(a).shape[1]
    baseline = random_decoders(found.live_a, found.live_b, width, rng, exact_up_to=limits["exact_up_to"])
    return {"decoders": found, "decoder_baseline": baseline}


def _by_activation(a: Side, b: Side, seed: int, limits: dict[str, int], shared: bool) -> dict[str, Any]:
    left, right = _codes(a), _codes(b)
    found = match(Correlation(left, right), **limits)
    rng = np.random.default_rng([seed, 1])
    baseline = shuffled_tokens(left, right, rng, exact_up_to=limits["exact_up_to"])
    pairs = pair_statistics(left, found.pair_a, right, found.pair_b)
    del pairs["correlation"]
    if shared:
        rows_a, rows_b = unit_rows(_decoder(a))[found.pair_a], unit_rows(_decoder(b))[found.pair_b]
        pairs["cosine"] = (rows_a * rows_b).sum(1).astype(np.float64)
    return {"activations": found, "activation_baseline": baseline, "pairs": pairs}


def _predict(  # noqa: PLR0917
    a: Side, b: Side, targets: int, lambdas: tuple[float, ...], seed: list[int], skipped: list[str]
) -> OneToMany | None:
    """Predict some features of B from all of A."""
    if a.n_features > MOST_PREDICTORS:
        skipped.append(f"LASSO from {a.name}: {a.n_features} predictors, more than {MOST_PREDICTORS}")
        return None
    live = np.flatnonzero(_codes(b).varies)
    chosen = np.sort(np.random.default_rng(seed).permutation(live)[:targets])
    return one_to_many(_codes(a), _codes(b), chosen.astype(np.int64), lambdas=lambdas) if targets else None


def _split(a: Side, b: Side, threshold: float) -> Any:
    small, large = (a, b) if a.n_features <= b.n_features else (b, a)
    codes = None if small.codes is None or large.codes is None else (small.codes, large.codes)
    name = "a" if small is a else "b"
    return splitting(_decoder(small), _decoder(large), name=name, codes=codes, threshold=threshold)
