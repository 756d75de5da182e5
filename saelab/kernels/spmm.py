"""A linear layer with a sparse weight: ``y = x W^T + b``, reading only the weights that are there.

The fast twin works on x transposed, (in, n): output row o is the weighted sum of the rows of x^T that o's weights name,
which is one ``embedding_bag``. A row is n numbers in one piece, so every weight costs one vector multiply-add over the
tokens. Turning x and y over costs as much as a sparse product, so two sparse layers with only an elementwise function
between them leave it out: the first hands on the transposed view of (out, n).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from saelab.core.errors import ConfigError
from saelab.kernels.dispatch import Impl, use_sparse

TILE = 512
"""Tokens at a time when the result is turned over: a tile is turned while it is in a core's cache."""


@dataclass(frozen=True)
class SparseWeight:
    """A weight (out, in) in rows (CSR)."""

    columns: Int[Tensor, " nnz"]
    """Input of each weight, row after row."""
    values: Float[Tensor, " nnz"]
    """The weights."""
    offsets: Int[Tensor, " out"]
    """Where each row begins."""
    shape: tuple[int, int]
    """(outputs, inputs)."""

    @staticmethod
    def from_dense(weight: Float[Tensor, "out in"]) -> "SparseWeight":
        """Keep what is not zero."""
        weight = weight.detach()
        there = weight != 0
        counts = there.sum(dim=1)
        rows, columns = weight.shape
        return SparseWeight(there.nonzero()[:, 1], weight[there], counts.cumsum(0) - counts, (rows, columns))

    def to_dense(self) -> Float[Tensor, "out in"]:
        """Return the dense weight."""
        ends = torch.cat([self.offsets[1:], self.offsets.new_tensor([len(self.values)])])
        rows = torch.arange(self.shape[0], device=self.values.device).repeat_interleave(ends - self.offsets)
        dense = self.values.new_zeros(self.shape)
        dense[rows, self.columns] = self.values
        return dense


def spmm(
    x: Float[Tensor, "n in"],
    weight: SparseWeight,
    bias: Float[Tensor, " out"] | None = None,
    *,
    transposed: bool = False,
    impl: Impl = "auto",
) -> Float[Tensor, "n out"]:
    """Return ``x W^T + b``; the fast twin has no gradient, since the model is frozen.

    With ``transposed`` the result is a view whose memory is (out, n), else it lies as usual. Raises
    :class:`ConfigError` when the widths do not fit.
    """
    if x.shape[1] != weight.shape[1]:
        raise ConfigError(f"x has {x.shape[1]} columns, the sparse weight takes {weight.shape[1]}")
    if not use_sparse(impl):
        return F.linear(x, weight.to_dense(), bias)
    # float32 throughout: embedding_bag adds up in the dtype it is given.
    inputs, values = x.T.float(), weight.values.float()

    def product(part: Tensor) -> Tensor:
        y = F.embedding_bag(weight.columns, part.contiguous(), weight.offsets, mode="sum", per_sample_weights=values)
        return y if bias is None else y.add_(bias.float()[:, None])

    if transposed:
        return product(inputs).T.to(x.dtype)
    out = x.new_empty(x.shape[0], weight.shape[0])
    for begin in range(0, x.shape[0], TILE):
        out[begin : begin + TILE].copy_(product(inputs[:, begin : begin + TILE]).T)
    return out
