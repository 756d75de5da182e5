"""A random permutation of [0, n) that takes no memory: any part of it can be computed on its own.

A permutation held as a table takes 8 bytes per row, which for a store of 4e9 rows is 32 GB. Here it is a keyed
bijection: a generalised Feistel network (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", section 4)
over pairs (L, R) in Z_a x Z_b with a = ceil(sqrt(n)) and b = ceil(n / a). Values in [n, a * b), fewer than a of them,
are sent through again until they fall below n ("cycle walking"), which keeps it a bijection on [0, n).
"""

import math

import numpy as np
from jaxtyping import Int64, UInt64

_ROUNDS = 8
_MULTIPLIERS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93))
_SHIFT = np.uint64(32)


class Permutation:
    """The permutation of [0, n) that belongs to a seed and a number (an epoch, a block).

    ``permutation(i)`` is the image of ``i``. Two seeds or two numbers give unrelated permutations.
    """

    def __init__(self, n: int, seed: int, number: int = 0) -> None:
        assert n > 0, "a permutation of nothing"
        self.n = n
        self._a = np.uint64(math.isqrt(n - 1) + 1)
        self._b = np.uint64(-(-n // int(self._a)))
        # SeedSequence mixes its whole input, so neighbouring seeds and epochs share nothing.
        self._keys = np.random.SeedSequence([seed & (2**64 - 1), number]).generate_state(_ROUNDS, np.uint64)

    def __call__(self, index: Int64[np.ndarray, " m"]) -> Int64[np.ndarray, " m"]:
        """Return where each of ``index`` goes."""
        value = self._once(index.astype(np.uint64))
        outside = np.flatnonzero(value >= np.uint64(self.n))
        while outside.size:
            value[outside] = self._once(value[outside])
            outside = outside[value[outside] >= np.uint64(self.n)]
        return value.astype(np.int64)

    def _once(self, value: UInt64[np.ndarray, " m"]) -> UInt64[np.ndarray, " m"]:
        left, right = value // self._b, value % self._b
        for round_, key in enumerate(self._keys):
            if round_ % 2 == 0:
                left = (left + _mix(right, key)) % self._a
            else:
                right = (right + _mix(left, key)) % self._b
        return left * self._b + right


def _mix(value: UInt64[np.ndarray, " m"], key: np.uint64) -> UInt64[np.ndarray, " m"]:
    """Keyed 64-bit hash; only its upper half is returned, so that adding to it does not wrap around."""
    mixed = (value ^ key) * _MULTIPLIERS[0]
    mixed ^= mixed >> _SHIFT
    mixed *= _MULTIPLIERS[1]
    return mixed >> _SHIFT
