"""Labelled examples with their pooled activations and codes: what all probing evaluations work on.

An example is a set of token positions: one token, or all kept tokens of a text. Its activation and its code are means
over them (SAEBench pools by the mean, padding left out). Zeroing some features and keeping the SAE's error subtracts
their contribution from each token, which is linear, so its pooled effect follows from the pooled code alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int, Int64
from scipy import sparse
from torch import Tensor

from saelab.core.errors import ActivationError
from saelab.core.progress import progress
from saelab.features.protocols import Dictionary, Model
from saelab.features.rows import encode_in_parts, read_site

ROWS_PER_BATCH = 64


@dataclass(frozen=True, eq=False)
class Pooled:
    """Means over the positions of N examples."""

    x: Float32[np.ndarray, "n d"]
    """Activations."""
    codes: dict[str, Any]
    """For each dictionary, the codes as a SciPy CSR matrix (n, d_sae)."""

    def at(self, rows: np.ndarray) -> "Pooled":
        """Return some of the examples."""
        return Pooled(self.x[rows], {name: code[rows] for name, code in self.codes.items()})


@dataclass(frozen=True, eq=False)
class LabelledSet:
    """Examples of several classes, split into training and test."""

    name: str
    """Name of the data set."""
    classes: tuple[str, ...]
    """Names of the classes."""
    pooled: Pooled
    """Activations and codes."""
    y: Int64[np.ndarray, " n"]
    """Class of each example."""
    train: Bool[np.ndarray, " n"]
    """Whether it is a training example."""
    about: dict[str, Any] = field(default_factory=dict)
    """Where the labels come from, and how the split was made."""


def collect(
    model: Model,
    site: str,
    dictionaries: Mapping[str, Dictionary],
    tokens: Int[Tensor, "r t"],
    example: Int64[np.ndarray, "r t"],
    *,
    title: str = "examples",
) -> Pooled:
    """Run rows of tokens and pool what is at their positions.

    ``example`` holds the number of the example that a position belongs to, -1 for none; numbers are 0 .. N - 1, and an
    example lies within one row. Raises :class:`ActivationError` for NaN or infinity.
    """
    n = int(example.max()) + 1 if example.size else 0
    width = model.width(site)
    x_sum, count = np.zeros((n, width), np.float32), np.zeros(n, np.int64)
    parts: dict[str, list[Any]] = {name: [] for name in dictionaries}
    # In random order: a control shuffles activations among the rows of a batch, and neighbouring rows are of one
    # document or class, which the shuffled ones would give away.
    wanted = np.random.default_rng(0).permutation(np.flatnonzero((example >= 0).any(1)))
    with progress(title, len(wanted), "rows") as bar:
        for start in range(0, len(wanted), ROWS_PER_BATCH):
            rows = wanted[start : start + ROWS_PER_BATCH]
            chosen = torch.from_numpy(example[rows] >= 0)
            x = read_site(model, tokens[torch.from_numpy(rows)], site)
            x = x[chosen.to(x.device)].float()
            if not bool(torch.isfinite(x).all()):
                raise ActivationError(
                    f"activations at {site} hold NaN or infinity on the {title}; check the model's dtype, "
                    "float32 is the safe one"
                )
            owner = example[rows][chosen.numpy()]
            np.add.at(x_sum, owner, x.cpu().numpy())
            count += np.bincount(owner, minlength=n)
            pool = sparse.csr_matrix((np.ones(len(owner)), (owner, np.arange(len(owner)))), shape=(n, len(owner)))
            for name, dictionary in dictionaries.items():
                code = encode_in_parts(dictionary, x, site).positive()
                arrays = (code.values.cpu().numpy(), code.indices.cpu().numpy(), code.offsets.cpu().numpy())
                parts[name].append((pool @ sparse.csr_matrix(arrays, shape=(code.n_tokens, code.d_sae))).tocoo())
            bar.advance(len(rows))
    assert n > 0, "no examples"
    assert count.min() > 0, "an example without positions"
    codes = {}
    for name, found in parts.items():
        columns = [np.concatenate([getattr(part, axis) for part in found]) for axis in ("data", "row", "col")]
        total = sparse.csr_matrix((columns[0], (columns[1], columns[2])), shape=(n, dictionaries[name].d_sae))
        codes[name] = (sparse.diags(1.0 / count) @ total).tocsr()
    return Pooled(x_sum / np.maximum(count, 1)[:, None].astype(np.float32), codes)
