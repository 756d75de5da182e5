"""``build_features``: model x SAE x text -> feature store.

Two passes: the text is encoded once and written by token (:mod:`saelab.features.encode`), then transposed out of core
(:mod:`saelab.features.transpose`). Values are kept as the SAE gave them, float32, bit for bit. The folder depends on
model, SAE and text alone: not on ``memory_bytes``, not on the time.

Peak memory, whatever the length of the text: the model's forward pass on one batch, one part of the encoder's dense
output (128 MiB), ``memory_bytes`` for the transposition, and about 200 bytes for each feature beside the SAE's weights.
"""

import time
import zlib
from pathlib import Path

import numpy as np

from saelab.core.artifacts import (
    MANIFEST,
    file_checksum,
    human_bytes,
    prepare_output,
    require_disk,
    write_json,
    write_manifest,
)
from saelab.core.errors import ConfigError
from saelab.features.arrays import write_npy
from saelab.features.encode import Totals, encode_text
from saelab.features.layout import SUMMARY
from saelab.features.protocols import Dictionary, Model, Rows
from saelab.features.ragged import Array
from saelab.features.rows import describe_rows, dictionary_name, require_fit, source_fingerprint, source_name
from saelab.features.store import KIND, FeatureStore, open_features
from saelab.features.transpose import Transposer
from saelab.features.vocabulary import token_bytes, write_vocabulary
from saelab.features.weights import weight_columns

PROGRESS = "progress.json"
"""Marks a folder whose build has not ended; ``force`` may delete it."""
LEAST_MEMORY = 1 << 12


def build_features(
    model: Model,
    sae: Dictionary,
    rows: Rows,
    site: str,
    out: str | Path,
    *,
    max_tokens: int | None = None,
    rows_per_batch: int = 16,
    force: bool = False,
    memory_bytes: int = 512 << 20,
    nearest: bool | None = None,
    target_site: str | None = None,
) -> FeatureStore:
    """Encode a text with an SAE and write the feature store ``out``.

    ``max_tokens`` takes the fewest first rows that hold that many kept tokens. ``memory_bytes`` bounds the
    transposition. ``nearest`` says whether to look for each feature's nearest neighbour (by default up to 32,768
    features). ``target_site`` is where a transcoder's features write to, if not ``site``. The store that is returned
    has ``timings`` (seconds and tokens per second), which are not in the folder.

    An interrupted build leaves no manifest, so that it cannot be taken for a store; build again with ``force``.

    Raises :class:`OutputExistsError`, :class:`OutputError` (full disk), :class:`ActivationError` (width, NaN),
    :class:`TextError` (no tokens).
    """
    require_fit(model, sae, site)
    if memory_bytes < LEAST_MEMORY:
        raise ConfigError(f"memory_bytes is {memory_bytes}, expected at least {LEAST_MEMORY}; some MiB are sensible")
    folder = prepare_output(out, force=force)
    write_json(folder / PROGRESS, {"kind": KIND, "state": "building"})
    started = time.perf_counter()
    totals = encode_text(model, sae, rows, site, folder, max_tokens=max_tokens, rows_per_batch=rows_per_batch)
    encoded = time.perf_counter()
    require_disk(folder, 28 * totals.nnz, f"the matrix by feature ({human_bytes(8 * totals.nnz)}, and scratch)")
    columns = Transposer(folder, totals, model.d_vocab, memory_bytes).run()
    transposed = time.perf_counter()
    columns = _count_columns(totals) | columns | weight_columns(model, sae, target_site or site, nearest)
    for name, column in columns.items():
        write_npy(folder / SUMMARY / f"{name}.npy", column)
    write_vocabulary(folder, token_bytes(model))
    write_manifest(
        folder,
        KIND,
        {
            "model": model.name,
            "model_fingerprint": model.fingerprint,
            "site": site,
            "source": source_name(rows),
            "source_fingerprint": source_fingerprint(rows),
            "rows": describe_rows(rows),
            "sae": dictionary_name(sae),
            "sae_fingerprint": dictionary_fingerprint(sae),
            "d_in": sae.d_in,
            "n_features": sae.d_sae,
            "n_tokens": totals.n_tokens,
            "n_kept": totals.n_kept,
            "n_rows": totals.n_rows,
            "nnz": totals.nnz,
            "l0": totals.nnz / totals.n_kept,
            "dead_fraction": float((totals.count == 0).mean()),
            "columns": list(columns),
            "files": _files(folder),
        },
    )
    (folder / PROGRESS).unlink()
    ended = time.perf_counter()
    store = open_features(folder)
    store.timings = {
        "encode_seconds": encoded - started,
        "transpose_seconds": transposed - encoded,
        "summary_seconds": ended - transposed,
        "seconds": ended - started,
        "tokens_per_second": totals.n_kept / (ended - started),
    }
    return store


def dictionary_fingerprint(sae: Dictionary) -> str:
    """CRC-32 over the weights of a dictionary."""
    value = 0
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        weight = getattr(sae, name, None)
        if weight is not None:
            value = zlib.crc32(np.ascontiguousarray(weight.detach().float().cpu().numpy()).data, value)
    return f"{value:08x}"


def _count_columns(totals: Totals) -> dict[str, Array]:
    count = totals.count
    mean = np.divide(totals.total, count, out=np.zeros(len(count)), where=count > 0)
    return {
        "count": count,
        "density": count / totals.n_kept,
        "dead": count == 0,
        "max": totals.maximum,
        "mean": mean.astype(np.float32),
    }


def _files(folder: Path) -> dict[str, dict[str, int | str]]:
    """Size and checksum of every file of the store."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (MANIFEST, PROGRESS))
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "crc32": file_checksum(path)}
        for path in paths
    }
