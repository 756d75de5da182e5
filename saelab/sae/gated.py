"""Gated: which features are active, and how much, are decided apart (Rajamanoharan et al. 2024, arXiv 2404.16014).

    pi_gate = (x - b_dec) W_enc + b_enc
    pi_mag  = exp(r_mag) * ((x - b_dec) W_enc) + b_mag            the same directions, rescaled
    f       = [pi_gate > 0] ReLU(pi_mag)
    x_hat   = f W_dec + b_dec
    L       = ||x - x_hat||^2 + sparsity * sum_i ReLU(pi_gate_i) + ||x - x_frozen||^2  (+ AuxK)
    x_frozen = ReLU(pi_gate) W_dec + b_dec,   with W_dec and b_dec of this line taken as constants

The gate's step function has no gradient; the last two terms train it. The L1 penalty shrinks pi_gate only, so that f is
not shrunk. Decoder rows have norm 1. ``b_enc`` is the paper's b_gate; it begins at ``initial_bias`` (ours), so that the
first codes hold a few percent of all features instead of half.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from saelab.core.batch import Batch
from saelab.core.code import SparseCode
from saelab.kernels import decode, select_above
from saelab.kernels.segments import pick
from saelab.sae.base import SAEConfig
from saelab.sae.open_code import OpenCodeSAE
from saelab.sae.step import Encoding, StepContext


class GatedConfig(SAEConfig):
    """Gated SAE."""

    architecture: Literal["gated"] = "gated"
    sparsity: float = Field(default=5.0, ge=0)
    """Weight of the L1 penalty on the gate."""
    initial_bias: float = -1.5
    """Where b_enc begins, in scaled units, in which z is about N(0, 1) before training."""


class GatedSAE(OpenCodeSAE):
    """Gated SAE; see the module's docstring. Further parameters: ``r_mag`` and ``b_mag``, both (d_sae,)."""

    config: GatedConfig
    in_code_units = ("b_enc", "b_dec", "b_mag")

    def __init__(self, config: GatedConfig, seed: int | None = 0) -> None:
        """Initialise as :class:`SAE` does, with pi_mag = pi_gate."""
        super().__init__(config, seed)
        self.r_mag = nn.Parameter(torch.zeros(config.d_sae))
        self.b_mag = nn.Parameter(torch.zeros(config.d_sae))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Initialise as :class:`SAE` does, with gates of which few are open."""
        super().reset(generator)
        self.b_enc.fill_(self.config.initial_bias)

    def encode_scaled(self, x: Float[Tensor, "n d_in"]) -> SparseCode:
        """Return the magnitudes of the features whose gate is open."""
        gate = self.encode_above(x, self.b_enc.new_zeros(()))
        return SparseCode(gate.indices, self._magnitude(gate.values, gate.indices), gate.offsets, self.d_sae)

    def encode_training(self, batch: Batch, context: StepContext) -> Encoding:
        """Return the magnitudes of the features whose gate is open; training and inference choose alike."""
        weights = self.w_enc_t.detach(), self.b_enc.detach()
        found = select_above(
            self.centered(batch.x), *weights, self.b_enc.new_zeros(()), precision=context.precision, impl=context.impl
        )
        context = self.context_for(found.indices.numel(), batch.x.shape[0], context)

        def activation(gate: Tensor) -> Tensor:
            return self._magnitude(gate, found.indices)

        return self.encoding_at(batch.x, found.indices, found.offsets, found.values, context, activation)

    def extra_losses(self, batch: Batch, encoding: Encoding, context: StepContext) -> dict[str, Float[Tensor, ""]]:
        """Return the L1 penalty on the gate and the error of the gate's own reconstruction."""
        code, gate = encoding.code, encoding.pre
        assert gate is not None
        n = max(code.n_tokens, 1)
        opened = SparseCode(code.indices, gate, code.offsets, self.d_sae)
        frozen = decode(opened, self.W_dec.detach(), self.b_dec.detach(), impl=self.decode_impl(opened, context))
        return {
            "l1": self.config.sparsity * context.sparsity_factor * gate.sum() / n,
            "gate_mse": (batch.x - frozen).square().sum() / n,
        }

    def _magnitude(self, gate: Float[Tensor, " nnz"], indices: Int[Tensor, " nnz"]) -> Float[Tensor, " nnz"]:
        """Return ReLU(pi_mag) at entries from pi_gate there."""
        return ((gate - pick(self.b_enc, indices)) * pick(self.r_mag.exp(), indices) + pick(self.b_mag, indices)).relu()
