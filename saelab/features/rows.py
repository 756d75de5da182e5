"""Taking rows of text, up to a number of tokens, and checking what the model says at them."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.core.code import SparseCode
from saelab.core.errors import ActivationError, ConfigError, TextError
from saelab.features.protocols import Dictionary, Model, Rows

ENCODE_BYTES = 128 << 20
"""Tokens are encoded in parts so that one dense (tokens, d_sae) float32 matrix stays below this."""


@dataclass(frozen=True, eq=False)
class Piece:
    """Some consecutive rows."""

    first_row: int
    """Number of the first of them, from 0."""
    tokens: Int[Tensor, "b t"]
    """Token ids."""
    keep: Bool[Tensor, "b t"]
    """False at BOS, padding and other special tokens."""

    @property
    def n_kept(self) -> int:
        """Number of kept tokens."""
        return int(self.keep.sum())


def pieces(rows: Rows, rows_per_batch: int, max_tokens: int | None) -> Iterator[Piece]:
    """Yield the rows in batches: whole rows, the fewest first ones that hold ``max_tokens`` kept tokens (None: all).

    Which rows are taken does not depend on ``rows_per_batch``. Raises :class:`TextError` when no token is kept at all.
    """
    if rows_per_batch < 1 or (max_tokens is not None and max_tokens < 1):
        raise ConfigError(
            f"rows_per_batch ({rows_per_batch}) and max_tokens ({max_tokens}) must be at least 1; give positive numbers"
        )
    row, kept = 0, 0
    batches = rows.batches(rows_per_batch)
    try:
        for batch in batches:
            tokens, keep = batch.tokens, batch.keep
            if max_tokens is not None:
                before = kept + keep.sum(1).cumsum(0) - keep.sum(1)
                wanted = int((before < max_tokens).sum())
                tokens, keep = tokens[:wanted], keep[:wanted]
            if tokens.shape[0]:
                kept += int(keep.sum())
                yield Piece(row, tokens, keep)
                row += tokens.shape[0]
            if max_tokens is not None and kept >= max_tokens:
                break
    finally:
        if isinstance(batches, Generator):  # the rows may be read ahead by a thread: let it end
            batches.close()
    if not kept:
        raise TextError(f"{source_name(rows)} holds no tokens to look at; give text longer than its special tokens")


def source_name(rows: Rows) -> str:
    """Name of the text that the rows come from (``"rows"`` when they do not say)."""
    source = getattr(rows, "source", None)
    return str(getattr(source, "name", None) or getattr(rows, "name", None) or "rows")


def source_fingerprint(rows: Rows) -> str:
    """Fingerprint of that text (``""`` when the rows do not say)."""
    source = getattr(rows, "source", None)
    return str(getattr(source, "fingerprint", None) or getattr(rows, "fingerprint", None) or "")


def describe_rows(rows: Rows) -> dict[str, Any]:
    """How the text was cut into rows: context, packing, BOS (empty when the rows do not say)."""
    describe = getattr(rows, "describe", None)
    return dict(describe()) if callable(describe) else {}


def dictionary_name(sae: Dictionary) -> str:
    """Architecture of a dictionary, or its class."""
    config = getattr(sae, "config", None)
    return str(getattr(config, "architecture", None) or type(sae).__name__)


def require_fit(model: Model, sae: Dictionary, site: str) -> int:
    """Return the width of the site; :class:`ActivationError` when the SAE has another.

    An unknown site is the model's own :class:`~saelab.core.errors.SiteError`.
    """
    width = model.width(site)
    if width != sae.d_in:
        raise ActivationError(
            f"the SAE reads activations of width {sae.d_in}, but {site} of {model.name} has width {width}; "
            "give the model and site that the SAE was trained on"
        )
    return width


def read_site(model: Model, tokens: Int[Tensor, "b t"], site: str) -> Float[Tensor, "b t d"]:
    """Activations at one site (whichever of its names ``site`` is)."""
    (x,) = model.read(tokens, [site]).values()
    return x


def require_finite(x: Float[Tensor, "b t d"], piece: Piece, site: str) -> None:
    """Raise :class:`ActivationError`, naming rows, when a kept position of ``x`` holds NaN or infinity."""
    broken = ~torch.isfinite(x).all(-1) & piece.keep.to(x.device)
    if bool(broken.any()):
        where = broken.nonzero()
        rows = sorted(set((where[:, 0] + piece.first_row).tolist()))[:5]
        row, position = int(where[0, 0]) + piece.first_row, int(where[0, 1])
        raise ActivationError(
            f"activations at {site} hold NaN or infinity in {int(broken.sum())} tokens "
            f"(rows {', '.join(map(str, rows))}; first at row {row}, position {position}); "
            "check the model's dtype, float32 is the safe one"
        )


def encode_in_parts(sae: Dictionary, x: Float[Tensor, "n d"], site: str) -> SparseCode:
    """Encode activations of any dtype and device, in parts of bounded size.

    Raises :class:`ActivationError` when the code of finite activations is not finite.
    """
    x = x.to(sae.W_dec.device, torch.float32)
    if not x.shape[0]:
        nothing = torch.zeros(0, dtype=torch.int64, device=x.device)
        return SparseCode(nothing, x.new_zeros(0), torch.zeros(1, dtype=torch.int64, device=x.device), sae.d_sae)
    step = max(1, ENCODE_BYTES // (4 * sae.d_sae))
    codes = [sae.encode(x[i : i + step]).detach() for i in range(0, x.shape[0], step)]
    code = SparseCode.concatenate(codes) if len(codes) > 1 else codes[0]
    if not bool(torch.isfinite(code.values).all()):
        raise ActivationError(f"the SAE gives NaN or infinity for finite activations at {site}; its weights are broken")
    return code
