"""First pass of a build: text -> token table and the code matrix by token, appended to disk as it is made."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64

from saelab.core.code import SparseCode
from saelab.core.progress import progress
from saelab.features.arrays import NpyWriter, npy_writers
from saelab.features.layout import IDS, INDICES, INDPTR, KEEP, ROW_OFFSETS, VALUES
from saelab.features.protocols import Dictionary, Model, Rows
from saelab.features.rows import Piece, encode_in_parts, pieces, read_site, require_finite


@dataclass(eq=False)
class Totals:
    """What the first pass counts, per feature and in all."""

    count: Int64[np.ndarray, " d_sae"]
    """Tokens on which each feature fires."""
    total: Float64[np.ndarray, " d_sae"]
    """Sum of its values, added up in token order (so that it does not depend on any batch size)."""
    maximum: Float32[np.ndarray, " d_sae"]
    """Its largest value, 0 when it never fires."""
    n_tokens: int = 0
    """Tokens in the table, excluded ones too."""
    n_kept: int = 0
    """Tokens that were encoded."""
    n_rows: int = 0
    """Rows of text."""

    @property
    def nnz(self) -> int:
        """Entries of the code matrix."""
        return int(self.count.sum())


@contextmanager
def encoder(folder: Path, d_sae: int) -> Iterator["Encoder"]:
    """Open an :class:`Encoder`; its files are complete when the block ends without error."""
    dtypes = {
        IDS: np.int32,
        KEEP: np.bool_,
        ROW_OFFSETS: np.int64,
        INDPTR: np.int64,
        INDICES: np.uint16 if d_sae <= 1 << 16 else np.uint32,
        VALUES: np.float32,
    }
    with npy_writers(folder, dtypes) as files:
        yield Encoder(files, d_sae)


class Encoder:
    """Writes the token table and the code matrix by token of a feature store."""

    def __init__(self, files: dict[str, NpyWriter], d_sae: int) -> None:
        self.totals = Totals(np.zeros(d_sae, np.int64), np.zeros(d_sae), np.zeros(d_sae, np.float32))
        self._files = files
        self._files[ROW_OFFSETS].append(np.zeros(1))
        self._files[INDPTR].append(np.zeros(1))
        self._nnz = 0

    def add(self, piece: Piece, code: SparseCode) -> None:
        """Append some rows and the code of their kept tokens. Excluded tokens at the end of a row (padding) are cut."""
        totals = self.totals
        keep = piece.keep.cpu().numpy()
        length = np.where(keep.any(1), keep.shape[1] - keep[:, ::-1].argmax(1), 0)
        inside = np.arange(keep.shape[1]) < length[:, None]
        self._files[IDS].append(piece.tokens.cpu().numpy()[inside])
        self._files[KEEP].append(keep[inside])
        self._files[ROW_OFFSETS].append(totals.n_tokens + np.cumsum(length))

        indices, values, per_token = _sorted_entries(code)
        per_position = np.zeros(keep.shape, np.int64)
        per_position[keep] = per_token
        self._files[INDPTR].append(self._nnz + np.cumsum(per_position[inside]))
        self._files[INDICES].append(indices)
        self._files[VALUES].append(values)
        self._nnz += len(values)
        totals.n_tokens += int(length.sum())
        totals.n_kept += int(keep.sum())
        totals.n_rows += len(keep)
        totals.count += np.bincount(indices, minlength=len(totals.count))
        np.add.at(totals.total, indices, values.astype(np.float64))
        np.maximum.at(totals.maximum, indices, values)


@torch.no_grad()
def encode_text(
    model: Model,
    sae: Dictionary,
    rows: Rows,
    site: str,
    folder: Path,
    *,
    max_tokens: int | None,
    rows_per_batch: int,
) -> Totals:
    """Run the model and the SAE over the rows and write what they say to ``folder``."""
    with encoder(folder, sae.d_sae) as writer, progress("encode", max_tokens) as bar:
        for piece in pieces(rows, rows_per_batch, max_tokens):
            x = read_site(model, piece.tokens, site)
            require_finite(x, piece, site)
            writer.add(piece, encode_in_parts(sae, x[piece.keep.to(x.device)], site).positive())
            bar.advance(piece.n_kept)
    return writer.totals


def _sorted_entries(code: SparseCode) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features (rising within each token), values, and number of entries of each token."""
    order = torch.argsort(code.rows() * code.d_sae + code.indices)
    return code.indices[order].cpu().numpy(), code.values[order].cpu().numpy(), code.offsets.diff().cpu().numpy()
