"""How well a dictionary rebuilds activations: the statistics of (x, x_hat) pairs, streamed in float64."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from saelab.core.code import SparseCode
from saelab.features.protocols import Dictionary


@dataclass(frozen=True)
class ReconstructionResult:
    """Reconstruction metrics over n tokens; nan where a denominator is zero."""

    n: int
    """Tokens."""
    mse: float
    """Mean over tokens of ``||x - x_hat||^2`` (summed over dimensions)."""
    fvu: float
    """``sum ||x - x_hat||^2 / sum ||x - mean(x)||^2``, pooled over dimensions."""
    nmse: float
    """Mean over tokens of ``||x - x_hat||^2 / ||x||^2``."""
    cosine: float
    """Mean over tokens of the cosine between x and x_hat."""
    shrinkage: float
    """``sum ||x_hat||^2 / sum <x, x_hat>`` with mean(x) taken off both: 1 unbiased, below 1 shrunk."""


class Reconstruction:
    """Streaming accumulator of :class:`ReconstructionResult`.

    Sums are taken about ``shift`` (any vector; best one near the mean of x) and moved to the mean of the tokens
    actually seen at the end, so that one pass is enough and a large common offset costs no digits.
    """

    def __init__(self, shift: Float[Tensor, " d"]) -> None:
        self.shift: Float64[Tensor, " d"] = shift.detach().to("cpu", torch.float64)
        self.n = 0
        self._x = torch.zeros_like(self.shift)
        self._x_hat = torch.zeros_like(self.shift)
        self._sums = torch.zeros(6, dtype=torch.float64)

    def update(self, x: Float[Tensor, "n d"], x_hat: Float[Tensor, "n d"]) -> None:
        """Take in n activations and their reconstructions."""
        x = x.detach().to("cpu", torch.float64)
        x_hat = x_hat.detach().to("cpu", torch.float64)
        error = (x - x_hat).square().sum(1)
        norm, norm_hat = x.square().sum(1), x_hat.square().sum(1)
        cosine = (x * x_hat).sum(1) / (norm * norm_hat).sqrt().clamp_min(1e-300)
        x = x - self.shift
        x_hat = x_hat - self.shift
        self.n += x.shape[0]
        self._x += x.sum(0)
        self._x_hat += x_hat.sum(0)
        self._sums += torch.stack(
            [
                error.sum(),
                (error / norm.clamp_min(1e-300)).sum(),
                cosine.sum(),
                x.square().sum(),
                x_hat.square().sum(),
                (x * x_hat).sum(),
            ]
        )

    def merge(self, other: "Reconstruction") -> None:
        """Take in everything that ``other``, of the same shift, has seen."""
        assert torch.equal(self.shift, other.shift), "reconstructions about different shifts"
        self.n += other.n
        self._x += other._x
        self._x_hat += other._x_hat
        self._sums += other._sums

    def result(self) -> ReconstructionResult:
        """Return the metrics so far."""
        error, nmse, cosine, energy, energy_hat, cross = self._sums.tolist()
        step = self._x / max(self.n, 1)
        moved = self.n * float(step @ step)
        along = float(step @ self._x_hat)
        return ReconstructionResult(
            n=self.n,
            mse=ratio(error, self.n),
            fvu=ratio(error, energy - moved),
            nmse=ratio(nmse, self.n),
            cosine=ratio(cosine, self.n),
            shrinkage=ratio(energy_hat - 2 * along + moved, cross - along),
        )


def rebuild(sae: Dictionary, x: Float[Tensor, "n d_in"], code: SparseCode) -> Float[Tensor, "n d_out"]:
    """Reconstruction of activations x of which ``code`` is the code, with what reaches it past the code.

    A skip transcoder adds a linear map of x, which ``decode(code)`` cannot know.
    """
    reconstruct = getattr(sae, "reconstruct", None)
    x_hat: Tensor = sae.decode(code) if reconstruct is None else reconstruct(x.to(code.values.device), code)
    return x_hat


def ratio(a: float, b: float) -> float:
    """``a / b``, and nan when b is 0."""
    return a / b if b else float("nan")
