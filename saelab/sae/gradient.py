"""Gradient SAE (g-SAE): the gradient of the model's loss has a vote in the choice of features (Olmo et al. 2024,
"Features that Make a Difference", arXiv 2411.10397).

    z     = (x - b_dec) W_enc + b_enc
    g     = (dLoss / dx) / mean ||dLoss / dx||               harvested beside x
    a_i   = |<W_dec[i], g>|                                  influence of feature i on this token's loss
    f     = ReLU(z) on the k largest of z (1 + beta a), 0 elsewhere
    x_hat = f W_dec + b_dec
    L     = ||x - x_hat||^2 + AuxK

To first order, ``z_i <W_dec[i], g>`` is what the loss would change by without feature i. Kept values are z, not
scores; no gradient goes through the choice. With beta = 0 this is TopK, bit for bit. Decoder rows have norm 1: growing
them would otherwise be a way to be chosen. ``Loss`` is the summed (not mean) next-token loss, so that g does not depend
on batch or context size. The score's form is the paper's; the scale of g and the value of beta are not known to us:
dividing by the mean norm over all training batches (buffer ``gradient_norm``) is our choice and makes beta comparable
between models and layers, and beta = 1 is a default, not theirs.

Two modes of inference, to be reported apart: ``select="grad"`` chooses as in training, which needs gradients and with
them the next token (the choice *sees the label*: CE recovered in this mode is flattered by it); ``select="magnitude"``
(what ``encode`` and ``forward`` do) is TopK with this dictionary. Numbers of the latter are not numbers of a "g-SAE".
"""  # noqa: D205

from typing import Literal, Self

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from saelab.core.batch import Batch
from saelab.core.code import SparseCode
from saelab.core.errors import ActivationError
from saelab.kernels import TopK, encode_topk, select_scored
from saelab.kernels.segments import offsets_of_topk
from saelab.sae.base import SAE, SAEConfig
from saelab.sae.step import Encoding, StepContext
from saelab.sae.thresholds import average_in_

INFLUENCE_DECAY = 0.98
"""Decay, per batch, of the running mean of each feature's influence."""


class GradientConfig(SAEConfig):
    """Gradient SAE."""

    architecture: Literal["gradient"] = "gradient"
    k: int = Field(default=32, gt=0)
    """Features per token."""
    beta: float = Field(default=1.0, ge=0)
    """Weight of a feature's influence on the loss in the choice; 0 is TopK."""

    @model_validator(mode="after")
    def _k_fits(self) -> Self:
        if self.k > self.d_sae:
            raise ValueError(f"k = {self.k} is more than d_sae = {self.d_sae}; lower k or raise d_sae")
        return self


class GradientSAE(SAE):
    """Gradient SAE; see the module's docstring.

    Buffers: ``gradient_norm`` (scalar), the mean norm of raw gradients over training; ``influence`` (d_sae,), the mean
    of a_i over tokens, an exponential mean over batches; ``batches``, a count.
    """

    config: GradientConfig
    needs_gradient = True
    gradient_norm: Float[Tensor, ""]
    influence: Float[Tensor, " d_sae"]
    batches: Int[Tensor, ""]

    def __init__(self, config: GradientConfig, seed: int | None = 0) -> None:
        """Initialise as :class:`SAE` does; no gradient has been seen."""
        super().__init__(config, seed)
        self.register_buffer("gradient_norm", torch.zeros(()))
        self.register_buffer("influence", torch.zeros(config.d_sae))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def encode_scaled(self, x: Float[Tensor, "n d_in"]) -> SparseCode:
        """Return the k largest activations of each token (``select="magnitude"``)."""
        indices, values = encode_topk(x, self.w_enc_t, self.b_enc, self.config.k, center=self.center)
        return SparseCode.from_topk(indices, values.relu(), self.d_sae)

    def encode_batch(self, batch: Batch, select: Literal["grad", "magnitude"] = "grad") -> SparseCode:
        """Return the code of a raw batch by either mode of inference; ``"grad"`` needs ``batch.gradient``."""
        return self.encode_as_trained(batch) if select == "grad" else self.encode(batch.x)

    def encode_training(self, batch: Batch, context: StepContext) -> Encoding:
        """Return the k activations of each token with the largest score; learn the gradients' norm in training mode."""
        if batch.gradient is None:
            raise ActivationError(
                "a gradient SAE needs the gradient of the loss beside each activation, the batch has none; "
                "harvest with gradients=true"
            )
        n, k = batch.x.shape[0], min(round(self.config.k * context.k_factor), self.d_sae)
        if self.training and n:
            self.batches += 1
            norm = torch.linalg.vector_norm(batch.gradient.detach() * self.input_scale, dim=1).mean()
            self.gradient_norm += (norm.to(self.gradient_norm) - self.gradient_norm) / self.batches
        found = self._choose(batch, k, context)
        offsets = offsets_of_topk(n, k, batch.x.device)
        return self.encoding_at(batch.x, found.indices.reshape(-1), offsets, found.values.reshape(-1), context)

    def normalized(self, gradient: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
        """Return gradients with respect to *scaled* activations divided by their mean norm over training.

        Before training, the mean norm over the given ones is taken.
        """
        raw = gradient.detach() * self.input_scale
        mean = self.gradient_norm if int(self.batches) else torch.linalg.vector_norm(raw, dim=1).mean()
        return raw / mean.to(raw).clamp(min=torch.finfo(raw.dtype).tiny)

    def _choose(self, batch: Batch, k: int, context: StepContext) -> TopK:
        if self.config.beta == 0:
            return TopK(*self.choose_topk(batch.x, k, context))
        assert batch.gradient is not None
        scored = select_scored(
            self.centered(batch.x),
            self.w_enc_t.detach(),
            self.b_enc.detach(),
            self.normalized(batch.gradient),
            self.W_dec.detach(),
            k,
            self.config.beta,
            precision=context.precision,
            impl=context.impl,
        )
        if self.training and batch.x.shape[0]:
            average_in_(self.influence, scored.influence.to(self.influence), self.batches, INFLUENCE_DECAY)
        return scored.chosen
