"""Choosing windows of a feature: strongest, at random, the same number from each decile, or a mixture.

All take the windows that may be chosen, each with its decile (1 weakest .. 10 strongest) and its value, and return
positions of the chosen ones, strongest first. Drawing is without replacement.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float32, Int64

from saelab.core.registry import Registry

DECILES = 10
"""Parts of equal number into which a feature's windows are cut by their largest value."""
TOP_SHARE = 0.2
"""Share of the strongest windows in a mixed sample."""

Sampler = Callable[
    [Float32[np.ndarray, " n"], Int64[np.ndarray, " n"], int, np.random.Generator], Int64[np.ndarray, " k"]
]
"""(values, deciles, number wanted, generator) -> positions."""


def deciles_of(values: Float32[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """Decile of each value, 1 (weakest) to 10, by rank; equal values in order of the text.

    Of fewer than ten values each is a decile of its own, spread over 1 .. 10.
    """
    rank = np.empty(len(values), np.int64)
    rank[np.argsort(values, kind="stable")] = np.arange(len(values))
    return rank * DECILES // max(len(values), 1) + 1


def top(
    values: Float32[np.ndarray, " n"], deciles: Int64[np.ndarray, " n"], count: int, generator: np.random.Generator
) -> Int64[np.ndarray, " k"]:
    """Return the strongest, equals in order of the text."""
    return np.argsort(-values, kind="stable")[:count]


def random(
    values: Float32[np.ndarray, " n"], deciles: Int64[np.ndarray, " n"], count: int, generator: np.random.Generator
) -> Int64[np.ndarray, " k"]:
    """Return any, each with the same chance."""
    return _strongest_first(values, generator.choice(len(values), min(count, len(values)), replace=False))


def quantile(
    values: Float32[np.ndarray, " n"], deciles: Int64[np.ndarray, " n"], count: int, generator: np.random.Generator
) -> Int64[np.ndarray, " k"]:
    """Return ``count / 10`` from each decile (the strongest deciles one more when it is no multiple of ten).

    A decile with fewer gives all that it has, and others do not make up for it: no decile ever has more than its share.
    """
    noise = generator.random(len(values))
    order = np.lexsort((noise, deciles))
    in_order = deciles[order]
    rank = np.arange(len(values)) - np.searchsorted(in_order, in_order)
    share = count // DECILES + (in_order > DECILES - count % DECILES)
    return _strongest_first(values, order[rank < share])


def mixed(
    values: Float32[np.ndarray, " n"], deciles: Int64[np.ndarray, " n"], count: int, generator: np.random.Generator
) -> Int64[np.ndarray, " k"]:
    """Return the strongest ``TOP_SHARE`` of the sample, and the rest by decile from what is left."""
    first = top(values, deciles, int(count * TOP_SHARE), generator)
    rest = np.setdiff1d(np.arange(len(values)), first)
    more = quantile(values[rest], deciles[rest], count - len(first), generator)
    return np.concatenate([first, rest[more]])


def _strongest_first(values: Float32[np.ndarray, " n"], chosen: Int64[np.ndarray, " k"]) -> Int64[np.ndarray, " k"]:
    return chosen[np.lexsort((chosen, -values[chosen]))]


SAMPLERS: Registry[Sampler] = Registry("sampler")
for _sampler in (quantile, top, mixed, random):
    SAMPLERS.register(_sampler.__name__, _sampler)
