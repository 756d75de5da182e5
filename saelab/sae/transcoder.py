"""Transcoder: reads one site and reconstructs another, an MLP's input and output say (Dunefsky, Chlenski, Nanda 2024,
"Transcoders Find Interpretable LLM Feature Circuits", arXiv 2406.11944), with TopK codes and an optional linear skip
path (Paulo, Shabalin, Belrose 2025, "Transcoders Beat Sparse Autoencoders for Interpretability", arXiv 2501.18823).

    z     = x W_enc + b_enc
    f     = ReLU(TopK(z))
    y_hat = f W_dec + b_dec (+ x W_skip)
    L     = ||y - y_hat||^2 + AuxK

Nothing is subtracted from x, which lives in another space than b_dec. Both x and y are multiplied by the same scale s,
that of x. W_skip begins at 0; encoder and decoder are drawn apart. ``decode`` leaves out the skip path, as it knows the
code only; ``forward`` has it.
"""  # noqa: D205

from typing import Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from saelab.core.batch import Batch
from saelab.core.code import SparseCode
from saelab.kernels import encode_topk
from saelab.kernels.segments import offsets_of_topk
from saelab.sae.base import SAE, SAEConfig
from saelab.sae.decoder import normalize_rows_
from saelab.sae.step import Encoding, StepContext


class TranscoderConfig(SAEConfig):
    """Transcoder."""

    architecture: Literal["transcoder"] = "transcoder"
    k: int = Field(default=32, gt=0)
    """Features per token."""
    d_target: int | None = Field(default=None, gt=0)
    """Width of the activations to reconstruct; null: d_in."""
    skip: bool = False
    """Add a linear map of the input to the reconstruction."""

    @property
    def d_out(self) -> int:
        """Width of the reconstruction."""
        return self.d_in if self.d_target is None else self.d_target

    @model_validator(mode="after")
    def _k_fits(self) -> Self:
        if self.k > self.d_sae:
            raise ValueError(f"k = {self.k} is more than d_sae = {self.d_sae}; lower k or raise d_sae")
        return self


class TranscoderSAE(SAE):
    """Transcoder; see the module's docstring. With ``config.skip``: a parameter ``W_skip`` (d_in, d_out)."""

    config: TranscoderConfig

    def __init__(self, config: TranscoderConfig, seed: int | None = 0) -> None:
        """Initialise with random unit rows in encoder and decoder."""
        super().__init__(config, seed)
        if config.skip:
            self.W_skip = nn.Parameter(torch.zeros(config.d_in, config.d_out))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Draw the rows of encoder and decoder uniformly from their unit spheres."""
        for weight in (self.W_dec, self.w_enc_t):
            weight.normal_(generator=generator)
            normalize_rows_(weight)

    @property
    def center(self) -> None:
        """Nothing is subtracted from the input."""
        return None

    def encode_scaled(self, x: Float[Tensor, "n d_in"]) -> SparseCode:
        """Return the k largest activations of each token."""
        indices, values = encode_topk(x, self.w_enc_t, self.b_enc, self.config.k)
        return SparseCode.from_topk(indices, values.relu(), self.d_sae)

    def encode_training(self, batch: Batch, context: StepContext) -> Encoding:
        """Return the k largest activations of each token; k is larger during the k warm-up."""
        k = min(round(self.config.k * context.k_factor), self.d_sae)
        indices, values = self.choose_topk(batch.x, k, context)
        offsets = offsets_of_topk(batch.x.shape[0], k, batch.x.device)
        return self.encoding_at(batch.x, indices.reshape(-1), offsets, values.reshape(-1), context)

    def add_skip(self, x_hat: Float[Tensor, "n d_out"], x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_out"]:
        """Add ``x W_skip``, in raw and in scaled units alike."""
        return x_hat + x @ self.W_skip if self.config.skip else x_hat
