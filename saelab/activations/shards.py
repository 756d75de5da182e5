"""One shard: a safetensors file of equally long tensors, with a CRC-32 for its header and for each tensor.

The checksums cover every byte of the file but are kept one per tensor, so that reading one site of many verifies that
site alone. A tensor is verified when it is first touched; it is then read through a memory map.
"""

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from saelab.core.artifacts import atomic_writer
from saelab.core.errors import CorruptError

HEADER = "header"
"""Key under which the checksum of the file's header is kept."""
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class ShardInfo:
    """What the manifest says about one shard."""

    file: str
    """File name within the store's folder."""
    rows: int
    """Number of rows of every tensor."""
    bytes: int
    """Size of the file."""
    checksums: dict[str, str]
    """CRC-32 (8 hex digits) of the header and of each tensor's bytes."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "ShardInfo":
        """Inverse of :meth:`to_dict`."""
        return ShardInfo(str(data["file"]), int(data["rows"]), int(data["bytes"]), dict(data["checksums"]))


def write_shard(folder: Path, file: str, tensors: Mapping[str, Shaped[Tensor, "rows ..."]]) -> ShardInfo:
    """Write one shard atomically and durably; return its entry for the manifest. Raises ``OutputError``.

    The tensors are written from where they are, without a serialised copy in memory, the widest dtype first so that
    each is aligned when the file is mapped.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    raw = {name: tensors[name].contiguous().view(-1).view(torch.uint8).numpy() for name in names}
    header: dict[str, Any] = {}
    offset = 0
    for name in names:
        end = offset + raw[name].nbytes
        header[name] = {
            "dtype": _NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    with atomic_writer(folder / file, len(head) + offset) as out:
        out.write(head)
        for name in names:
            out.write(raw[name].data)
    _leave_cache(folder / file)
    sums = {HEADER: _crc(head)} | {name: _crc(raw[name]) for name in sorted(names)}
    return ShardInfo(file, next(iter(tensors.values())).shape[0], len(head) + offset, sums)


def _leave_cache(path: Path) -> None:
    """Let the system forget the pages of a file that is safe on disk.

    A store is usually larger than memory, and each shard is read once per epoch: kept pages push out others that are
    of use, and every shard is written into fresh ones, which costs more than writing into those of the shard before.
    """
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class ShardReader:
    """Memory-mapped, verified reading of one shard."""

    def __init__(self, folder: Path, info: ShardInfo) -> None:
        self.info = info
        self._path = folder / info.file
        self._tensors: dict[str, Tensor] = {}

    def tensor(self, name: str) -> Shaped[Tensor, "rows ..."]:
        """Return a tensor as a read-only map of the file, verified when first asked for (:class:`CorruptError`)."""
        if name not in self._tensors:
            data, start, layout = self._open()
            self._tensors[name] = self._verified(data, start, layout, name)
        return self._tensors[name]

    def problem(self) -> str | None:
        """Check every byte; return what is wrong, or None."""
        try:
            data, start, layout = self._open()
            for name in self.info.checksums:
                if name != HEADER:
                    self._verified(data, start, layout, name)
        except CorruptError as error:
            return str(error)
        return None

    def _open(self) -> tuple[Tensor, int, dict[str, Any]]:
        size = self._path.stat().st_size if self._path.is_file() else None
        if size is None:
            raise CorruptError(f"shard {self._path} is missing; harvest again, or copy the whole folder")
        if size != self.info.bytes:
            raise CorruptError(
                f"shard {self._path} has {size} bytes, expected {self.info.bytes} (truncated or overwritten); "
                "harvest again or copy it again"
            )
        # torch maps the file and closes it: a store of thousands of shards needs no file descriptors.
        data = torch.from_file(str(self._path), shared=False, size=size, dtype=torch.uint8)
        with open(self._path, "rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
        if start > size or _crc(data[:start].numpy()) != self.info.checksums[HEADER]:
            raise self._damaged(HEADER)
        layout: dict[str, Any] = json.loads(bytes(data[8:start].numpy()))
        return data, start, layout

    def _verified(self, data: Tensor, start: int, layout: dict[str, Any], name: str) -> Tensor:
        begin, end = layout[name]["data_offsets"]
        raw = data[start + begin : start + end]
        if _crc(raw.numpy()) != self.info.checksums[name]:
            raise self._damaged(name)
        return raw.view(_DTYPES[layout[name]["dtype"]]).view(layout[name]["shape"])

    def _damaged(self, name: str) -> CorruptError:
        return CorruptError(
            f"shard {self._path} is corrupt: the checksum of '{name}' is wrong (flipped bits); harvest again or copy "
            "it again"
        )


def _crc(data: Any) -> str:
    return f"{zlib.crc32(data):08x}"
