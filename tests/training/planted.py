"""Planted data for training tests: sparse sums of random unit features, as a seeded, resumable source."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from saelab.core.batch import Batch


class PlantedSource:
    """Batches of ``sum of active features * magnitudes + bias``; batch i depends on (seed, i) only."""

    def __init__(self, d_in: int = 32, n_features: int = 64, batch_size: int = 256, p: float = 0.05, seed: int = 0):
        g = torch.Generator().manual_seed(seed)
        features = torch.randn(n_features, d_in, generator=g)
        self.features: Tensor = features / features.norm(dim=1, keepdim=True)
        self.bias = torch.randn(d_in, generator=g) * 0.3
        self.p, self.batch_size, self.seed, self.position = p, batch_size, seed, 0
        self.poison: int | None = None

    @property
    def d_in(self) -> int:
        return self.features.shape[1]

    def batch(self, index: int) -> Batch:
        g = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        shape = (self.batch_size, self.features.shape[0])
        active = torch.rand(shape, generator=g) < self.p
        x = (active * (1 + torch.rand(shape, generator=g))) @ self.features + self.bias
        if self.poison == index:
            x[3, 1] = float("nan")
        return Batch(3 * x)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            self.position += 1
            yield self.batch(self.position - 1)

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]
