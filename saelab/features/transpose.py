"""Second pass of a build: the code matrix by token -> by feature, out of core, with the summary of each feature.

1. Features are cut into ranges ("buckets") of consecutive features whose entries fit in the memory allowed; the
   counts of the first pass say where. A feature with more entries than that is a bucket of its own.
2. The matrix by token is read once, in order, and its entries are appended to one scratch file per bucket.
3. Bucket after bucket is read back, brought into (feature, token) order, appended to the final files, and summarised.
   A bucket of a single large feature is in token order already and is copied and summarised in pieces.

So every file is read and written front to back. Memory: ``BYTES_PER_ENTRY`` for each entry of the largest bucket or
piece, at most ``memory_bytes``, beside 5 MiB and about 200 bytes for each feature. Disk, for a while: 16 to 20 bytes
for each entry.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from saelab.core.artifacts import output_error
from saelab.core.progress import progress
from saelab.features.arrays import NpyWriter, map_npy, npy_writers
from saelab.features.encode import Totals
from saelab.features.layout import (
    F_INDPTR,
    F_TOKENS,
    F_VALUES,
    IDS,
    INDICES,
    INDPTR,
    ROW_OFFSETS,
    TOP_ENTRIES,
    TOP_INDPTR,
    TOP_ROWS_ENTRIES,
    TOP_ROWS_INDPTR,
    VALUES,
)
from saelab.features.ragged import Array
from saelab.features.summary import COLUMNS, Part, summarise, summarise_large

BYTES_PER_ENTRY = 100
"""Peak memory for each entry held at once: its record, the sort keys and the temporaries of the summary."""

SCRATCH = ".scratch"


def bucket_bounds(count: Int64[np.ndarray, " d_sae"], capacity: int) -> Int64[np.ndarray, " buckets_plus_1"]:
    """Cut the features into ranges of at most ``capacity`` entries, or of one feature."""
    ends = np.cumsum(count)
    bounds = [0]
    while bounds[-1] < len(count):
        before = ends[bounds[-1]] - count[bounds[-1]]
        end = int(np.searchsorted(ends, before + capacity, side="right"))
        bounds.append(max(end, bounds[-1] + 1))
    return np.array(bounds, np.int64)


class Transposer:
    """One transposition; see the module's text."""

    def __init__(self, folder: Path, totals: Totals, d_vocab: int, memory_bytes: int) -> None:
        self.folder, self.totals, self.d_vocab = folder, totals, d_vocab
        self.capacity = max(1, memory_bytes // BYTES_PER_ENTRY)
        self.bounds = bucket_bounds(totals.count, self.capacity)
        self.offsets = np.concatenate([[0], np.cumsum(totals.count)])
        self.row_offsets = map_npy(folder / ROW_OFFSETS)
        self.columns = {name: np.zeros(len(totals.count), dtype) for name, dtype in COLUMNS.items()}
        token = np.dtype(np.uint32 if totals.n_tokens < 1 << 32 else np.int64)
        self.record = np.dtype([("feature", np.uint32), ("token", token), ("id", np.int32), ("value", np.float32)])
        entry = np.uint32 if totals.nnz < 1 << 32 else np.int64
        self.dtypes = {
            F_INDPTR: np.int64,
            F_TOKENS: token,
            F_VALUES: np.float32,
            TOP_INDPTR: np.int64,
            TOP_ENTRIES: entry,
            TOP_ROWS_INDPTR: np.int64,
            TOP_ROWS_ENTRIES: entry,
        }
        self.files: dict[str, NpyWriter] = {}

    def run(self) -> dict[str, Array]:
        """Write the files by feature and return the summary columns."""
        scratch = self.folder / SCRATCH
        scratch.mkdir(exist_ok=True)
        with (
            npy_writers(self.folder, self.dtypes) as self.files,
            progress("transpose", 2 * self.totals.nnz, unit="entries") as bar,
        ):
            for name in (TOP_INDPTR, TOP_ROWS_INDPTR):
                self.files[name].append(np.zeros(1))
            self._scatter(scratch, bar.advance)
            for bucket in range(len(self.bounds) - 1):
                self._gather(scratch / str(bucket), int(self.bounds[bucket]), int(self.bounds[bucket + 1]))
                bar.advance(int(np.diff(self.offsets[self.bounds[bucket : bucket + 2]])[0]))
            self.files[F_INDPTR].append(self.offsets)
        shutil.rmtree(scratch)
        return self.columns

    def _scatter(self, scratch: Path, advance: Callable[[float], None]) -> None:
        """Append every entry, in token order, to the file of its bucket."""
        bucket_of = np.repeat(np.arange(len(self.bounds) - 1), np.diff(self.bounds))
        bucket_of = bucket_of.astype(np.uint16 if len(self.bounds) < 1 << 16 else np.uint32)
        for records in self._by_token():
            bucket = bucket_of[records["feature"]]
            order = np.argsort(bucket, kind="stable")
            cuts = np.concatenate([[0], np.cumsum(np.bincount(bucket))])
            for number in np.flatnonzero(np.diff(cuts)):
                path = scratch / str(number)
                try:
                    with open(path, "ab") as file:
                        file.write(records[order[cuts[number] : cuts[number + 1]]].tobytes())
                except OSError as error:
                    raise output_error(path, error) from error
            advance(len(records))

    def _by_token(self) -> Iterator[Array]:
        """Yield the entries of the matrix by token as records, at most ``capacity`` (or those of one token) at once."""
        indptr, ids = map_npy(self.folder / INDPTR), map_npy(self.folder / IDS)
        indices, values = map_npy(self.folder / INDICES), map_npy(self.folder / VALUES)
        start = 0
        while start < self.totals.n_tokens:
            ahead = np.array(indptr[start : start + self.capacity + 1])
            stop = start + max(1, int(np.searchsorted(ahead, ahead[0] + self.capacity, side="right")) - 1)
            span = slice(int(ahead[0]), int(ahead[stop - start]))
            tokens = np.repeat(np.arange(start, stop), np.diff(ahead[: stop - start + 1]))
            records = np.empty(len(tokens), self.record)
            records["feature"], records["value"] = indices[span], values[span]
            records["token"], records["id"] = tokens, np.repeat(ids[start:stop], np.diff(ahead[: stop - start + 1]))
            yield records
            start = stop

    def _gather(self, path: Path, low: int, high: int) -> None:
        """Finish the features ``low .. high - 1`` from the scratch file of their bucket."""
        first = int(self.offsets[low])
        if int(self.offsets[high]) - first > self.capacity:
            part = self._large(path, first)
        else:
            part = self._small(path, low, high)
        path.unlink(missing_ok=True)
        for name, column in part.columns.items():
            self.columns[name][low:high] = column
        for (offsets, entries), indptr_file, entries_file in (
            (part.top, TOP_INDPTR, TOP_ENTRIES),
            (part.top_rows, TOP_ROWS_INDPTR, TOP_ROWS_ENTRIES),
        ):
            self.files[indptr_file].append(self.files[entries_file].length + offsets[1:])
            self.files[entries_file].append(first + entries)

    def _small(self, path: Path, low: int, high: int) -> Part:
        records = np.fromfile(path, self.record) if path.exists() else np.empty(0, self.record)
        keys = (records["feature"] - np.uint32(low)).astype(np.uint64) << np.uint64(32)
        keys |= np.arange(len(records), dtype=np.uint64)
        keys.sort()
        keys &= np.uint64(0xFFFFFFFF)
        tokens, values, ids = (records[name][keys] for name in ("token", "value", "id"))
        del records, keys
        self.files[F_TOKENS].append(tokens)
        self.files[F_VALUES].append(values)
        return summarise(self.offsets[low : high + 1] - self.offsets[low], values, self._rows(tokens), ids)

    def _large(self, path: Path, first: int) -> Part:
        def pieces() -> Iterator[tuple[Array, Array, Array, Array]]:
            done = 0
            for records in self._records(path):
                self.files[F_TOKENS].append(records["token"])
                self.files[F_VALUES].append(records["value"])
                entries = np.arange(done, done + len(records))
                yield entries, np.array(records["value"]), self._rows(records["token"]), records["id"]
                done += len(records)

        count = path.stat().st_size // self.record.itemsize
        part, quantiles = summarise_large(pieces(), count, self.d_vocab)
        for records in self._records(path):
            quantiles.second(np.array(records["value"]))
        part.columns |= quantiles.result()
        return part

    def _records(self, path: Path) -> Iterator[Array]:
        with open(path, "rb") as file:
            while len(records := np.fromfile(file, self.record, self.capacity)):
                yield records

    def _rows(self, tokens: Array) -> Array:
        return np.searchsorted(self.row_offsets, tokens, side="right") - 1
