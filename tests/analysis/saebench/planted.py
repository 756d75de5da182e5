"""Pooled examples with a known code."""

import numpy as np
from scipy import sparse

from saelab.analysis.saebench.examples import LabelledSet, Pooled


def pooled(x, **codes):
    matrices = {name: sparse.csr_matrix(np.asarray(code, np.float64)) for name, code in codes.items()}
    return Pooled(np.asarray(x, np.float32), matrices)


def one_latent_per_class(n_classes=4, n=400, d=16, seed=0, noise=0.02):
    """x = orthonormal direction of the class + noise; the SAE has exactly one latent per class, a control has noise."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((d, d)))[0][:, :n_classes].T
    y = np.arange(n) % n_classes
    code = np.eye(n_classes)[y]
    x = code @ basis + noise * rng.standard_normal((n, d))
    data = LabelledSet(
        "planted",
        tuple(f"class {k}" for k in range(n_classes)),
        pooled(x, sae=code, untrained=rng.random((n, n_classes)) * (rng.random((n, n_classes)) < 0.3)),
        y.astype(np.int64),
        rng.random(n) < 0.7,
    )
    return data, {"sae": basis, "untrained": np.linalg.qr(rng.standard_normal((d, d)))[0][:n_classes]}
