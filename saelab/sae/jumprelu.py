"""JumpReLU: a threshold per feature, learned (Rajamanoharan et al. 2024, "Jumping Ahead", arXiv 2407.14435).

    z     = (x - b_dec) W_enc + b_enc
    f_i   = z_i [z_i > theta_i]
    x_hat = f W_dec + b_dec
    L     = ||x - x_hat||^2 + penalty  (+ AuxK)

    penalty "target_l0"   sparsity * d_in * (L0 / target_l0 - 1)^2,  L0 = mean over tokens of sum_i [z_i > theta_i]
            "l0"          sparsity * L0
            "tanh"        sparsity * mean over tokens of sum_i tanh(tanh_scale * f_i)

theta is trained through the estimated gradients of :mod:`saelab.sae.activations`, with a rectangle of width
``bandwidth`` around it; the first two penalties train theta only. The paper takes the first two; tanh is from "Circuits
Updates", January 2025 (Transformer Circuits), there with a further loss on pre-activations that is not used here: dead
features are AuxK's business. The paper scales inputs to mean ||x||^2 = 1 and takes bandwidth 0.001; in this library's
scaled units (mean d_in) that is 0.001 sqrt(d_in), 0.03 at d_in = 1000. Defaults here are ours: wider, and with
thresholds that begin near where they end, for runs of millions rather than billions of tokens.

Training keeps all entries with z > theta - bandwidth / 2, as those at or below theta shape its gradient.
"""

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from saelab.core.batch import Batch
from saelab.core.code import SparseCode
from saelab.kernels import select_above
from saelab.sae.activations import jump_relu, step_above
from saelab.sae.base import SAEConfig
from saelab.sae.open_code import OpenCodeSAE
from saelab.sae.step import Encoding, StepContext


class JumpReLUConfig(SAEConfig):
    """JumpReLU SAE."""

    architecture: Literal["jumprelu"] = "jumprelu"
    penalty: Literal["target_l0", "l0", "tanh"] = "target_l0"
    """What makes codes sparse."""
    target_l0: float = Field(default=32, gt=0)
    """Active features per token that the penalty "target_l0" aims at."""
    sparsity: float = Field(default=1.0, ge=0)
    """Weight of the penalty."""
    tanh_scale: float = Field(default=4.0, gt=0)
    """Steepness of the penalty "tanh"."""
    bandwidth: float = Field(default=0.1, gt=0)
    """Width eps of the rectangle around theta in which its gradient is estimated, in scaled units."""
    initial_threshold: float = Field(default=1.0, ge=0)
    """Threshold of every feature at the start, in scaled units."""


class JumpReLUSAE(OpenCodeSAE):
    """JumpReLU SAE; see the module's docstring. Parameter ``theta`` (d_sae,), on disk ``threshold``."""

    config: JumpReLUConfig
    in_code_units = ("b_enc", "b_dec", "theta")

    def __init__(self, config: JumpReLUConfig, seed: int | None = 0) -> None:
        """Initialise as :class:`SAE` does, with equal thresholds."""
        super().__init__(config, seed)
        self.theta = nn.Parameter(torch.full((config.d_sae,), 0.0 if seed is None else config.initial_threshold))

    @property
    def threshold(self) -> Float[Tensor, " d_sae"]:
        """The thresholds."""
        return self.theta.detach()

    def encode_scaled(self, x: Float[Tensor, "n d_in"]) -> SparseCode:
        """Return the pre-activations above each feature's threshold."""
        return self.encode_above(x, self.threshold)

    def encode_training(self, batch: Batch, context: StepContext) -> Encoding:
        """Return the activations, and with value 0 the entries a little below their threshold."""
        weights = self.w_enc_t.detach(), self.b_enc.detach()
        found = select_above(
            self.centered(batch.x),
            *weights,
            self.threshold - self.config.bandwidth / 2,
            precision=context.precision,
            impl=context.impl,
        )
        context = self.context_for(found.indices.numel(), batch.x.shape[0], context)

        def activation(z: Tensor) -> Tensor:
            return jump_relu(z, self.theta, found.indices, self.config.bandwidth)

        return self.encoding_at(batch.x, found.indices, found.offsets, found.values, context, activation)

    def extra_losses(self, batch: Batch, encoding: Encoding, context: StepContext) -> dict[str, Float[Tensor, ""]]:
        """Return the penalty."""
        c, code, pre = self.config, encoding.code, encoding.pre
        assert pre is not None
        weight, n = c.sparsity * context.sparsity_factor, max(code.n_tokens, 1)
        if c.penalty == "tanh":
            return {"tanh": weight * torch.tanh(c.tanh_scale * code.values).sum() / n}
        l0 = step_above(pre, self.theta, code.indices, c.bandwidth).sum() / n
        if c.penalty == "l0":
            return {"l0_penalty": weight * l0}
        return {"l0_penalty": weight * c.d_in * (l0 / c.target_l0 - 1).square()}

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep decoder rows at norm 1 and thresholds at 0 or above."""
        super().after_step()
        self.theta.clamp_(min=0)

    def tensors(self) -> dict[str, Tensor]:
        """Return all parameters under the names used on disk, where theta is ``threshold``."""
        state = super().tensors()
        return {"threshold": state.pop("theta"), **state}
