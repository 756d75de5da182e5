"""The code as training chooses it, beside the code of inference.

Where tokens compete for a budget, inference goes by thresholds instead, and the two modes differ in L0 and FVU: both
have to be told. Training draws its batches from all over the text; text in its order would give the tokens of one
document to compete among themselves, so tokens are collected, shuffled, and cut into batches of training's size.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.analysis.reconstruction import Reconstruction, rebuild
from saelab.core.batch import Batch
from saelab.core.statistics import IntegerCounts
from saelab.features.protocols import Dictionary

BUFFER_BYTES = 128 << 20
"""Tokens are collected up to this size (or one batch, if that is more) before they are shuffled."""


@dataclass(frozen=True)
class TrainedModeResult:
    """What the dictionary does in training mode."""

    fvu: float
    """Fraction of variance unexplained."""
    l0: float
    """Mean number of active features per token."""
    n_tokens: int
    """Tokens encoded; an incomplete last batch is left out, unless it is the only one."""


class TrainedMode:
    """Streaming accumulator of :class:`TrainedModeResult` for a dictionary that has ``encode_as_trained``."""

    def __init__(self, sae: Dictionary, shift: Float[Tensor, " d_out"], batch_size: int, seed: int = 0) -> None:
        self._sae, self._batch_size = sae, batch_size
        self._reconstruction = Reconstruction(shift)
        self._l0 = IntegerCounts()
        self._generator = torch.Generator().manual_seed(seed)
        width = sae.d_in + 2 * len(shift)
        self._capacity = batch_size * max(1, BUFFER_BYTES // (4 * width * batch_size))
        self._held: list[Batch] = []
        self._n_held = 0

    def update(
        self,
        x: Float[Tensor, "n d_in"],
        target: Float[Tensor, "n d_out"] | None = None,
        gradient: Float[Tensor, "n d_in"] | None = None,
    ) -> None:
        """Take in some tokens' activations, what to reconstruct if not they, and the gradient at them if it is used."""
        self._held.append(Batch(x.float(), target, gradient))
        self._n_held += x.shape[0]
        while self._n_held >= self._capacity:
            self._encode(self._capacity)

    def result(self) -> TrainedModeResult:
        """Encode what is left and return the numbers."""
        self._encode(self._n_held - self._n_held % self._batch_size)
        if self._reconstruction.n == 0 and self._n_held:
            self._count(_join(self._held))
        rebuilt = self._reconstruction.result()
        return TrainedModeResult(rebuilt.fvu, self._l0.mean, rebuilt.n)

    def _encode(self, n: int) -> None:
        """Shuffle the first n tokens that are held and encode them in batches; the rest stays."""
        if n == 0:
            return
        held = _join(self._held)
        order = torch.randperm(n, generator=self._generator)
        for start in range(0, n, self._batch_size):
            self._count(_take(held, order[start : start + self._batch_size]))
        self._held = [_take(held, torch.arange(n, self._n_held))]
        self._n_held -= n

    def _count(self, batch: Batch) -> None:
        code = self._sae.encode_as_trained(batch)  # type: ignore[attr-defined]
        x_hat = rebuild(self._sae, batch.x, code)
        self._reconstruction.update(batch.x if batch.target is None else batch.target, x_hat)
        self._l0.update(code.l0().cpu().numpy())


def _join(batches: list[Batch]) -> Batch:
    first = batches[0]
    return Batch(
        torch.cat([b.x for b in batches]),
        None if first.target is None else torch.cat([b.target for b in batches if b.target is not None]),
        None if first.gradient is None else torch.cat([b.gradient for b in batches if b.gradient is not None]),
    )


def _take(batch: Batch, rows: Tensor) -> Batch:
    x, target, gradient = (None if t is None else t[rows.to(t.device)] for t in (batch.x, batch.target, batch.gradient))
    assert x is not None
    return Batch(x, target, gradient)
