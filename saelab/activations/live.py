"""Training batches straight from the model, nothing on disk, shuffled through a bounded buffer.

Two windows mix the text, and both are honest about their size:

1. **Text rows.** ``text_window`` rows of token ids are held and visited in random order. A token takes 9 bytes there
   against hundreds or thousands for its activation, so this window is usually the whole corpus (16384 rows of 256
   tokens are 4 million tokens in 38 MB).
2. **Activations.** ``buffer_rows`` rows are held. They leave in random order, and each one's slot is refilled at once
   with the next row from the model, so the buffer is always full, nothing is copied twice, and a batch costs time
   proportional to the batch. Rows are thus permuted within consecutive blocks of ``buffer_rows``.

In a batch drawn from a buffer of n text rows' tokens, two tokens come from the same text row with probability about
1/n: choose ``buffer_rows`` as many times the context as memory allows. (A store on disk has no window at all.)

**Resume.** A position is the place in the text where the current block began and the number of rows drawn since. On
resume the model runs again over that one block, in the same batches, and the next batch is exactly the next batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, Int64, Shaped
from torch import Tensor

from saelab.activations.collect import Collector, ReadableModel, TextBatch, TextRows, is_padded
from saelab.activations.permutation import Permutation
from saelab.core.batch import Batch, require_same_stream
from saelab.core.errors import ConfigError, TextError
from saelab.core.progress import progress

Cursor = dict[str, Any]
Columns = dict[str, Shaped[Tensor, "n ..."]]


class LiveStream:
    """A ``BatchSource`` that runs the model as it goes; endless, each epoch in a new order.

    ``target_site`` fills ``Batch.target``, ``gradient`` fills ``Batch.gradient``, ``outlier_norm`` is as in
    ``HarvestConfig``. Batches are float32; the buffer keeps the model's dtype.
    """

    def __init__(
        self,
        model: ReadableModel,
        rows: TextRows,
        site: str,
        batch_size: int,
        *,
        buffer_rows: int = 1 << 17,
        seed: int = 0,
        target_site: str | None = None,
        gradient: bool = False,
        outlier_norm: float | None = None,
        rows_per_batch: int = 16,
        text_window: int = 1 << 14,
    ) -> None:
        if batch_size < 1 or buffer_rows < batch_size:
            raise ConfigError(
                f"buffer_rows must be at least batch_size, and that at least 1; got {buffer_rows} and {batch_size}"
            )
        self.batch_size, self.buffer_rows, self.seed = batch_size, buffer_rows, seed
        self._rows, self._rows_per_batch = rows, rows_per_batch
        self._text_window = rows_per_batch * max(1, text_window // rows_per_batch)
        sites = [site] if target_site in (None, site) else [site, str(target_site)]
        self._collector = Collector(
            model,
            sites,
            dtype=model.dtype,
            outlier_norm=outlier_norm,
            gradients=gradient,
            padded=is_padded(rows),
        )
        self._columns = {"x": site}
        if target_site is not None:
            self._columns["target"] = target_site
        if gradient:
            self._columns["gradient"] = f"{site}.grad"
        self._d_in = model.width(site)
        self._identity = {
            "model": model.fingerprint,
            "text": rows.describe(),
            "columns": self._columns,
            "seed": seed,
            "buffer_rows": buffer_rows,
            "rows_per_batch": rows_per_batch,
            "text_window": self._text_window,
            "outlier_norm": outlier_norm,
        }
        start = {"epoch": 0, "start_row": 0, "batch": 0, "skip": 0, **self._collector.state()}
        self._position: dict[str, Any] = {"block": 0, "drawn": 0, "cursor": start}

    @property
    def d_in(self) -> int:
        """Width of ``Batch.x``."""
        return self._d_in

    def state_dict(self) -> dict[str, Any]:
        """Return the exact position (JSON-able, a few hundred bytes)."""
        return {**self._identity, **self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Return to a position of :meth:`state_dict`; :class:`ResumeError` when it is of another stream."""
        require_same_stream(self._identity, state)
        self._position = {key: state[key] for key in ("block", "drawn", "cursor")}

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches from the current position on (after filling the buffer, which shows a progress bar)."""
        buffer = _ShuffleBuffer(self._feed(self._position["cursor"]), self.buffer_rows, self.seed)
        buffer.restore(self._position)
        while True:
            columns = buffer.draw(self.batch_size)
            self._position = buffer.position()
            yield Batch(**{name: columns[column].float() for name, column in self._columns.items()})

    def _feed(self, cursor: Cursor) -> "_Feed":
        names = [*dict.fromkeys(self._columns.values())]
        return _Feed(self._read_on(cursor), names, int(cursor["skip"]))

    def _read_on(self, cursor: Cursor) -> Iterator[tuple[Cursor, Columns]]:
        """Yield the rows of each forward pass from ``cursor`` on, with the cursor it began at; for ever."""
        self._collector.load_state(cursor)
        epoch, start, number = int(cursor["epoch"]), int(cursor["start_row"]), int(cursor["batch"])
        while True:
            kept, begin = 0, start
            for window in self._windows(start):
                count = window.tokens.shape[0]
                order = torch.from_numpy(Permutation(count, self.seed, _mark(epoch, start))(np.arange(count)))
                for part in range(number, -(-count // self._rows_per_batch)):
                    here = {"epoch": epoch, "start_row": start, "batch": part, **self._collector.state()}
                    chosen = order[part * self._rows_per_batch : (part + 1) * self._rows_per_batch]
                    rows = _Rows(window.tokens[chosen], window.keep[chosen])
                    columns = self._collector.collect(rows, chosen + start)
                    kept += columns["row"].shape[0]
                    yield here, columns
                start, number = start + count, 0
            if begin == 0 and kept == 0:
                raise TextError("the text has no token to keep; give more text, or check the tokenizer")
            epoch, start, number = epoch + 1, 0, 0

    def _windows(self, start_row: int) -> Iterator["_Rows"]:
        """Yield the text in pieces of ``text_window`` rows."""
        held: list[TextBatch] = []
        for batch in self._rows.batches(self._rows_per_batch, start_row=start_row):
            held.append(batch)
            if len(held) * self._rows_per_batch == self._text_window:
                yield _Rows.joined(held)
                held = []
        if held:
            yield _Rows.joined(held)


@dataclass(frozen=True)
class _Rows:
    tokens: Int[Tensor, "b t"]
    keep: Bool[Tensor, "b t"]

    @staticmethod
    def joined(batches: list[TextBatch]) -> "_Rows":
        return _Rows(torch.cat([b.tokens for b in batches]), torch.cat([b.keep for b in batches]))


class _Feed:
    """The model's rows in order, taken in any portions."""

    def __init__(self, batches: Iterator[tuple[Cursor, Columns]], names: list[str], skip: int) -> None:
        self._batches, self.names = batches, names
        self._cursor, self._rows = next(batches)
        self._taken = skip

    def cursor(self) -> Cursor:
        """Where the next row comes from."""
        return {**self._cursor, "skip": self._taken}

    def example(self) -> Columns:
        """Some rows, for their shapes and dtypes."""
        return {name: self._rows[name] for name in self.names}

    def take_into(self, buffer: Columns, slots: Int64[Tensor, " m"]) -> None:
        """Put the next rows into the given slots."""
        done = 0
        while done < slots.numel():
            left = self._rows[self.names[0]].shape[0] - self._taken
            if left <= 0:
                self._cursor, self._rows = next(self._batches)
                self._taken = 0
                continue
            take = min(left, slots.numel() - done)
            for name in self.names:
                buffer[name][slots[done : done + take]] = self._rows[name][self._taken : self._taken + take]
            self._taken += take
            done += take


