"""What the feature store and the analyses need of a model, of text rows and of a dictionary: methods, not classes.

A hand-set oracle dictionary or a ten-line model satisfies them, so everything above can be tested
against planted truth.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.core.code import SparseCode

Replace = Callable[[Tensor], Tensor]
"""A site's new activation, (B, T, d) -> (B, T, d)."""


@runtime_checkable
class Model(Protocol):
    """A language model whose sites can be read and replaced.

    If it has a ``tokenizer`` (Hugging Face), tokens are shown as text, otherwise by number. If it has a ``bridge``
    (TransformerLens), features of the residual stream get logit weights.
    """

    @property
    def name(self) -> str:
        """What the user called it."""

    @property
    def fingerprint(self) -> str:
        """Hash of its config and weights."""

    @property
    def d_vocab(self) -> int:
        """Number of token ids."""

    def width(self, site: str) -> int:
        """Activation width at ``site``."""

    def read(self, tokens: Int[Tensor, "b t"], sites: Sequence[str]) -> Mapping[str, Tensor]:
        """Activations (B, T, d) at the sites."""

    def logits(self, tokens: Int[Tensor, "b t"], replace: Mapping[str, Replace] | None = None) -> Tensor:
        """Next-token logits (B, T, d_vocab), with some sites replaced by a function of themselves."""


@runtime_checkable
class RowBatch(Protocol):
    """A few rows of token ids."""

    @property
    def tokens(self) -> Int[Tensor, "b t"]:
        """Token ids."""

    @property
    def keep(self) -> Bool[Tensor, "b t"]:
        """False at BOS, padding and other special tokens."""


@runtime_checkable
class Rows(Protocol):
    """Text as rows of token ids; each call of ``batches`` starts afresh."""

    def batches(self, rows_per_batch: int, start_row: int = 0) -> Iterator[Any]:
        """Yield :class:`RowBatch` objects, the same rows in the same order every time."""


@runtime_checkable
class Dictionary(Protocol):
    """A sparse autoencoder: any object that encodes and decodes raw activations."""

    @property
    def d_in(self) -> int:
        """Activation width."""

    @property
    def d_sae(self) -> int:
        """Number of features."""

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:
        """Read directions."""

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_in"]:
        """Write directions."""

    def encode(self, x: Float[Tensor, "n d_in"]) -> SparseCode:
        """Sparse code of n tokens."""

    def decode(self, code: SparseCode) -> Float[Tensor, "n d_in"]:
        """Activations that the code stands for."""
