"""Mutual-Choice: the k N largest pre-activations of a batch of N tokens, wherever they are.

The same allocation was published twice: as BatchTopK (Bussmann, Leask, Nanda 2024, arXiv 2412.06410) and as Mutual
Choice (Ayonrinde 2024, arXiv 2411.02124). ``mutual_choice`` and ``batchtopk`` name this one implementation.

    z     = (x - b_dec) W_enc + b_enc                  (N, d_sae)
    S     = the M = k N largest entries of z           training: tokens compete
    f     = ReLU(z) on S, 0 elsewhere
    x_hat = f W_dec + b_dec
    L     = ||x - x_hat||^2 + AuxK (or aux_zipf, see allocation.py)

A token with much to explain gets more features than another. Entries of S whose z is not positive are stored with value
0 and get no gradient. Exactly M entries are chosen, ties included. With orthonormal decoder rows and oracle z the error
is the sum of z^2 outside S, so no other choice of M entries does better.

Inference sees each token on its own: ``f = z`` where ``z > theta``. ``theta`` is the mean over training batches
(exponential, bias-corrected) of the least activation chosen. Before the first batch there is no theta, and each token
keeps its round(k) largest. Training mode and inference mode differ in L0 and FVU: report both (``encode_as_trained``).
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import field_validator
from torch import Tensor

from saelab.core.batch import Batch
from saelab.core.code import SparseCode
from saelab.kernels import Entries, encode_topk, select_budget
from saelab.sae.allocation import AllocatedSAE, AllocationConfig
from saelab.sae.step import Encoding, StepContext
from saelab.sae.thresholds import average_in_
from saelab.sae.zipf import ranks_of


class MutualChoiceConfig(AllocationConfig):
    """Mutual-Choice (BatchTopK) SAE."""

    architecture: Literal["mutual_choice", "batchtopk"] = "mutual_choice"

    @field_validator("architecture")
    @classmethod
    def _one_name(cls, name: str) -> str:
        return "mutual_choice" if name == "batchtopk" else name


class MutualChoiceSAE(AllocatedSAE):
    """Mutual-Choice SAE; see the module's docstring. Buffer ``theta`` (scalar): the threshold of inference."""

    config: AllocationConfig
    theta: Float[Tensor, ""]
    in_code_units = ("b_enc", "b_dec", "theta")

    def __init__(self, config: AllocationConfig, seed: int | None = 0) -> None:
        """Initialise as :class:`SAE` does, without a threshold."""
        super().__init__(config, seed)
        self.register_buffer("theta", torch.zeros(()))

    @property
    def threshold(self) -> Float[Tensor, " d_sae"] | None:
        """The one threshold, for every feature; None before the first training batch."""
        return self.theta.expand(self.d_sae) if int(self.batches) else None

    @torch.no_grad()
    def set_threshold(self, theta: float) -> None:
        """Give the threshold, in scaled units, of an SAE that was trained elsewhere."""
        self.theta.fill_(theta)
        self.batches.clamp_(min=1)

    def density_ranks(self) -> Int[Tensor, " d_sae"]:
        """Return each feature's rank by running density."""
        return ranks_of(self.density)

    def encode_scaled(self, x: Float[Tensor, "n d_in"]) -> SparseCode:
        """Return the activations above the threshold."""
        if int(self.batches):
            return self.encode_above(x, self.theta)
        k = max(1, round(self.config.k))
        indices, values = encode_topk(x, self.w_enc_t, self.b_enc, k, center=self.center)
        return SparseCode.from_topk(indices, values.relu(), self.d_sae)

    def encode_training(self, batch: Batch, context: StepContext) -> Encoding:
        """Return the k N largest activations of the batch; learn threshold and densities while in training mode."""
        found = select_budget(
            self.centered(batch.x),
            self.w_enc_t.detach(),
            self.b_enc.detach(),
            self.budget(batch.x.shape[0], context.k_factor),
            precision=context.precision,
            impl=context.impl,
        )
        aux = self.aux_context(context)
        encoding = self.encoding_at(batch.x, found.indices, found.offsets, found.values, aux)
        if self.training and found.values.numel():
            self.note_density(encoding)
            self._note_least(found)
        return encoding

    def _note_least(self, found: Entries) -> None:
        least = found.values.min().clamp(min=0).to(self.theta)
        average_in_(self.theta, least, self.batches, self.config.threshold_decay)
