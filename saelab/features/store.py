"""The feature store: the code matrix of a text by token and by feature, its tokens, and a summary of each feature.

Layout (every array a plain ``.npy``, memory-mapped):

* ``tokens/ids``, ``keep``, ``row_offsets``: the text as one line of token ids; row r of the text is
  ``row_offsets[r] .. row_offsets[r + 1]``. Tokens that were not encoded (BOS and other special tokens) are there so
  that contexts read naturally; ``keep`` is False at them and they have no entries.
* ``by_token/indptr``, ``indices``, ``values``: entries of each token (CSR), features rising.
* ``by_feature/indptr``, ``tokens``, ``values``: entries of each feature, tokens rising.
* ``top/indptr``, ``entries``: numbers (in ``by_feature``) of the strongest entries of each feature, strongest first;
  ``top/rows_indptr``, ``rows_entries``: the same with at most one for each row of text.
* ``summary/*``: one column per file, one row per feature.
* ``vocabulary/offsets``, ``bytes``: the bytes of each token id.
"""

import mmap
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32, Int64

from saelab.core.artifacts import file_checksum, read_manifest
from saelab.core.errors import ConfigError, CorruptError, StoreError, nearest
from saelab.core.result import Result
from saelab.features import layout
from saelab.features.arrays import map_npy
from saelab.features.layout import SUMMARY
from saelab.features.vocabulary import Vocabulary

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

    from saelab.core.code import SparseCode
    from saelab.core.counts import HistogramResult
    from saelab.features.query import Context, Interval

KIND = "feature-store"


