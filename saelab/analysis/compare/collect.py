"""Codes of two SAEs on the same tokens: from two feature stores, an activation store, or text through the model(s)."""

from typing import Protocol, runtime_checkable

import numpy as np
import torch
from scipy import sparse

from saelab.activations.store import ActivationStore
from saelab.analysis.compare.codes import CodeMatrix
from saelab.core.code import SparseCode
from saelab.core.errors import ActivationError, StoreError
from saelab.core.progress import progress
from saelab.features import layout
from saelab.features.protocols import Dictionary, Model, Rows
from saelab.features.rows import encode_in_parts, pieces, read_site, require_finite, require_fit
from saelab.features.store import FeatureStore

CHUNK = 8192


@runtime_checkable
class HasTokenizerHash(Protocol):
    """Rows of text that say which tokenizer made them."""

    tokenizer_hash: str


def codes_from_features(
    a: FeatureStore, b: FeatureStore, max_tokens: int | None = None
) -> tuple[CodeMatrix, CodeMatrix]:
    """Codes of two feature stores that were built on the same text.

    The first ``max_tokens`` encoded tokens count (None: all). Raises :class:`StoreError` when the stores hold other
    tokens or leave out other ones.
    """
    for name, what in ((layout.IDS, "tokens"), (layout.KEEP, "encoded tokens"), (layout.ROW_OFFSETS, "rows")):
        left, right = a.array(name), b.array(name)
        if left.shape != right.shape or not np.array_equal(left, right):
            raise StoreError(
                f"{a.path} and {b.path} do not hold the same {what} ({a.manifest.get('source')}, {a.n_tokens} tokens; "
                f"{b.manifest.get('source')}, {b.n_tokens}); build both on the same text, or compare the SAE folders"
            )
    kept = np.flatnonzero(a.array(layout.KEEP))[:max_tokens]
    return _of_features(a, kept), _of_features(b, kept)


def _of_features(store: FeatureStore, kept: np.ndarray) -> CodeMatrix:
    arrays = (store.array(layout.VALUES), store.array(layout.INDICES), store.array(layout.INDPTR))
    matrix = sparse.csr_matrix(arrays, shape=(store.n_tokens, store.n_features))
    return CodeMatrix(matrix[kept])


def codes_from_store(
    store: ActivationStore, a: tuple[Dictionary, str], b: tuple[Dictionary, str], max_tokens: int | None = None
) -> tuple[CodeMatrix, CodeMatrix]:
    """Codes of two SAEs, each at its site, on the first ``max_tokens`` rows of an activation store (None: all).

    Raises :class:`SiteError` for a site the store does not hold, :class:`StoreError` for another width,
    :class:`ActivationError` for NaN or infinity.
    """
    for sae, site in (a, b):
        if store.d_in(site) != sae.d_in:
            raise StoreError(
                f"an SAE reads activations of width {sae.d_in}, but {site} in {store.path} is {store.d_in(site)} wide; "
                "give the store of its site"
            )
    n = min(store.n_rows, max_tokens or store.n_rows)
    codes: tuple[list[SparseCode], list[SparseCode]] = ([], [])
    with progress("encode", n) as bar:
        for start in range(0, n, CHUNK):
            rows = torch.arange(start, min(start + CHUNK, n))
            for (sae, site), into in zip((a, b), codes, strict=True):
                x = store.read_rows(site, rows).float()
                if not bool(torch.isfinite(x).all()):
                    raise ActivationError(
                        f"{store.path} holds NaN or infinity at {site} among rows {start} to {start + len(rows) - 1}; "
                        "harvest again in float32"
                    )
                into.append(_compact(encode_in_parts(sae, x, site)))
            bar.advance(len(rows))
    return CodeMatrix.from_codes(codes[0]), CodeMatrix.from_codes(codes[1])


def codes_from_text(
    a: tuple[Model, Dictionary, str],
    b: tuple[Model, Dictionary, str],
    rows: Rows,
    *,
    max_tokens: int | None = None,
    rows_per_batch: int = 16,
) -> tuple[CodeMatrix, CodeMatrix]:
    """Codes of two SAEs, each with its model and site, on the kept tokens of the same rows of text.

    The models may differ; they must read the same token ids (:func:`require_same_tokenizer`).
    """
    for model, sae, site in (a, b):
        require_fit(model, sae, site)
    codes: tuple[list[SparseCode], list[SparseCode]] = ([], [])
    with progress("encode", max_tokens) as bar:
        for piece in pieces(rows, rows_per_batch, max_tokens):
            for (model, sae, site), into in zip((a, b), codes, strict=True):
                x = read_site(model, piece.tokens, site)
                require_finite(x, piece, site)
                into.append(_compact(encode_in_parts(sae, x[piece.keep.to(x.device)], site)))
            bar.advance(piece.n_kept)
    return CodeMatrix.from_codes(codes[0]), CodeMatrix.from_codes(codes[1])


def require_same_tokenizer(a: HasTokenizerHash, b: HasTokenizerHash) -> None:
    """Raise :class:`StoreError` unless rows of text made for two models hold the same token ids."""
    if a.tokenizer_hash != b.tokenizer_hash:
        raise StoreError(
            f"the two models have different tokenizers ({a.tokenizer_hash} and {b.tokenizer_hash}), so their "
            "activations are not on the same tokens; compare SAEs of models that share one"
        )


def _compact(code: SparseCode) -> SparseCode:
    """The same code in memory of its own size."""
    code = code.positive()
    return SparseCode(code.indices.to(torch.int32).cpu(), code.values.cpu(), code.offsets.cpu(), code.d_sae)
