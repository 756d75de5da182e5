"""Feature-Choice: each feature i takes its m_i tokens of a batch (Ayonrinde 2024, arXiv 2411.02124).

    z     = (x - b_dec) W_enc + b_enc                     (N, d_sae)
    S     = for each feature i, the m_i tokens with the largest z;    sum_i m_i = M = k N exactly
    f     = ReLU(z) on S, 0 elsewhere
    x_hat = f W_dec + b_dec
    L     = ||x - x_hat||^2 + AuxK (or aux_zipf, see allocation.py)

Quotas m_i are uniform, or follow a Zipf-Mandelbrot law ``m_i ~ (r_i + shift)^-exponent`` by the rank r_i of the
feature, rounded to whole numbers in [1, N] (:func:`~saelab.sae.zipf.whole_quotas`).

Choices of this library, where the paper's details were not available to us:

* **Ranking uses raw z**, so that a feature whose z is negative everywhere still takes its m_i tokens. Its activations
  there are 0, and ReLU would give it no gradient: it would stay dead, and "no dead features" would be true on paper
  only. With ``below_zero: raise`` (the default) the gradient of a chosen entry with z <= 0 passes when it asks for a
  larger activation, and is dropped when it asks for a smaller one, which a value of 0 cannot follow
  (:func:`~saelab.sae.activations.raised_relu`). Codes stay non-negative. ``below_zero: none`` is plain ReLU.
* **Ranks** cannot come from how often a feature is chosen, because its quota decides that: the first ranking would be
  frozen. They come from its *demand*, the fraction of tokens with z above one level for all features (the mean of
  their thresholds), as an exponential mean, refreshed every ``rank_every`` batches; quotas are uniform until then.
* **Thresholds** of inference, ``f = z where z > theta_i``: the mean over batches of the midpoint between the least
  chosen and the largest refused z of feature i (at least 0). The least chosen alone would be too high for small quotas:
  with m_i = 1 nearly half of the activations would be lost.
* A batch with fewer entries than features (k N < d_sae) cannot give each feature one; quotas of 0 and 1 then go round.
"""

import math
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Float, Float64, Int
from pydantic import Field
from torch import Tensor

from saelab.core.batch import Batch
from saelab.core.code import SparseCode
from saelab.kernels import Columns, encode_topk, select_columns
from saelab.sae.activations import raised_relu
from saelab.sae.allocation import DENSITY_DECAY, AllocatedSAE, AllocationConfig
from saelab.sae.step import Encoding, StepContext
from saelab.sae.thresholds import average_in_
from saelab.sae.zipf import ranks_of, whole_quotas, zipf_shares

GOLDEN = (math.sqrt(5) - 1) / 2
"""Multiples of it, modulo 1, spread evenly whatever their number."""


class FeatureChoiceConfig(AllocationConfig):
    """Feature-Choice SAE."""

    architecture: Literal["feature_choice"] = "feature_choice"
    quotas: Literal["zipf", "uniform"] = "zipf"
    """How the budget is divided among features."""
    rank_every: int = Field(default=100, gt=0)
    """Batches between two rankings of the features (zipf)."""
    threshold_decay: float = Field(default=0.97, ge=0, lt=1)
    """As in Mutual-Choice; a feature's own threshold rests on few tokens of a batch and needs more smoothing."""
    below_zero: Literal["raise", "none"] = "raise"
    """Gradient of chosen entries that are not positive: only where it raises them, or none."""


