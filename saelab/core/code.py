"""``SparseCode``: the sparse activations of a batch of tokens, in one form for every architecture."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SparseCode:
    """Sparse feature activations of N tokens in CSR form.

    Entry ``j`` of token ``t`` (``offsets[t] <= j < offsets[t + 1]``) says that feature ``indices[j]`` is active with
    ``values[j]``. Within a token, indices are distinct; their order carries no meaning.
    """

    indices: Int[Tensor, " nnz"]
    """Feature of each entry, int64, in [0, d_sae)."""
    values: Float[Tensor, " nnz"]
    """Activation of each entry (carries gradient in training)."""
    offsets: Int[Tensor, " n_tokens_plus_1"]
    """Row pointers, int64: first entry of each token, and nnz at the end."""
    d_sae: int
    """Number of features."""

    @property
    def n_tokens(self) -> int:
        """Number of tokens N."""
        return self.offsets.numel() - 1

    @property
    def nnz(self) -> int:
        """Number of stored entries."""
        return self.indices.numel()

    def rows(self) -> Int[Tensor, " nnz"]:
        """Token of each entry."""
        counts = self.offsets.diff()
        return torch.repeat_interleave(torch.arange(self.n_tokens, device=counts.device), counts, output_size=self.nnz)

    def l0(self) -> Int[Tensor, " n_tokens"]:
        """Number of entries with a positive value, per token."""
        active = (self.values.detach() > 0).to(torch.int64)
        total = torch.cat([active.new_zeros(1), active.cumsum(0)])
        return total[self.offsets[1:]] - total[self.offsets[:-1]]

    def to_dense(self) -> Float[Tensor, "n_tokens d_sae"]:
        """The same code as a dense (N, d_sae) matrix, differentiable in ``values``."""
        dense = self.values.new_zeros(self.n_tokens, self.d_sae)
        return dense.index_put((self.rows(), self.indices), self.values, accumulate=True)

    def positive(self) -> "SparseCode":
        """Drop entries whose value is not positive."""
        keep = self.values > 0
        counts = torch.cat([keep.new_zeros(1, dtype=torch.int64), keep.to(torch.int64).cumsum(0)])
        return SparseCode(self.indices[keep], self.values[keep], counts[self.offsets], self.d_sae)

    def detach(self) -> "SparseCode":
        """The same code without gradient."""
        return SparseCode(self.indices, self.values.detach(), self.offsets, self.d_sae)

    @staticmethod
    def from_topk(indices: Int[Tensor, "n k"], values: Float[Tensor, "n k"], d_sae: int) -> "SparseCode":
        """From k entries per token."""
        n, k = indices.shape
        offsets = torch.arange(0, n * k + 1, k, device=indices.device) if k else indices.new_zeros(n + 1)
        return SparseCode(indices.reshape(-1), values.reshape(-1), offsets, d_sae)

    @staticmethod
    def from_dense(dense: Float[Tensor, "n d_sae"]) -> "SparseCode":
        """From a dense matrix; the nonzero entries are kept."""
        rows, columns = dense.nonzero(as_tuple=True)
        counts = torch.bincount(rows, minlength=dense.shape[0])
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return SparseCode(columns, dense[rows, columns], offsets, dense.shape[1])

    @staticmethod
    def concatenate(codes: "list[SparseCode]") -> "SparseCode":
        """Stack the codes of several batches of tokens."""
        starts = torch.tensor([0] + [code.nnz for code in codes]).cumsum(0)
        offsets = torch.cat(
            [codes[0].offsets[:1]]
            + [c.offsets[1:] + s.to(c.offsets.device) for c, s in zip(codes, starts, strict=False)]
        )
        return SparseCode(
            torch.cat([c.indices for c in codes]), torch.cat([c.values for c in codes]), offsets, codes[0].d_sae
        )
