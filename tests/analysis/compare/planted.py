"""Codes and decoders whose correspondences are known."""

import numpy as np
from scipy import sparse

from saelab.analysis.compare import CodeMatrix


def unit(n, d, rng):
    x = rng.standard_normal((n, d))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def sparse_codes(n_tokens, n, density=0.05, seed=1):
    """Independent sparse features, values in (0, 1)."""
    return sparse.random(n_tokens, n, density, random_state=np.random.default_rng(seed), format="csc")


def codes(n_tokens=4000, n=24, density=0.05, seed=1):
    return CodeMatrix(sparse_codes(n_tokens, n, density, seed))
