"""The controls that stand beside every number: what an untrained dictionary, and shuffled activations, would give."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.core.code import SparseCode
from saelab.features.protocols import Dictionary


class Untrained:
    """A dictionary of the same width and L0 that has learned nothing: random unit rows, encoder tied to them, TopK.

    ``b_dec`` is the mean activation, which training finds in its first steps.
    """

    def __init__(self, like: Dictionary, mean: Float[Tensor, " d"], l0: float, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(like.d_sae, like.d_in, generator=generator)
        self.W_dec = (rows / rows.norm(dim=1, keepdim=True)).to(like.W_dec.device)
        self.W_enc = self.W_dec.T
        self.b_dec = mean.to(self.W_dec)
        self.d_in, self.d_sae = like.d_in, like.d_sae
        self.k = min(self.d_sae, max(1, round(l0)))

    def encode(self, x: Float[Tensor, "n d"]) -> SparseCode:
        """Return the k largest positive projections."""
        values, indices = ((x.to(self.W_dec) - self.b_dec) @ self.W_enc).topk(self.k, dim=1)
        return SparseCode.from_topk(indices, values.relu(), self.d_sae).positive()

    def decode(self, code: SparseCode) -> Float[Tensor, "n d"]:
        """Return the sum of the active rows, and the mean."""
        return decode_rows(code, self.W_dec) + self.b_dec


class Shuffled:
    """The same dictionary, given activations that were shuffled: each coordinate among the tokens of a batch.

    Every coordinate keeps its values, so what is left is what the marginals alone explain.
    """

    def __init__(self, sae: Dictionary, seed: int = 0) -> None:
        self.sae = sae
        self.d_in, self.d_sae = sae.d_in, sae.d_sae
        self.W_enc, self.W_dec = sae.W_enc, sae.W_dec
        self.input_scale = scale_of(sae)
        self._generator = torch.Generator().manual_seed(seed)

    def encode(self, x: Float[Tensor, "n d"]) -> SparseCode:
        """Return the code of the shuffled activations."""
        order = torch.rand(x.shape, generator=self._generator).argsort(0).to(x.device)
        return self.sae.encode(x.gather(0, order))

    def decode(self, code: SparseCode) -> Float[Tensor, "n d"]:
        """Return what the SAE decodes."""
        return self.sae.decode(code)


def scale_of(sae: Any) -> float:
    """Scalar by which a dictionary multiplies activations inside: decoded rows are divided by it."""
    return float(getattr(sae, "input_scale", 1.0))


def decode_rows(code: SparseCode, w_dec: Float[Tensor, "d_sae d"]) -> Float[Tensor, "n d"]:
    """Sum of the active rows of each token, without bias."""
    return torch.nn.functional.embedding_bag(
        code.indices.to(w_dec.device), w_dec, code.offsets[:-1], per_sample_weights=code.values.to(w_dec), mode="sum"
    )
