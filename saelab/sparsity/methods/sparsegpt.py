"""SparseGPT: prune column by column and let the columns to the right make up for it (Frantar & Alistarh 2023).

arXiv 2301.00774, algorithm 1. With H = X^T X + lambda I and its inverse's upper Cholesky factor U (H^-1 = U^T U),
removing w_j costs w_j^2 / U_jj^2, and the error (w_j - 0) / U_jj times U's row is taken from the columns not yet
visited.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from saelab.sparsity.methods.base import Method, Pruned
from saelab.sparsity.pattern import NofM, Pattern, Unstructured, keep_largest
from saelab.sparsity.statistics import InputStatistics


class SparseGPT(Method):
    """Optimal brain surgeon, one column at a time, the mask of a block chosen when the block is reached."""

    name: Literal["sparsegpt"] = "sparsegpt"
    need = "gram"
    block: int = Field(default=128, ge=1)
    """Columns whose mask is chosen together (B of the paper)."""
    damping: float = Field(default=0.01, gt=0)
    """lambda, as a share of the mean diagonal of X^T X."""

    def prune(
        self, weight: Tensor, inputs: InputStatistics | None, pattern: Pattern | None, generator: torch.Generator
    ) -> Pruned:
        """Prune one layer."""
        assert pattern is not None
        assert inputs is not None
        if isinstance(pattern, NofM):
            pattern.require(weight.shape[1])
        work = weight.clone()
        unused = inputs.gram.diagonal() == 0
        work[:, unused] = 0
        factor = inverse_factor(inputs.gram, self.damping).float()
        mask = torch.ones_like(work, dtype=torch.bool)
        done = 0
        for begin in range(0, work.shape[1], self._step(pattern)):
            end = min(begin + self._step(pattern), work.shape[1])
            cost = work[:, begin:end].square() / factor.diagonal()[begin:end].square()
            mask[:, begin:end], done = _block_mask(cost, pattern, end, done)
            errors = torch.zeros(work.shape[0], end - begin)
            for j in range(begin, end):
                error = torch.where(mask[:, j], 0.0, work[:, j]) / factor[j, j]
                work[:, j:end] -= error[:, None] * factor[j, j:end]
                errors[:, j - begin] = error
            work[:, end:] -= errors @ factor[begin:end, end:]
        work = torch.where(mask, work, torch.zeros_like(work))
        return Pruned(work, mask)

    def _step(self, pattern: Pattern) -> int:
        # Within a block the scores are those at its start; with N:M the groups are the blocks, as in the paper.
        return pattern.m if isinstance(pattern, NofM) else self.block


def inverse_factor(gram: Float[Tensor, "d d"], damping: float) -> Float[Tensor, "d d"]:
    """Return the upper Cholesky factor U of (gram + lambda I)^-1, so that the inverse is U^T U, in float64."""
    gram = gram.double().clone()
    diagonal = gram.diagonal()
    diagonal[diagonal == 0] = 1.0  # an input that is always zero: its weights are zeroed and cost nothing
    diagonal += damping * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def _block_mask(
    cost: Float[Tensor, "out b"], pattern: Pattern, end: int, done: int
) -> tuple[Bool[Tensor, "out b"], int]:
    """Return the mask of one block of columns, and how many weights have gone up to ``end`` (exact at the last)."""
    if isinstance(pattern, NofM):
        return keep_largest(cost, pattern.n), done
    assert isinstance(pattern, Unstructured)
    rows, columns = cost.shape
    if pattern.per_row:
        gone = round(pattern.sparsity * end) - done
        return keep_largest(cost, columns - gone), done + gone
    gone = round(pattern.sparsity * rows * end) - done
    return keep_largest(cost.reshape(1, -1), cost.numel() - gone).view(cost.shape), done + gone
