"""Rows in, shards out: the pieces of a shard are kept as they come and written by a background thread."""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from jaxtyping import Shaped
from torch import Tensor

from saelab.activations.shards import ShardInfo, write_shard

Cursor = dict[str, Any]
"""From where to go on after a shard."""


class ShardWriter:
    """Cuts a sequence of rows into shards of ``rows_per_shard``.

    One shard is being filled while the one before is being written, so memory is twice a shard. Rows are not copied:
    the tensors given to :meth:`add` must not be changed afterwards. After each shard is safe on disk,
    ``on_shard(shards so far, cursor)`` is called (in the background thread). Errors of the background thread are raised
    by the next call.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Iterable[str],
        rows_per_shard: int,
        *,
        written: list[ShardInfo],
        on_shard: Callable[[list[ShardInfo], Cursor], None],
    ) -> None:
        self._folder, self._rows = folder, rows_per_shard
        self.shards = list(written)
        """Shards that are safe on disk."""
        self._on_shard = on_shard
        self._next = len(written)
        self._pieces: dict[str, list[Tensor]] = {name: [] for name in tensors}
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
            for name, pieces in self._pieces.items():
                pieces.append(columns[name][begin : begin + take])
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
        pieces, number = self._pieces, self._next
        self._wait()
        self._pieces = {name: [] for name in pieces}
        self._fill, self._next = 0, number + 1
        self._pending = self._pool.submit(self._write, pieces, number, cursor)

    def _wait(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _write(self, pieces: dict[str, list[Tensor]], number: int, cursor: Cursor) -> None:
        self.shards.append(write_shard(self._folder, f"shard-{number:05d}.safetensors", pieces))
        self._on_shard(self.shards, cursor)
