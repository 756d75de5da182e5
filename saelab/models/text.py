"""Sources of text: anything that gives documents, restartable and fingerprinted.

``open_text`` turns what a user names (a file, a folder, a Hugging Face dataset, the standard library, a list) into a
:class:`TextSource`. Iterating over a source starts afresh every time and gives the same documents in the same order.
"""

import hashlib
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from saelab.core.errors import MissingFileError, TextError, nearest
from saelab.core.named import opened
from saelab.models.stdlib_corpus import stdlib_files, stdlib_folder

DOCUMENT_BYTES = 8 << 20
"""A plain text file larger than this is given as several documents, cut at line ends, so that memory stays bounded."""

TextSpec = str | Path | Iterable[str] | Callable[[], Iterator[str]]

_WHOLE_BYTES = 4 << 20
_SAMPLES = 64
_SAMPLE_BYTES = 1 << 16
_PROBE_DOCUMENTS = 64


class TextSource(ABC):
    """Documents as strings. ``name`` says where they come from; iteration is restartable; empty documents are left out.

    Raises :class:`TextError` when a complete iteration finds no document.
    """

    name: str

    def __init__(self, name: str) -> None:
        self.name = name

    def __iter__(self) -> Iterator[str]:
        """Yield the documents from the first one on; raise :class:`TextError` if there are none."""
        empty = True
        for document in self._documents():
            if document:
                empty = False
                yield document
        if empty:
            raise TextError(f"{self.name} holds no text; give a source with at least one non-empty document")

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the content as 16 hex digits: equal for equal content wherever it lies, and cheap to get.

        Files up to 4 MiB are read whole, larger ones at 64 evenly spaced places; iterables and datasets count by their
        first 64 documents.
        """
        digest = hashlib.blake2b(digest_size=8)
        for piece in self._identity():
            digest.update(len(piece).to_bytes(8, "big") + piece)
        return digest.hexdigest()

    @abstractmethod
    def _documents(self) -> Iterator[str]:
        """Yield the documents from the first one on."""

    def _identity(self) -> Iterator[bytes]:
        for document in islice(self._documents(), _PROBE_DOCUMENTS):
            yield document.encode("utf-8", "surrogatepass")


class FileSource(TextSource):
    """Files, one after the other: plain text as one document each, ``.jsonl`` and ``.parquet`` one document per row."""

    def __init__(self, name: str, files: list[tuple[str, Path]], column: str = "text") -> None:
        super().__init__(name)
        self.files = files
        self.column = column
        self._said = False

    def _documents(self) -> Iterator[str]:
        for _, path in self.files:
            try:
                if path.suffix in (".jsonl", ".ndjson"):
                    yield from _json_lines(path, self.column)
                elif path.suffix == ".parquet":
                    yield from _parquet_rows(path, self.column)
                else:
                    yield from self._plain(path)
            except OSError as error:
                raise TextError(f"cannot read {path}: {error.strerror or error}") from None

    def _plain(self, path: Path) -> Iterator[str]:
        with open(path, "rb") as file:
            while piece := file.read(DOCUMENT_BYTES):
                # Up to the end of the line, so that no character and no word is cut in two.
                data = piece + (file.readline() if len(piece) == DOCUMENT_BYTES else b"")
                try:
                    yield data.decode("utf-8-sig")
                except UnicodeDecodeError as error:
                    if not self._said:
                        self._said = True
                        warnings.warn(
                            f"{path} is not valid UTF-8 (byte 0x{data[error.start]:02x} at {error.start}); "
                            "such bytes are replaced by U+FFFD, in this file and in others of the source",
                            stacklevel=2,
                        )
                    yield data.decode("utf-8-sig", errors="replace")

    def _identity(self) -> Iterator[bytes]:
        yield self.column.encode()
        for relative, path in self.files:
            yield relative.encode("utf-8", "surrogateescape")
            yield from _sampled(path)


class IterableSource(TextSource):
    """Strings from Python: a list, or a function without arguments that returns a fresh iterator."""

    def __init__(self, name: str, start: Callable[[], Iterator[str]]) -> None:
        super().__init__(name)
        self._start = start

    def _documents(self) -> Iterator[str]:
        for number, document in enumerate(self._start()):
            if not isinstance(document, str):
                raise TextError(
                    f"document {number} of {self.name} is a {type(document).__name__}, expected str; "
                    "give an iterable of strings"
                )
            yield document


class DatasetSource(TextSource):
    """A Hugging Face dataset, streamed: ``hf:owner/name``, ``hf:owner/name:split``, ``hf:owner/name@config:split``.

    A folder of data files on this machine works in place of ``owner/name``. The split is ``train`` unless given.
    """

    def __init__(self, spec: str, column: str = "text") -> None:
        super().__init__(spec)
        place, _, split = spec.removeprefix("hf:").partition(":")
        self.dataset, _, config = place.partition("@")
        self.config = config or None
        self.split = split or "train"
        self.column = column
        if not self.dataset:
            raise TextError(f"'{spec}' names no dataset; write hf:owner/name or hf:owner/name:split")

    def _open(self) -> Any:
        from datasets import load_dataset

        try:
            return load_dataset(self.dataset, self.config, split=self.split, streaming=True)
        except Exception as error:  # the library raises many kinds, none of which the user can act on by type
            raise TextError(
                f"cannot open dataset {self.dataset} (split {self.split}): {_first_line(error)}; "
                "check the name, the split and the network, or give a local file"
            ) from error

    def _documents(self) -> Iterator[str]:
        for row in self._open():
            if self.column not in row:
                raise _no_column(self.name, self.column, row)
            value = row[self.column]
            if value is not None:
                yield _checked(value, self.name, self.column)

    def _identity(self) -> Iterator[bytes]:
        yield f"{self.config}:{self.split}:{self.column}".encode()
        yield from super()._identity()


def open_text(spec: TextSpec | TextSource, column: str = "text") -> TextSource:
    """Open what ``spec`` names as a source of documents.

    Args:
        spec: ``"stdlib:train"`` or ``"stdlib:heldout"`` (the running Python's own library); a text file; a ``.jsonl``
            or ``.parquet`` file; a folder (all its readable text, ``.jsonl`` and ``.parquet`` files, in sorted order,
            without hidden and binary ones); ``"hf:owner/name[:split]"``; an iterable of strings that can be iterated
            again; a function that returns an iterator of strings; or a source, which is returned as it is.
        column: the text column of ``.jsonl``, ``.parquet`` and datasets.

    Raises:
        MissingFileError: the path does not exist.
        TextError: no such split, an empty folder, a one-shot iterator.

    """
    thing = opened(spec)
    if isinstance(thing, TextSource):
        return thing
    assert not isinstance(spec, TextSource)
    if isinstance(spec, str | Path):
        return _open_named(str(spec), column)
    if callable(spec):
        return IterableSource(f"python:{getattr(spec, '__qualname__', type(spec).__name__)}", spec)
    if isinstance(spec, Iterator):
        raise TextError(
            f"a {type(spec).__name__} can be read only once and saelab reads text several times; "
            "give a list, or a function that returns a fresh iterator"
        )
    if not isinstance(spec, Iterable):
        raise TextError(f"a {type(spec).__name__} is no text source; give a path, hf:owner/name or a list of strings")
    return IterableSource(f"python:{type(spec).__name__}", spec.__iter__)


def _open_named(spec: str, column: str) -> TextSource:
    if spec.startswith("stdlib:"):
        root = stdlib_folder()
        files = stdlib_files(spec.removeprefix("stdlib:"), root)
        return FileSource(spec, list(files), column)
    if spec.startswith("hf:"):
        return DatasetSource(spec, column)
    path = Path(spec)
    if not path.exists():
        near = nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
        hint = near or "; give a path, stdlib:train, stdlib:heldout or hf:owner/name"
        raise MissingFileError(f"text source not found: {spec}{hint}")
    if path.is_dir():
        return FileSource(spec, _text_files(path), column)
    return FileSource(spec, [(path.name, path)], column)


def _text_files(folder: Path) -> list[tuple[str, Path]]:
    """All files that look like text, by path; hidden ones, ones with a NUL byte and unreadable ones are left out."""
    found = []
    for path in folder.rglob("*"):
        relative = path.relative_to(folder)
        if any(part.startswith(".") for part in relative.parts) or not path.is_file():
            continue
        if path.suffix == ".parquet" or _looks_like_text(path):
            found.append((relative.as_posix(), path))
    if not found:
        raise TextError(f"{folder} holds no readable text file; give a folder with text, .jsonl or .parquet files")
    return sorted(found)


def _looks_like_text(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return b"\0" not in file.read(8192)
    except OSError:
        return False


def _json_lines(path: Path, column: str) -> Iterator[str]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise TextError(
                    f"{path} line {number} is not valid JSON ({error}); expected one object a line"
                ) from None
            if not isinstance(row, dict):
                raise TextError(
                    f"{path} line {number} is a JSON {type(row).__name__}, expected an object with '{column}'"
                )
            if column not in row:
                raise _no_column(f"{path} line {number}", column, row)
            if row[column] is not None:
                yield _checked(row[column], f"{path} line {number}", column)


def _parquet_rows(path: Path, column: str) -> Iterator[str]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise _no_column(str(path), column, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                for value in batch.column(0).to_pylist():
                    if value is not None:
                        yield _checked(value, str(path), column)
    except pyarrow.ArrowException as error:
        raise TextError(
            f"{path} is not a readable parquet file ({_first_line(error)}); copy or make it again"
        ) from None


def _checked(value: Any, where: str, column: str) -> str:
    if not isinstance(value, str):
        raise TextError(
            f"column '{column}' of {where} holds a {type(value).__name__}, expected text; choose another column"
        )
    return value


def _no_column(where: str, column: str, columns: Iterable[str]) -> TextError:
    names = list(columns)
    return TextError(f"{where} has no column '{column}'{nearest(column, names)} (columns there: {', '.join(names)})")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _sampled(path: Path) -> Iterator[bytes]:
    """The whole file when it is small; else its size and 64 evenly spaced pieces."""
    size = path.stat().st_size
    yield size.to_bytes(8, "big")
    with open(path, "rb") as file:
        if size <= _WHOLE_BYTES:
            yield file.read()
            return
        for number in range(_SAMPLES):
            file.seek(number * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
            yield file.read(_SAMPLE_BYTES)
