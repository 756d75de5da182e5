"""Contrastive SAE: features that two sides of a pair share, and features that tell them apart (Poupart 2024,
"Contrastive Sparse Autoencoders for Interpreting Planning of Chess-Playing Agents", arXiv 2406.04028).

A batch holds pairs: row 2i is the positive side (an optimal rollout, a true continuation), row 2i + 1 the negative
one. Either side may be the activation alone or the activation of what both begin with, followed by its own.

    z      = (x - b_dec) W_enc + b_enc
    f      = ReLU(z) = [c; d]                    the first ``common`` of the features, and the others
    x_hat  = f W_dec + b_dec
    L      = ||x - x_hat||^2 + sparsity sum_i f_i (+ AuxK)
             + contrast mean over pairs of ( ||c+ - c-||_1 + sum_i d+_i d-_i )

The first term of the contrast lets common features agree, the second keeps differentiating ones from firing on both
sides. Decoder rows have norm 1, or all of f could shrink and the rows grow. Both terms are symmetric: exchanging the
sides changes nothing, and nothing in the loss says which side is which. All is in scaled units and the MSE is a sum, so
the weight is not the paper's 0.1 but our own. ``contrast: 0`` is the control to train beside
it. The second term can also be met by features that never fire: look at the density of the differentiating half.
"""  # noqa: D205

from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from saelab.core.batch import Batch
from saelab.sae.relu import ReLUConfig, ReLUSAE
from saelab.sae.step import Encoding, StepContext


class ContrastiveConfig(ReLUConfig):
    """Contrastive SAE for paired data."""

    architecture: Literal["contrastive"] = "contrastive"  # type: ignore[assignment]
    contrast: float = Field(default=1.0, ge=0)
    """Weight gamma of the contrast; 0: a plain SAE on the same data."""
    common: float = Field(default=0.5, ge=0, le=1)
    """Fraction of the features, the first ones, that are common."""

    @property
    def n_common(self) -> int:
        """Number of common features."""
        return round(self.common * self.d_sae)

    @model_validator(mode="after")
    def _halves(self) -> "ContrastiveConfig":
        if self.contrast and not 0 < self.n_common < self.d_sae:
            raise ValueError(
                f"common = {self.common:g} of {self.d_sae} features leaves one half empty; give for example 0.5"
            )
        return self


class ContrastiveSAE(ReLUSAE):
    """Contrastive SAE; see the module's docstring. At inference each row stands alone."""

    config: ContrastiveConfig
    unit_norm_decoder = True
    needs_pairs = True

    @property
    def common_features(self) -> Int[Tensor, " n_common"]:
        """The features of the common half."""
        return torch.arange(self.config.n_common)

    @property
    def differing_features(self) -> Int[Tensor, " n_differing"]:
        """The features of the differentiating half."""
        return torch.arange(self.config.n_common, self.d_sae)

    def extra_losses(self, batch: Batch, encoding: Encoding, context: StepContext) -> dict[str, Float[Tensor, ""]]:
        """Return the L1 penalty and the contrast of the pairs; an odd last row has no partner and is left out."""
        losses = super().extra_losses(batch, encoding, context)
        n = encoding.code.n_tokens // 2
        if self.config.contrast:
            sides = encoding.code.to_dense()[: 2 * n].view(n, 2, self.d_sae)
            common, differing = sides[:, :, : self.config.n_common], sides[:, :, self.config.n_common :]
            apart = (common[:, 0] - common[:, 1]).abs().sum() + (differing[:, 0] * differing[:, 1]).sum()
            losses["contrast"] = self.config.contrast * context.sparsity_factor * apart / max(n, 1)
        return losses
