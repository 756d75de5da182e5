"""Planted truth: activations that are sparse sums of known unit features, and how much of them an SAE finds again.

Each fixture returns data, dictionary and codes. The features of a fixture are the same for every seed, except in
``ortho``: seeds give new tokens.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saelab.analysis.compare.matching import match
from saelab.analysis.compare.similarity import Cosine
from saelab.core.batch import Batch

FEATURE_SEED = 12345
RECOVERED = 0.9
"""Cosine from which on a planted feature counts as recovered by its partner."""


class Planted(NamedTuple):
    """Activations with known features."""

    x: Float[Tensor, "tokens d"]
    """``codes @ features``."""
    features: Float[Tensor, "n d"]
    """Unit rows."""
    codes: Float[Tensor, "tokens n"]
    """At least 0."""


def ortho(
    tokens: int = 512,
    d: int = 128,
    p: float = 0.05,
    magnitudes: Literal["const", "uniform", "exp"] = "exp",
    seed: int = 0,
) -> Planted:
    """Orthonormal features (float64), each active with probability p; magnitudes const, uniform(0, 1) or exp(1)."""
    g = torch.Generator().manual_seed(seed)
    features = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64)).Q
    uniform = torch.rand(tokens, d, generator=g, dtype=torch.float64)
    size = {"const": torch.ones_like(uniform), "uniform": uniform, "exp": -(1 - uniform).log()}[magnitudes]
    codes = size * (torch.rand(tokens, d, generator=g) < p)
    return Planted(codes @ features, features, codes)


def superpos(tokens: int = 512, d: int = 64, n: int = 256, p: float = 0.02, seed: int = 0) -> Planted:
    """More random unit features than dimensions."""
    return _random(tokens, d, torch.full((n,), p), seed)


def zipf(tokens: int = 512, d: int = 64, n: int = 256, mean_active: float = 6.0, seed: int = 0) -> Planted:
    """As ``superpos``, with feature i active with probability ~ 1 / i, ``mean_active`` per token in all."""
    weights = 1 / torch.arange(1, n + 1)
    return _random(tokens, d, (mean_active * weights / weights.sum()).clamp(max=1), seed)


def hier(  # noqa: PLR0917
    tokens: int = 512, d: int = 64, parents: int = 32, children: int = 3, p: float = 0.06, seed: int = 0
) -> Planted:
    """Parents and children: a child is active only where its parent is, then one child in half of the cases.

    Rows are all parents, then the children of the first parent, of the second, and so on.
    """
    features = _unit(parents * (1 + children), d)
    g = torch.Generator().manual_seed(seed)
    parent = torch.rand(tokens, parents, generator=g) < p
    which = torch.randint(0, 2 * children, (tokens, parents), generator=g)
    child = (which.unsqueeze(2) == torch.arange(children)) & parent.unsqueeze(2)
    active = torch.cat([parent, child.flatten(1)], dim=1)
    codes = active * (0.5 + torch.rand(active.shape, generator=g))
    return Planted(codes @ features, features, codes)


def _unit(n: int, d: int) -> Float[Tensor, "n d"]:
    features: Tensor = torch.randn(n, d, generator=torch.Generator().manual_seed(FEATURE_SEED))
    return features.div_(features.norm(dim=1, keepdim=True))


def _random(tokens: int, d: int, p: Float[Tensor, " n"], seed: int) -> Planted:
    features = _unit(p.numel(), d)
    g = torch.Generator().manual_seed(seed)
    shape = (tokens, p.numel())
    codes = (torch.rand(shape, generator=g) < p) * (0.5 + torch.rand(shape, generator=g))
    return Planted(codes @ features, features, codes)


class PlantedStream:
    """An endless :class:`~saelab.core.batch.BatchSource` over planted activations, reshuffled each epoch.

    With ``gradients``, a batch also has the gradient of a made-up loss: feature i matters by ``1 / sqrt(i + 1)`` where
    it is active, so ``g_t = sum over active i of features_i / sqrt(i + 1)``.
    """

    def __init__(self, planted: Planted, batch_size: int, seed: int = 0, *, gradients: bool = False) -> None:
        self.x = planted.x.float()
        self.gradient: Tensor | None = None
        if gradients:
            weight = 1 / torch.arange(1, len(planted.features) + 1).sqrt()
            self.gradient = (planted.codes > 0).float() @ (weight[:, None] * planted.features.float())
        self.batch_size, self.seed = batch_size, seed
        self._position = 0

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.x.shape[1]

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches from the current position on."""
        per_epoch = len(self.x) // self.batch_size
        while True:
            epoch, place = divmod(self._position, per_epoch)
            order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(self.seed * 100_003 + epoch))
            for start in range(place, per_epoch):
                rows = order[start * self.batch_size : (start + 1) * self.batch_size]
                self._position += 1
                yield Batch(self.x[rows], gradient=None if self.gradient is None else self.gradient[rows])

    def state_dict(self) -> dict[str, Any]:
        """Return the position."""
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Return to a position."""
        self._position = int(state["position"])


@dataclass(frozen=True)
class Recovery:
    """How much of planted features is among the rows of a decoder."""

    mmcs: float
    """Mean over planted features of the largest cosine with a decoder row."""
    mmcs_back: float
    """Mean over decoder rows of the largest cosine with a planted feature: low where rows stand for nothing planted."""
    matched: float
    """Mean cosine of the best one-to-one (Hungarian) matching."""
    recovered: float
    """Share of planted features whose partner in that matching has a cosine above ``RECOVERED``."""
    n_planted: int
    """Planted features."""
    n_rows: int
    """Decoder rows that took part."""

    def to_dict(self) -> dict[str, Any]:
        """Every field."""
        return dataclasses.asdict(self)


def recovery(decoder: Float[Tensor, "d_sae d"], features: Float[Tensor, "n d"]) -> Recovery:
    """Match decoder rows with planted features by cosine. Features left without a partner count as 0."""
    found = match(Cosine(_array(features), _array(decoder)))
    n = len(features)
    return Recovery(
        mmcs=float(np.nansum(found.best_b_value) / n),
        mmcs_back=float(np.nanmean(found.best_a_value)),
        matched=float(found.pair_value.sum() / n),
        recovered=float((found.pair_value > RECOVERED).sum() / n),
        n_planted=n,
        n_rows=found.live_b,
    )


def _array(matrix: Tensor) -> Float[np.ndarray, "n d"]:
    array: np.ndarray = matrix.detach().cpu().double().numpy()
    return array