def open_features(path: str | Path) -> "FeatureStore":
    """Open a feature store; nothing but its manifest is read until it is asked for.

    Raises :class:`MissingFileError`, :class:`FormatError` (another kind of folder, or an interrupted build), and
    :class:`CorruptError` naming a file that is missing or truncated. :meth:`FeatureStore.verify` reads everything.
    """
    path = Path(path)
    manifest = read_manifest(path, KIND)
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise CorruptError(f"{path / 'manifest.json'} lists no files; build the feature store again")
    for name, about in files.items():
        size = (path / name).stat().st_size if (path / name).is_file() else None
        if size != about["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes instead of {about['bytes']}"
            raise CorruptError(f"{path / name} {found}; build the feature store again")
    store = FeatureStore(path, manifest)
    _last.append(weakref.ref(store))
    del _last[:-1]
    return store


_last: "list[weakref.ref[FeatureStore]]" = []


def opened_last() -> "FeatureStore | None":
    """Return the store that this process has opened last, if it is still in use: what a notebook talks about."""
    return _last[-1]() if _last else None


class FeatureStore(Result):
    """Read-only view of a feature store; made by :func:`open_features` or ``build_features``.

    Arrays are mapped on first use, so opening is cheap and memory is the kernel's page cache.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        """Model, site, text, SAE, counts, and checksums of all files."""
        self.n_features = int(manifest["n_features"])
        """Features of the SAE."""
        self.n_tokens = int(manifest["n_tokens"])
        """Tokens in the table, excluded ones too."""
        self.n_kept = int(manifest["n_kept"])
        """Tokens that were encoded; densities refer to these."""
        self.n_rows = int(manifest["n_rows"])
        """Rows of text."""
        self.timings: dict[str, float] = {}
        """Seconds and tokens per second of the build, when this store has just been built."""
        self.texts: dict[int, str] = {}
        """An explanation of each feature that has one (see :mod:`saelab.features.explanations`)."""
        self.attached: dict[str, np.ndarray] = {}
        """Columns that are not files of the store: scores of the explanations, nan where there is none."""
        self.attached_stamp: object = None
        """Which state of the explanations is attached."""
        self._arrays: dict[str, np.ndarray] = {}
        self._vocabulary: Vocabulary | None = None

    def __repr__(self) -> str:
        return (
            f"FeatureStore({str(self.path)!r}: {self.n_features:,} features of {self.manifest['model']} at "
            f"{self.manifest['site']} on {self.n_tokens:,} tokens of {self.manifest['source']})"
        )

    def to_frame(self) -> "pd.DataFrame":
        """One row per feature: :meth:`summary`."""
        return self.summary()

    def figures(self) -> "dict[str, tuple[Figure, pd.DataFrame]]":
        """``density``: on what share of the tokens features fire."""
        from saelab.features.figures import density_histogram

        return {"density": density_histogram(np.asarray(self.column("density")))}

    def array(self, name: str) -> np.ndarray:
        """One of the store's arrays by its path, such as ``by_token/values.npy``, memory-mapped."""
        if name not in self._arrays:
            self._arrays[name] = map_npy(self.path / name)
        return self._arrays[name]

    def release(self) -> None:
        """Give the parts of the store that were read back to the kernel; they are mapped again when asked for.

        A server that has shown thousands of features would otherwise count the whole store as its memory.
        """
        for array in list(self._arrays.values()):
            if isinstance(array.base, np.memmap) and hasattr(mmap, "MADV_DONTNEED"):
                array.base._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]  # numpy has no public name

    def verify(self) -> None:
        """Read every file; :class:`CorruptError` names the first whose checksum is not the one of the build."""
        for name, about in self.manifest["files"].items():
            if file_checksum(self.path / name) != about["crc32"]:
                raise CorruptError(f"{self.path / name} does not hold what was written; build the feature store again")

    # the text ---------------------------------------------------------------------------------------------------

    @property
    def vocabulary(self) -> Vocabulary:
        """The bytes of each token id."""
        if self._vocabulary is None:
            self._vocabulary = Vocabulary(self.path)
        return self._vocabulary

    def token_ids(self, start: int, stop: int) -> np.ndarray:
        """Ids of the tokens ``start .. stop - 1``."""
        return self.array(layout.IDS)[start:stop]

    def tokens(self, start: int, stop: int) -> list[str]:
        r"""Texts of the tokens ``start .. stop - 1``; parts of characters as ``\xe2``."""
        return self.vocabulary.strings(self.token_ids(start, stop))

    def row_of(self, token: int) -> tuple[int, int, int]:
        """Return the row of text that a token is in, and where that row starts and stops."""
        if not 0 <= token < self.n_tokens:
            raise StoreError(f"token {token} does not exist; {self.path} holds tokens 0 to {self.n_tokens - 1}")
        row, start, stop = self.rows_of(np.array([token]))
        return int(row[0]), int(start[0]), int(stop[0])

    def rows_of(
        self, tokens: Int64[np.ndarray, " n"]
    ) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """Return the rows of text that tokens are in, and where those rows start and stop."""
        offsets = self.array(layout.ROW_OFFSETS)
        rows = np.searchsorted(offsets, tokens, side="right") - 1
        return rows, offsets[rows], offsets[rows + 1]

    # the code matrix --------------------------------------------------------------------------------------------

    def feature(self, i: int) -> tuple[np.ndarray, Float32[np.ndarray, " n"]]:
        """Return the tokens on which feature i fires, rising, and its values: slices of memory maps."""
        start, stop = self._entries(i)
        return self.array(layout.F_TOKENS)[start:stop], self.array(layout.F_VALUES)[start:stop]

    def strongest(self, i: int, distinct_rows: bool) -> Int64[np.ndarray, " n"]:
        """Positions, within ``feature(i)``, of its listed strongest entries, strongest first."""
        names = (layout.TOP_INDPTR, layout.TOP_ENTRIES)
        if distinct_rows:
            names = (layout.TOP_ROWS_INDPTR, layout.TOP_ROWS_ENTRIES)
        first, _ = self._entries(i)
        start, stop = self.array(names[0])[i : i + 2]
        listed: np.ndarray = self.array(names[1])[start:stop].astype(np.int64) - first
        return listed

    def _entries(self, i: int) -> tuple[int, int]:
        if not 0 <= i < self.n_features:
            raise StoreError(f"feature {i} does not exist; {self.path} holds features 0 to {self.n_features - 1}")
        start, stop = self.array(layout.F_INDPTR)[i : i + 2]
        return int(start), int(stop)

    def activations(self, start: int, stop: int) -> "SparseCode":
        """Return the code of the tokens ``start .. stop - 1`` (excluded ones have no entries)."""
        import torch

        from saelab.core.code import SparseCode

        if not 0 <= start <= stop <= self.n_tokens:
            raise StoreError(f"tokens {start} to {stop} do not exist; {self.path} holds {self.n_tokens}")
        offsets = np.array(self.array(layout.INDPTR)[start : stop + 1])
        span = slice(int(offsets[0]), int(offsets[-1]))
        return SparseCode(
            torch.from_numpy(self.array(layout.INDICES)[span].astype(np.int64)),
            torch.from_numpy(np.array(self.array(layout.VALUES)[span])),
            torch.from_numpy(offsets - offsets[0]),
            self.n_features,
        )

    # the summary ------------------------------------------------------------------------------------------------

    @property
    def columns(self) -> list[str]:
        """Names of the summary columns, attached ones last."""
        return [*self.manifest["columns"], *self.attached]

    def column(self, name: str) -> np.ndarray:
        """One summary column, memory-mapped: (n_features,), or (n_features, 10) for the logit columns."""
        if name not in self.columns:
            raise ConfigError(
                f"unknown column '{name}'{nearest(name, self.columns)} (known: {', '.join(self.columns)})"
            )
        return self.attached[name] if name in self.attached else self.array(f"{SUMMARY}/{name}.npy")

    def attach(self, columns: Mapping[str, np.ndarray], texts: Mapping[int, str], stamp: object) -> None:
        """Replace the attached columns and texts; a column of the store itself keeps its name and wins."""
        own = self.manifest["columns"]
        self.attached = {name: column for name, column in columns.items() if name not in own}
        self.texts, self.attached_stamp = dict(texts), stamp

    def summary(self, columns: list[str] | None = None) -> "pd.DataFrame":
        """One row per feature, indexed by feature; ``columns`` defaults to all one-dimensional ones.

        ``top_token_text`` is added beside ``top_token``, and the logit columns become texts when they are asked for.
        """
        import pandas as pd

        names = columns if columns is not None else [name for name in self.columns if self.column(name).ndim == 1]
        frame = pd.DataFrame(index=pd.RangeIndex(self.n_features, name="feature"))
        for name in names:
            values = self.column(name)
            if values.ndim == 1:
                frame[name] = np.array(values)
            elif name.endswith("_ids"):
                frame[name.removesuffix("_ids") + "_tokens"] = [self.vocabulary.strings(row) for row in values]
            else:
                frame[name] = list(np.array(values))
            if name == "top_token":
                known = {i: self.vocabulary.strings([i])[0] for i in np.unique(values).tolist() if i >= 0}
                frame["top_token_text"] = [known.get(i, "") for i in values.tolist()]
        return frame

    # questions, answered in saelab.features.query ---------------------------------------------------------------

    def top_contexts(
        self, i: int, n: int = 20, before: int = 20, after: int = 10, distinct_rows: bool = True
    ) -> "list[Context]":
        """Contexts of the n strongest activations of feature i; see :func:`saelab.features.query.top_contexts`."""
        from saelab.features.query import top_contexts

        return top_contexts(self, i, n, before=before, after=after, distinct_rows=distinct_rows)

    def interval_samples(
        self, i: int, n_intervals: int = 10, per_interval: int = 5, seed: int = 0, **options: Any
    ) -> "list[Interval]":
        """Contexts over the whole range of feature i; see :func:`saelab.features.query.interval_samples`."""
        from saelab.features.query import interval_samples

        return interval_samples(self, i, n_intervals, per_interval, seed=seed, **options)

    def histogram(self, i: int, bins: int = 50, log: bool = False) -> "HistogramResult":
        """Histogram of the active values of feature i; see :func:`saelab.features.query.histogram`."""
        from saelab.features.query import histogram

        return histogram(self, i, bins, log=log)

    def co_active(self, i: int, n: int = 20, max_tokens: int = 20_000) -> "pd.DataFrame":
        """Features that fire together with feature i; see :func:`saelab.features.query.co_active`."""
        from saelab.features.query import co_active

        return co_active(self, i, n, max_tokens=max_tokens)