class FeatureChoiceSAE(AllocatedSAE):
    """Feature-Choice SAE; see the module's docstring.

    Buffers: ``theta`` (d_sae,), thresholds of inference; ``thetas`` (d_sae,), the number of batches each was learned
    from; ``demand`` (d_sae,); ``rank`` (d_sae,), 0 for the feature in most demand, -1 before the first ranking.
    """

    config: FeatureChoiceConfig
    theta: Float[Tensor, " d_sae"]
    thetas: Int[Tensor, " d_sae"]
    demand: Float[Tensor, " d_sae"]
    rank: Int[Tensor, " d_sae"]
    in_code_units = ("b_enc", "b_dec", "theta")

    def __init__(self, config: FeatureChoiceConfig, seed: int | None = 0) -> None:
        """Initialise as :class:`SAE` does, without thresholds and ranks."""
        super().__init__(config, seed)
        self.register_buffer("theta", torch.zeros(config.d_sae))
        self.register_buffer("thetas", torch.zeros(config.d_sae, dtype=torch.int64))
        self.register_buffer("demand", torch.zeros(config.d_sae))
        self.register_buffer("rank", torch.full((config.d_sae,), -1, dtype=torch.int64))

    @property
    def threshold(self) -> Float[Tensor, " d_sae"] | None:
        """Thresholds, infinite for features that have not had a quota yet; None before the first training batch."""
        return torch.where(self.thetas > 0, self.theta, torch.inf) if int(self.batches) else None

    def density_ranks(self) -> Int[Tensor, " d_sae"]:
        """Return the ranks that quotas go by; before the first ranking, by running density."""
        return self.rank if self._ranked() else ranks_of(self.density)

    def quotas(self, n: int, factor: float = 1.0) -> Int[Tensor, " d_sae"]:
        """Return the number of tokens that each feature takes of n; their sum is the budget."""
        c, ranked = self.config, self.config.quotas == "zipf" and self._ranked()
        total = self.budget(n, factor)
        phase = 0.0 if total >= c.d_sae else int(self.batches) * GOLDEN % 1.0
        by_rank = _quotas(c.d_sae, c.zipf_exponent if ranked else 0.0, c.zipf_shift, total, n, phase)
        by_rank = by_rank.to(self.rank.device)
        return by_rank[self.rank] if ranked else by_rank

    def encode_scaled(self, x: Float[Tensor, "n d_in"]) -> SparseCode:
        """Return the activations above each feature's threshold; before training, each token's round(k) largest."""
        threshold = self.threshold
        if threshold is not None:
            return self.encode_above(x, threshold)
        k = max(1, round(self.config.k))
        indices, values = encode_topk(x, self.w_enc_t, self.b_enc, k, center=self.center)
        return SparseCode.from_topk(indices, values.relu(), self.d_sae)

    def encode_training(self, batch: Batch, context: StepContext) -> Encoding:
        """Return the activations of each feature's tokens; learn thresholds, ranks and densities in training mode."""
        n = batch.x.shape[0]
        quotas = self.quotas(n, context.k_factor)
        found = select_columns(
            self.centered(batch.x),
            self.w_enc_t.detach(),
            self.b_enc.detach(),
            quotas,
            self._level() if self.training else None,
            precision=context.precision,
            impl=context.impl,
        )
        activation = raised_relu if self.config.below_zero == "raise" else torch.relu
        indices, values, offsets = found.entries
        encoding = self.encoding_at(batch.x, indices, offsets, values, self.aux_context(context), activation)
        if self.training and values.numel():
            self._learn(found, n)
            self.note_density(encoding)
        return encoding

    def _level(self) -> Float[Tensor, ""] | None:
        """Return the level that demand is counted above; None before there are thresholds."""
        known = self.thetas > 0
        return self.theta[known].mean() if self.config.quotas == "zipf" and int(self.batches) else None

    def _ranked(self) -> bool:
        return int(self.rank[0]) >= 0

    def _learn(self, found: Columns, n: int) -> None:
        seen = found.border.isfinite()
        self.thetas += seen
        border = torch.where(seen, found.border.clamp(min=0).to(self.theta), self.theta)
        average_in_(self.theta, border, self.thetas, self.config.threshold_decay)
        if self.config.quotas == "zipf" and int(self.batches):  # the first batch had no level to count above
            average_in_(self.demand, (found.demand / n).to(self.demand), self.batches, DENSITY_DECAY)
            if int(self.batches) % self.config.rank_every == 0:
                if not self._ranked():  # thresholds of uniform quotas say little about those to come: start over
                    self.thetas.clamp_(max=1)
                self.rank.copy_(ranks_of(self.demand))


@lru_cache(maxsize=8)
def _quotas(  # noqa: PLR0917
    d_sae: int, exponent: float, shift: float, total: int, n: int, phase: float
) -> Int[Tensor, " d_sae"]:
    shares: Float64[Tensor, " d_sae"] = zipf_shares(d_sae, exponent, shift)
    return whole_quotas(shares, total, n, phase) if n else torch.zeros(d_sae, dtype=torch.int64)
