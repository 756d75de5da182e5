"""TopK: the k largest pre-activations of each token (Gao et al. 2024, "Scaling and evaluating sparse autoencoders",
arXiv 2406.04093, section 2.3).

    z     = (x - b_dec) W_enc + b_enc
    f     = ReLU(TopK(z))
    x_hat = f W_dec + b_dec
    L     = ||x - x_hat||^2 + AuxK

All in scaled units (see :mod:`saelab.sae.base`). An entry whose z is not positive is stored with value 0 and gets no
gradient. Training and inference choose alike.
"""  # noqa: D205

from typing import Literal, Self

from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from saelab.core.batch import Batch
from saelab.core.code import SparseCode
from saelab.kernels import encode_topk
from saelab.kernels.segments import offsets_of_topk
from saelab.sae.base import SAE, SAEConfig
from saelab.sae.step import Encoding, StepContext


class TopKConfig(SAEConfig):
    """TopK SAE."""

    architecture: Literal["topk"] = "topk"
    k: int = Field(default=32, gt=0)
    """Features per token."""

    @model_validator(mode="after")
    def _k_fits(self) -> Self:
        if self.k > self.d_sae:
            raise ValueError(f"k = {self.k} is more than d_sae = {self.d_sae}; lower k or raise d_sae")
        return self


class TopKSAE(SAE):
    """TopK SAE; see the module's docstring."""

    config: TopKConfig

    def encode_scaled(self, x: Float[Tensor, "n d_in"]) -> SparseCode:
        """Return the k largest activations of each token."""
        indices, values = encode_topk(x, self.w_enc_t, self.b_enc, self.config.k, center=self.center)
        return SparseCode.from_topk(indices, values.relu(), self.d_sae)

    def encode_training(self, batch: Batch, context: StepContext) -> Encoding:
        """Return the k largest activations of each token; k is larger during the k warm-up."""
        k = min(round(self.config.k * context.k_factor), self.d_sae)
        indices, values = self.choose_topk(batch.x, k, context)
        offsets = offsets_of_topk(batch.x.shape[0], k, batch.x.device)
        return self.encoding_at(batch.x, indices.reshape(-1), offsets, values.reshape(-1), context)
