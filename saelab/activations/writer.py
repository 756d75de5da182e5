"""Rows in, shards out: fixed-size shards filled in memory and written by a background thread."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from saelab.activations.shards import ShardInfo, write_shard

Cursor = dict[str, Any]
"""From where to go on after a shard."""


class ShardWriter:
    """Cuts a sequence of rows into shards of ``rows_per_shard``.

    One shard is being filled while the one before is being written, so memory is twice a shard, and the same memory all
    the way: the first touch of a page costs more than copying it. After each shard is safe on disk,
    ``on_shard(shards so far, cursor)`` is called (in the background thread). Errors of the background thread are raised
    by the next call.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        rows_per_shard: int,
        *,
        written: list[ShardInfo],
        on_shard: Callable[[list[ShardInfo], Cursor], None],
    ) -> None:
        self._folder, self._tensors, self._rows = folder, dict(tensors), rows_per_shard
        self.shards = list(written)
        """Shards that are safe on disk."""
        self._on_shard = on_shard
        self._next = len(written)
        self._buffer = self._allocate()
        self._spare: list[dict[str, Tensor]] = []
        self._fill = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="saelab-writer")
        self._pending: Future[None] | None = None

    def add(self, columns: Mapping[str, Shaped[Tensor, "n ..."]], begin: int, end: int, cursor: Cursor) -> None:
        """Append rows [begin, end) of ``columns``.

        ``cursor`` says where the batch began; a shard that ends within it remembers it, with ``skip`` = number of the
        batch's rows that are already in shards.
        """
        while begin < end:
            take = min(end - begin, self._rows - self._fill)
            for name, tensor in self._buffer.items():
                tensor[self._fill : self._fill + take] = columns[name][begin : begin + take]
            self._fill += take
            begin += take
            if self._fill == self._rows:
                self._submit({**cursor, "skip": begin})

    def finish(self, cursor: Cursor) -> None:
        """Write the last, shorter shard and wait for all."""
        if self._fill:
            self._submit(cursor)
        self._wait()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # On Ctrl-C too the shard being written is finished, so that as little as possible is done twice.
        self._pool.shutdown(wait=True)

    def _submit(self, cursor: Cursor) -> None:
        buffer, rows, number = self._buffer, self._fill, self._next
        self._wait()
        self._buffer = self._spare.pop() if self._spare else self._allocate()
        self._fill, self._next = 0, number + 1
        self._pending = self._pool.submit(self._write, buffer, rows, number, cursor)

    def _wait(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _write(self, buffer: dict[str, Tensor], rows: int, number: int, cursor: Cursor) -> None:
        part = {name: tensor[:rows] for name, tensor in buffer.items()}
        self.shards.append(write_shard(self._folder, f"shard-{number:05d}.safetensors", part))
        self._on_shard(self.shards, cursor)
        self._spare.append(buffer)

    def _allocate(self) -> dict[str, Tensor]:
        return {name: torch.empty(self._rows, *shape, dtype=dtype) for name, (shape, dtype) in self._tensors.items()}
