"""Training batches from an activation store: a fresh global permutation each epoch, exact to resume.

Each epoch visits every row of the store exactly once, in the order of a keyed permutation of all row numbers
(:class:`saelab.activations.permutation.Permutation`). Nothing is shuffled in a window and no index is kept: the state
is (epoch, offset). Rows are gathered from memory maps, some batches ahead, in a background thread. As checksums are
verified on first touch, the first batches read the site's data once from end to end, which also warms the page cache.

The epochs form one endless sequence of rows that is cut into batches of ``batch_size``; the batch at the end of an
epoch is completed with the first rows of the next. With ``epochs=n`` the last batch may be shorter.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from saelab.activations.permutation import Permutation
from saelab.core.batch import Batch, require_same_stream
from saelab.core.errors import ConfigError

Gather = Callable[[str, Int64[Tensor, " n"]], Shaped[Tensor, "n ..."]]
_CHUNK_BYTES = 16 << 20  # below the allocator's mmap threshold, so that memory is reused and not faulted in anew
_CHUNK_ROWS = 1 << 16


class StoreStream:
    """A ``BatchSource`` over all rows of a store; made by ``ActivationStore.stream``."""

    def __init__(
        self,
        gather: Gather,
        *,
        n_rows: int,
        d_in: int,
        site: str,
        batch_size: int,
        seed: int,
        target_site: str | None,
        gradient: bool,
        epochs: int | None,
        identity: str,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
        self.n_rows = n_rows
        """Rows per epoch."""
        self.batch_size = batch_size
        self.seed = seed
        self._gather, self._d_in = gather, d_in
        self._columns = {"x": site}
        if target_site is not None:
            self._columns["target"] = target_site
        if gradient:
            self._columns["gradient"] = f"{site}.grad"
        self._identity = {"store": identity, "seed": seed, "columns": self._columns}
        self._end = None if epochs is None else epochs * n_rows
        self._position = 0
        row_bytes = 4 * d_in * len(self._columns)
        batches = max(1, min(_CHUNK_ROWS, _CHUNK_BYTES // row_bytes) // batch_size)
        self._chunk = batches * batch_size

    @property
    def d_in(self) -> int:
        """Width of ``Batch.x``."""
        return self._d_in

    @property
    def epoch(self) -> int:
        """Number of whole epochs that have been handed out."""
        return self._position // self.n_rows

    def state_dict(self) -> dict[str, Any]:
        """Return the exact position: number of rows handed out, and what they were rows of."""
        return {**self._identity, "epoch": self.epoch, "offset": self._position % self.n_rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Return to a position of :meth:`state_dict`; :class:`ResumeError` when it is of another stream."""
        require_same_stream(self._identity, state)
        self._position = int(state["epoch"]) * self.n_rows + int(state["offset"])

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches from the current position on; the position is after a batch as soon as it is handed out."""
        with ThreadPoolExecutor(1, thread_name_prefix="saelab-stream") as pool:
            begin = self._position
            ahead: Future[dict[str, Tensor]] = pool.submit(self._load, begin)
            while True:
                chunk = ahead.result()
                rows = chunk["x"].shape[0]
                if rows == 0:
                    return
                begin += rows
                ahead = pool.submit(self._load, begin)
                for start in range(0, rows, self.batch_size):
                    part = {name: tensor[start : start + self.batch_size] for name, tensor in chunk.items()}
                    self._position += part["x"].shape[0]
                    yield Batch(**part)

    def rows_at(self, begin: int, count: int) -> Int64[Tensor, " n"]:
        """Row numbers at places [begin, begin + count) of the endless sequence (fewer at the end of the last epoch)."""
        end = begin + count if self._end is None else min(begin + count, self._end)
        parts = []
        while begin < end:
            epoch, offset = divmod(begin, self.n_rows)
            stop = min(end - begin, self.n_rows - offset)
            parts.append(Permutation(self.n_rows, self.seed, epoch)(np.arange(offset, offset + stop, dtype=np.int64)))
            begin += stop
        return torch.from_numpy(np.concatenate(parts)) if parts else torch.empty(0, dtype=torch.int64)

    def _load(self, begin: int) -> dict[str, Tensor]:
        rows = self.rows_at(begin, self._chunk)
        return {name: self._gather(column, rows).float() for name, column in self._columns.items()}
