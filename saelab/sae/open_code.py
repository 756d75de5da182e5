"""What ReLU, JumpReLU and Gated SAEs share: no budget bounds their codes, the data and a penalty do.

The encoder is tiled and gives the entries above a threshold, so a step costs what its code holds. After training that
is little. It may not be at the start: with random weights and no bias half of all features are active, and a code of
N d_sae / 2 entries takes more memory than the dense matrix would, so these architectures begin with biases or
thresholds that leave few active. While more than one in :data:`CROWDED` features is active all the same, dense products
are used, and matrices of size (N, d_sae) are held for the backward pass.
"""

from dataclasses import replace

from saelab.core.batch import Batch
from saelab.core.code import SparseCode
from saelab.kernels import Impl
from saelab.sae.base import SAE
from saelab.sae.step import StepContext, TrainingPass

CROWDED = 3
"""Dense products are used while more than d_sae / CROWDED features are active per token."""


class OpenCodeSAE(SAE):
    """Base of SAEs whose number of active features is free."""

    encoder_start = 1.0  # where biases and thresholds begin is told in units in which z is about N(0, 1)

    def crowded(self, n_entries: int, n_tokens: int) -> bool:
        """Return whether a code is so full that dense products are cheaper."""
        return n_entries * CROWDED > n_tokens * self.d_sae

    def context_for(self, n_entries: int, n_tokens: int, context: StepContext) -> StepContext:
        """Return the context to encode a code of that size in."""
        dense = context.impl == "auto" and self.crowded(n_entries, n_tokens)
        return replace(context, impl="reference") if dense else context

    def decode_impl(self, code: SparseCode, context: StepContext) -> Impl:
        """Return the twin to decode a code with."""
        return self.context_for(code.nnz, code.n_tokens, context).impl

    def training_pass(self, batch: Batch, context: StepContext) -> TrainingPass:
        """Return the losses; inactive entries, kept for the sake of a gradient, are dropped from the returned code."""
        passed = super().training_pass(batch, context)
        assert passed.code is not None
        return replace(passed, code=passed.code.positive())
