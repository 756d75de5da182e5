"""What Mutual-Choice and Feature-Choice share: a budget of entries per batch, running densities, and aux_zipf.

Ayonrinde 2024 ("Adaptive Sparse Allocation with Mutual Choice & Feature Choice Sparse Autoencoders", arXiv 2411.02124)
casts the choice of active (token, feature) pairs as an allocation of a budget of ``M = k N`` pairs in a batch of N
tokens. The paper names an auxiliary loss ``aux_zipf`` against dead *and under-used* features. Its formula was not
available to us; the one here is our design:

    rho_i   running density of feature i (exponential mean over batches of the fraction of tokens it is active on)
    q_r     expected density at rank r: k times the Zipf-Mandelbrot share (r + shift)^-exponent / sum, at most 1
    U       the features with rho_i < underused * q_rank(i)
    L_aux   AuxK with U in the place of the dead features
"""

from abc import abstractmethod
from dataclasses import replace
from typing import Literal, Self

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from saelab.sae.base import SAE, SAEConfig
from saelab.sae.step import Encoding, StepContext
from saelab.sae.thresholds import average_in_
from saelab.sae.zipf import zipf_shares

DENSITY_DECAY = 0.98
"""Decay of running densities per batch."""
DENSITY_BATCHES = 50
"""Batches that densities are averaged over before aux_zipf judges by them."""


class AllocationConfig(SAEConfig):
    """What Mutual-Choice and Feature-Choice SAEs are configured by."""

    k: float = Field(default=32, gt=0)
    """Features per token on average; the budget of a batch is k times its tokens."""
    threshold_decay: float = Field(default=0.9, ge=0, lt=1)
    """Decay, per batch, of the mean that the threshold of inference is learned by; it should follow the training, and
    a statistic of a whole batch needs little smoothing."""
    aux: Literal["dead", "zipf"] = "dead"
    """Whom AuxK revives: dead features, or (aux_zipf) all that fall short of a Zipf law of densities."""
    zipf_exponent: float = Field(default=1.0, ge=0)
    """Exponent s of the Zipf-Mandelbrot law (rank + shift)^-s; 0 is uniform."""
    zipf_shift: float = Field(default=20.0, ge=0)
    """Shift of the law."""
    underused: float = Field(default=0.5, gt=0)
    """With aux: zipf, features below this fraction of the law's density at their rank are revived."""

    @model_validator(mode="after")
    def _k_fits(self) -> Self:
        if self.k > self.d_sae:
            raise ValueError(f"k = {self.k:g} is more than d_sae = {self.d_sae}; lower k or raise d_sae")
        return self


class AllocatedSAE(SAE):
    """Base of SAEs that spend a budget over a batch. Buffers: ``density`` (d_sae,), ``batches`` (a count)."""

    config: AllocationConfig
    density: Float[Tensor, " d_sae"]
    batches: Int[Tensor, ""]

    def __init__(self, config: AllocationConfig, seed: int | None = 0) -> None:
        """Initialise as :class:`SAE` does; no batch has been seen."""
        super().__init__(config, seed)
        self.register_buffer("density", torch.zeros(config.d_sae))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def budget(self, n: int, factor: float = 1.0) -> int:
        """Return the number M of entries for n tokens."""
        return min(round(self.config.k * factor * n), n * self.d_sae)

    @abstractmethod
    def density_ranks(self) -> Int[Tensor, " d_sae"]:
        """Return each feature's rank by density, 0 for the densest."""

    def expected_density(self) -> Float[Tensor, " d_sae"]:
        """Return the density that the Zipf-Mandelbrot law expects of each feature at its rank."""
        c = self.config
        by_rank = (c.k * zipf_shares(c.d_sae, c.zipf_exponent, c.zipf_shift)).clamp(max=1)
        return by_rank.to(self.density)[self.density_ranks()]

    def underused(self) -> Int[Tensor, " n_underused"]:
        """Return the features whose running density is below ``config.underused`` of what is expected."""
        return (self.density < self.config.underused * self.expected_density()).nonzero().squeeze(1)

    def aux_context(self, context: StepContext) -> StepContext:
        """Return the context with the features that AuxK revives by this config; None while densities are unknown."""
        if self.config.aux == "dead" or not (context.aux_k and context.aux_coefficient):
            return context
        return replace(context, dead=self.underused() if int(self.batches) >= DENSITY_BATCHES else None)

    @torch.no_grad()
    def note_density(self, encoding: Encoding) -> None:
        """Count one batch, and take the fraction of its tokens that each feature is active on into the mean."""
        code = encoding.code
        self.batches += 1
        active = code.values.new_zeros(self.d_sae).index_add_(0, code.indices, (code.values > 0).to(code.values))
        average_in_(self.density, (active / code.n_tokens).to(self.density), self.batches, DENSITY_DECAY)
