"""Matryoshka: nested dictionaries in one (Bussmann et al. 2025, "Learning Multi-Level Features with Matryoshka Sparse
Autoencoders", arXiv 2503.17547).

    f       = Mutual-Choice (BatchTopK) of z = (x - b_dec) W_enc + b_enc        see mutual_choice.py
    x_hat_p = sum over the features i < m_p of f_i W_dec[i] + b_dec             for prefixes m_1 < ... < m_P = d_sae
    L       = sum_p ||x - x_hat_p||^2 + AuxK on the residual of the whole

Each prefix has to reconstruct on its own, so that early features are general and late ones add detail, instead of
general features being split up and absorbed. One selection, one sparse decode (its bags are pairs of token and part)
and cumulative sums give all prefixes.
"""  # noqa: D205

from itertools import pairwise
from typing import Literal, Self

import torch
from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor

from saelab.core.batch import Batch
from saelab.core.code import SparseCode
from saelab.core.errors import ConfigError
from saelab.kernels import Impl, decode
from saelab.kernels.segments import rows_of
from saelab.sae.allocation import AllocationConfig
from saelab.sae.auxk import decode_aux
from saelab.sae.mutual_choice import MutualChoiceSAE
from saelab.sae.step import StepContext, TrainingPass


class MatryoshkaConfig(AllocationConfig):
    """Matryoshka SAE."""

    architecture: Literal["matryoshka"] = "matryoshka"
    prefixes: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)
    """Nested dictionaries as fractions of d_sae; rising, and the last is 1."""

    @model_validator(mode="after")
    def _nested(self) -> Self:
        sizes = [0, *self.sizes]
        if self.prefixes[-1:] != (1,) or any(a >= b for a, b in pairwise(sizes)):
            raise ValueError(
                f"prefixes must rise to 1 and differ by a feature at least, got {list(self.prefixes)} "
                f"with d_sae = {self.d_sae}; give for example [0.25, 0.5, 1]"
            )
        return self

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of features in each prefix."""
        return tuple(round(fraction * self.d_sae) for fraction in self.prefixes)


class MatryoshkaSAE(MutualChoiceSAE):
    """Matryoshka SAE; see the module's docstring. It infers as Mutual-Choice does."""

    config: MatryoshkaConfig

    def decode_prefix(self, code: SparseCode, level: int) -> Float[Tensor, "n d_out"]:
        """Return the reconstruction, in raw units, by the first ``config.sizes[level]`` features of a code."""
        if not 0 <= level < len(self.config.sizes):
            raise ConfigError(f"this SAE has levels 0 to {len(self.config.sizes) - 1}, got {level}")
        inside = code.indices < self.config.sizes[level]
        return self.decode(SparseCode(code.indices, code.values * inside, code.offsets, self.d_sae))

    def training_pass(self, batch: Batch, context: StepContext) -> TrainingPass:
        """Return the losses: ``mse`` of the whole dictionary, ``prefixes`` of all others together, AuxK."""
        encoding = self.encode_training(batch, context)
        target = batch.x if batch.target is None else batch.target
        rebuilt = self.decode_prefixes(encoding.code, context.impl)
        residuals = target.unsqueeze(1) - rebuilt
        errors = residuals.square().sum(dim=(0, 2)) / max(target.shape[0], 1)
        losses = {"mse": errors[-1], "prefixes": errors[:-1].sum()}
        e_hat = decode_aux(encoding, self.W_dec, context.impl)
        if e_hat is not None:
            missed = (residuals[:, -1].detach() - e_hat).square().sum() / max(target.shape[0], 1)
            losses["aux"] = context.aux_coefficient * missed
        return TrainingPass(losses, encoding.code.detach(), rebuilt[:, -1])

    def decode_prefixes(self, code: SparseCode, impl: Impl = "auto") -> Float[Tensor, "n n_prefixes d_out"]:
        """Return the reconstruction of every prefix, in scaled units."""
        parts = len(self.config.sizes)
        ends = torch.tensor(self.config.sizes, device=code.indices.device)
        part = torch.bucketize(code.indices, ends, right=True)
        bag = rows_of(code.offsets, code.nnz) * parts + part
        bag, order = bag.sort(stable=True)
        offsets = torch.searchsorted(bag, torch.arange(code.n_tokens * parts + 1, device=bag.device))
        split = SparseCode(code.indices[order], code.values[order], offsets, self.d_sae)
        summed = decode(split, self.W_dec, impl=impl).view(code.n_tokens, parts, self.W_dec.shape[1]).cumsum(1)
        return summed + self.b_dec
