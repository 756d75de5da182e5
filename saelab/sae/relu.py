"""ReLU with an L1 penalty: the classic sparse autoencoder (Bricken et al. 2023, "Towards Monosemanticity").

    z     = (x - b_dec) W_enc + b_enc
    f     = ReLU(z)
    x_hat = f W_dec + b_dec
    L     = ||x - x_hat||^2 + sparsity * sum_i f_i ||W_dec[i]||  (+ AuxK)

Decoder rows are free; the penalty counts their norms instead, so that shrinking f and growing rows gains nothing
("Training sparse autoencoders", Conerly et al., April 2024 update of Transformer Circuits). In scaled units the mean of
||x||^2 is d_in as it is there, and ``sparsity`` is their lambda (they use 5). Biases begin at ``initial_bias`` (ours),
so that the first codes hold a few percent of all features instead of half.
"""

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from saelab.core.batch import Batch
from saelab.core.code import SparseCode
from saelab.kernels import select_above
from saelab.sae.base import SAEConfig
from saelab.sae.open_code import OpenCodeSAE
from saelab.sae.step import Encoding, StepContext


class ReLUConfig(SAEConfig):
    """ReLU SAE with an L1 penalty."""

    architecture: Literal["relu"] = "relu"
    sparsity: float = Field(default=5.0, ge=0)
    """Weight of the L1 penalty."""
    initial_bias: float = -1.5
    """Where b_enc begins, in scaled units, in which z is about N(0, 1) before training."""


class ReLUSAE(OpenCodeSAE):
    """ReLU SAE; see the module's docstring."""

    config: ReLUConfig
    unit_norm_decoder = False

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Initialise as :class:`SAE` does, with biases that leave few features active."""
        super().reset(generator)
        self.b_enc.fill_(self.config.initial_bias)

    def encode_scaled(self, x: Float[Tensor, "n d_in"]) -> SparseCode:
        """Return all positive pre-activations."""
        return self.encode_above(x, self.b_enc.new_zeros(()))

    def encode_training(self, batch: Batch, context: StepContext) -> Encoding:
        """Return all positive pre-activations; training and inference choose alike."""
        weights = self.w_enc_t.detach(), self.b_enc.detach()
        found = select_above(
            self.centered(batch.x), *weights, self.b_enc.new_zeros(()), precision=context.precision, impl=context.impl
        )
        context = self.context_for(found.indices.numel(), batch.x.shape[0], context)
        return self.encoding_at(batch.x, found.indices, found.offsets, found.values, context)

    def extra_losses(self, batch: Batch, encoding: Encoding, context: StepContext) -> dict[str, Float[Tensor, ""]]:
        """Return the L1 penalty, weighted by decoder norms."""
        code = encoding.code
        total = code.values.new_zeros(self.d_sae).index_add(0, code.indices, code.values)
        penalty = (total @ torch.linalg.vector_norm(self.W_dec, dim=1)) / max(code.n_tokens, 1)
        return {"l1": self.config.sparsity * context.sparsity_factor * penalty}
