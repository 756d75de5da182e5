"""Folders that saelab writes: atomic, checksummed, and self-describing.

Each artifact folder holds a ``manifest.json`` whose ``kind`` says what it is (``activation-store``, ``sae``,
``feature-store``, ``run`` ...). Files are written under a temporary name, synced and renamed, so that a killed process
leaves either the old file or the new one.
"""

import errno
import json
import math
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from saelab import __version__
from saelab.core.errors import CorruptError, FormatError, MissingFileError, OutputError, OutputExistsError

MANIFEST = "manifest.json"


@contextmanager
def atomic_writer(path: str | Path, size: int = 0) -> Iterator[IO[bytes]]:
    """Open ``path`` for binary writing; it appears, complete and synced, only when the block ends without error.

    ``size`` bytes, if known, are reserved first: a disk that is too full is found before anything is written, and some
    file systems write reserved space many times faster.

    Raises :class:`OutputError` for a full disk or missing permissions.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise output_error(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def output_error(path: Path, error: OSError) -> OutputError:
    """Turn an operating-system error met while writing ``path`` into one line."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"no space left on the disk while writing {path}; free some space or choose another --out")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OutputError(f"cannot write {path}: {error.strerror}; choose a folder you may write to")
    return OutputError(f"cannot write {path}: {error.strerror or error}")


def write_json(path: str | Path, data: Any) -> None:
    """Write JSON atomically (NaN is written as ``null`` so that every reader can parse it)."""
    with atomic_writer(path) as file:
        file.write((json.dumps(_finite(data), indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: str | Path) -> Any:
    """Read JSON; a missing file or broken content is one clear error."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingFileError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorruptError(f"{path} is not valid JSON ({error}); it may be half-written, make it again") from None


def write_safetensors(path: str | Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write torch tensors as safetensors, atomically."""
    from safetensors.torch import save

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = save(contiguous, dict(metadata) if metadata else None)
    with atomic_writer(path, len(data)) as file:
        file.write(data)


def read_safetensors(path: str | Path, device: str = "cpu") -> dict[str, Any]:
    """Read a safetensors file as torch tensors. A pickle or any other format is refused by name, never executed."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist")
    with open(path, "rb") as file:
        head = file.read(9)
    # A safetensors file begins with the length of its JSON header, whose two low bytes may be those of a pickle.
    if head[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") and head[8:] != b"{":
        raise FormatError(
            f"{path} is a pickle, expected safetensors; saelab does not execute pickles, convert it first"
        )
    try:
        return dict(load_file(path, device=device))
    except SafetensorError as error:
        raise CorruptError(f"{path} is not a readable safetensors file ({error}); copy or make it again") from None


def checksum(data: bytes | bytearray | memoryview) -> str:
    """CRC-32 of ``data`` as 8 hex digits: enough to find truncation and flipped bits, at memory speed."""
    return f"{zlib.crc32(data):08x}"


def file_checksum(path: str | Path) -> str:
    """CRC-32 of a file's content, read in pieces of 4 MiB."""
    value = 0
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            value = zlib.crc32(piece, value)
    return f"{value:08x}"


def write_manifest(folder: str | Path, kind: str, data: Mapping[str, Any]) -> None:
    """Write ``folder/manifest.json`` with kind, version and ``data``; written last, it marks a complete folder."""
    write_json(Path(folder) / MANIFEST, {"kind": kind, "saelab_version": __version__, **data})


def read_manifest(folder: str | Path, kind: str | None = None) -> dict[str, Any]:
    """Read a folder's manifest; with ``kind``, refuse a folder of another kind."""
    folder = Path(folder)
    if not folder.exists():
        raise MissingFileError(f"{folder} does not exist{f'; expected a folder of kind {kind}' if kind else ''}")
    if not (folder / MANIFEST).is_file():
        wanted = f"a saelab {kind} folder" if kind else "a saelab folder"
        raise FormatError(
            f"{folder} is not {wanted}: it has no {MANIFEST} (an interrupted command? run it again, with --resume if "
            "it has that)"
        )
    data = read_json(folder / MANIFEST)
    if not isinstance(data, dict) or not isinstance(data.get("kind"), str):
        raise CorruptError(f"{folder / MANIFEST} does not say what kind of folder this is; make the folder again")
    if kind is not None and data["kind"] != kind:
        raise FormatError(f"{folder} is a saelab {data['kind']} folder, expected {kind}")
    return cast(dict[str, Any], data)


def check_output(folder: str | Path, *, force: bool = False) -> None:
    """Refuse an output folder that :func:`prepare_output` would refuse, and change nothing.

    For commands that write at the end only: a mistake in their inputs then costs no old result and leaves no folder.
    Raises :class:`OutputExistsError`, :class:`OutputError`.
    """
    folder = Path(folder)
    try:
        existing = _nearest_existing(folder)
        if not existing.is_dir():
            raise OutputExistsError(f"{existing} is a file, expected a folder; choose another --out")
        if folder.is_dir() and any(folder.iterdir()):
            if not force:
                raise OutputExistsError(f"{folder} already exists and is not empty; add --force to replace it")
            if not any((folder / name).exists() for name in (MANIFEST, "progress.json", "config.yaml")):
                raise OutputExistsError(
                    f"{folder} was not made by saelab; --force will not delete it, remove it yourself"
                )
        if not os.access(existing, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise output_error(folder, error) from error


def prepare_output(folder: str | Path, *, force: bool = False, resume: bool = False) -> Path:
    """Create an output folder, or say why not.

    A folder with content is refused unless ``force`` (its content is deleted, provided saelab made it) or ``resume``
    (it is kept). Raises :class:`OutputExistsError`, :class:`OutputError`.
    """
    folder = Path(folder)
    keep = resume and folder.is_dir()
    if not keep:
        check_output(folder, force=force)
    try:
        if not keep and folder.is_dir() and any(folder.iterdir()):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise output_error(folder, error) from error
    return folder


def require_disk(folder: str | Path, needed: int, what: str) -> int:
    """Return the free bytes where ``folder`` will be; refuse when ``needed`` (plus 1 %) would not fit."""
    free = shutil.disk_usage(_nearest_existing(folder)).free
    if needed * 1.01 > free:
        raise OutputError(
            f"{what} needs {human_bytes(needed)} but only {human_bytes(free)} are free at {folder}; "
            "take fewer tokens or sites, a 16-bit dtype, or another --out"
        )
    return free


def _nearest_existing(path: str | Path) -> Path:
    """The path itself, or the first folder above it that exists."""
    path = Path(path)
    return path if path.exists() else next(above for above in path.absolute().parents if above.exists())


def human_bytes(n: float) -> str:
    """``1536 -> '1.5 KiB'``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    if isinstance(data, Path):
        return str(data)
    return data


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