class _ShuffleBuffer:
    """``size`` rows that leave in random order, each replaced by the next of the feed.

    The rows of block j are those that arrived while block j - 1 was leaving. The order in which they leave is a
    permutation of their order of arrival, so it does not matter in which slots they lie.
    """

    def __init__(self, feed: _Feed, size: int, seed: int) -> None:
        self._feed, self._size, self._seed = feed, size, seed
        self._rows = {
            name: torch.empty(size, *value.shape[1:], dtype=value.dtype) for name, value in feed.example().items()
        }
        self._slots = torch.arange(size)  # slot of each row of the block, by order of arrival
        self._next_slots = torch.arange(size)

    def restore(self, position: dict[str, Any]) -> None:
        """Fill the buffer from the feed, which stands where block ``position["block"]`` began."""
        self._block, self._drawn = int(position["block"]), 0
        self._start = self._feed.cursor()
        with progress("buffer", self._size, "rows") as bar:
            for begin in range(0, self._size, 1 << 12):
                slots = self._slots[begin : begin + (1 << 12)]
                self._feed.take_into(self._rows, slots)
                bar.advance(slots.numel())
        self._begin_block()
        self._replace(self._leaving(int(position["drawn"])))

    def position(self) -> dict[str, Any]:
        """What :meth:`restore` needs."""
        return {"block": self._block, "drawn": self._drawn, "cursor": self._start}

    def draw(self, count: int) -> Columns:
        """Take ``count`` rows out, in random order, and fill their slots."""
        parts = []
        while count > 0:
            slots = self._leaving(min(count, self._size - self._drawn))
            parts.append({name: value[slots] for name, value in self._rows.items()})
            self._replace(slots)
            count -= slots.numel()
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _leaving(self, count: int) -> Int64[Tensor, " n"]:
        places = np.arange(self._drawn, self._drawn + count, dtype=np.int64)
        return self._slots[torch.from_numpy(self._order(places))]

    def _replace(self, slots: Int64[Tensor, " n"]) -> None:
        self._feed.take_into(self._rows, slots)
        self._next_slots[self._drawn : self._drawn + slots.numel()] = slots
        self._drawn += slots.numel()
        if self._drawn == self._size:
            self._slots, self._next_slots = self._next_slots, self._slots
            self._block, self._drawn, self._start = self._block + 1, 0, self._next_start
            self._begin_block()

    def _begin_block(self) -> None:
        self._order = Permutation(self._size, self._seed, 2 * self._block + 1)
        self._next_start = self._feed.cursor()


def _mark(epoch: int, start_row: int) -> int:
    """A number for a text window that no block of activations has (those are odd)."""
    return 2 * ((epoch << 40) + start_row)
