"""Plain ``.npy`` files: written piece by piece without knowing their length, read as memory maps."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from saelab.core.artifacts import output_error
from saelab.core.errors import CorruptError, MissingFileError

HEADER = 128
"""Bytes kept free for the header, enough for any one-dimensional array."""


class NpyWriter:
    """Append one-dimensional pieces to a ``.npy`` file; its header is written by :meth:`close`."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.path = path
        self.dtype = dtype
        self.length = 0
        self._file: IO[bytes] | None = None

    def append(self, values: np.ndarray) -> None:
        """Write the next values, cast to the dtype of the file."""
        data = np.ascontiguousarray(values, self.dtype)
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(self.path, "wb")  # noqa: SIM115 (held open over many appends)
                self._file.write(bytes(HEADER))
            self._file.write(data.data.cast("B") if data.size else b"")
        except OSError as error:
            raise output_error(self.path, error) from error
        self.length += data.size

    def close(self) -> None:
        """Write the header and close the file."""
        self.append(np.empty(0, self.dtype))
        assert self._file is not None
        description = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False}
        text = repr(description | {"shape": (self.length,)}).encode("latin1")
        header = b"\x93NUMPY\x01\x00" + (HEADER - 10).to_bytes(2, "little") + text.ljust(HEADER - 11) + b"\n"
        assert len(header) == HEADER
        try:
            self._file.seek(0)
            self._file.write(header)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            raise output_error(self.path, error) from error

    def abandon(self) -> None:
        """Close the file without a header: it is no array."""
        if self._file is not None:
            self._file.close()


@contextmanager
def npy_writers(folder: Path, dtypes: Mapping[str, Any]) -> Iterator[dict[str, NpyWriter]]:
    """Open several files below ``folder``; they become arrays when the block ends without error."""
    files = {name: NpyWriter(folder / name, np.dtype(dtype)) for name, dtype in dtypes.items()}
    try:
        yield files
        for file in files.values():
            file.close()
    finally:
        for file in files.values():
            file.abandon()


def write_npy(path: Path, array: np.ndarray) -> None:
    """Write a whole array."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, array, allow_pickle=False)
    except OSError as error:
        raise output_error(path, error) from error


def map_npy(path: Path) -> np.ndarray:
    """Memory-map an array, read-only. Raises :class:`MissingFileError`, :class:`CorruptError`."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise MissingFileError(f"{path} does not exist; build the feature store again") from None
    except (ValueError, OSError, EOFError) as error:
        raise CorruptError(f"{path} is not a readable array ({error}); build the feature store again") from None
    # A plain view of the map: slicing an np.memmap costs microseconds each time, and a context takes dozens of slices.
    return np.asarray(array)
