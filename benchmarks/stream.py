"""How fast a store is streamed in a globally shuffled order, against plain memory-map reads, and how shuffled it is.

    python benchmarks/stream.py [--rows 200000] [--width 256] [--dtype float32] [--json FILE]

The store is made of random numbers; everything is in the page cache after the first pass. "correlation" is that of the
places (in the text) of neighbouring rows, in standard errors: a fair shuffle stays within a few.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from saelab.activations.harvest import HarvestConfig, harvest
from saelab.activations.live import LiveStream
from saelab.activations.store import ActivationStore, open_store
from saelab.core.batch import BatchSource
from saelab.core.progress import set_progress

SITE, CONTEXT = "site", 128


@dataclass(frozen=True)
class Numbered:
    """Rows of tokens whose ids are their places in the text; no exclusions."""

    tokens: Tensor
    keep: Tensor


class NumberedRows:
    """A text of ``n_rows`` rows."""

    def __init__(self, n_rows: int) -> None:
        self._n_rows = n_rows

    def batches(self, rows_per_batch: int, start_row: int = 0) -> Iterator[Numbered]:
        """Yield the rows."""
        for start in range(start_row, self._n_rows, rows_per_batch):
            stop = min(start + rows_per_batch, self._n_rows)
            tokens = torch.arange(start * CONTEXT, stop * CONTEXT).view(-1, CONTEXT)
            yield Numbered(tokens, torch.ones_like(tokens, dtype=torch.bool))

    def describe(self) -> dict[str, Any]:
        """Say what this is."""
        return {"source": "numbered", "rows": self._n_rows}


class NoiseModel:
    """Activations are noise at no cost; the first entry is the token's place in the text."""

    name, fingerprint = "noise", "none"

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._noise = torch.randn(1 << 14, width, generator=torch.Generator().manual_seed(0)).to(dtype)

    def width(self, site: str) -> int:
        """Width of the site."""
        return self._noise.shape[1]

    def read(self, tokens: Tensor, sites: Sequence[str]) -> dict[str, Tensor]:
        """Noise, and the place."""
        x = self._noise[: tokens.numel()].reshape(*tokens.shape, -1).clone()
        x[..., 0] = tokens
        return dict.fromkeys(sites, x)

    def read_with_gradient(
        self, tokens: Tensor, keep: Tensor, sites: Sequence[str]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Not used here."""
        raise NotImplementedError


def seconds(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def consume(source: BatchSource, batches: int) -> None:
    """Take batches and touch nothing."""
    for _ in islice(source, batches):
        pass


def sequential(store: ActivationStore) -> None:
    """Copy the site out of plain memory maps, file by file."""
    for shard in store.manifest["shards"]:
        data = np.memmap(store.path / shard["file"], dtype=np.uint8, mode="r")
        for begin in range(0, len(data), 4 << 20):
            data[begin : begin + (4 << 20)].copy()


def gather(data: np.ndarray, order: np.ndarray, batch_size: int) -> None:
    """Read batches at random places of one plain array in memory: the least a shuffled read can cost."""
    for begin in range(0, len(order), batch_size):
        data[order[begin : begin + batch_size]]


def correlation(source: BatchSource, batches: int) -> float:
    """Correlation of the places of neighbouring rows in standard errors."""
    places = torch.cat([batch.x[:, 0] for batch in islice(source, batches)]).double()
    pairs = torch.stack([places[:-1], places[1:]])
    return float(torch.corrcoef(pairs)[0, 1]) * (places.numel() - 1) ** 0.5


def measure(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """All rows of the table."""
    dtype = getattr(torch, arguments.dtype)
    batch_size, n_text = arguments.batch_size, arguments.rows // CONTEXT
    model, rows = NoiseModel(arguments.width, dtype), NumberedRows(n_text)
    config = HarvestConfig(max_tokens=n_text * CONTEXT, rows_per_batch=64, shard_bytes=32 << 20)
    write = seconds(lambda: harvest(model, rows, [SITE], folder / "store", config))
    store = open_store(folder / "store")
    n, row_bytes = store.n_rows, arguments.width * dtype.itemsize
    batches = n // batch_size
    found: list[dict[str, Any]] = []

    def add(what: str, rows_read: int, took: float, sigmas: float | None = None) -> None:
        rate = rows_read / took
        found.append({"what": what, "rows_per_s": rate, "gb_per_s": rate * row_bytes / 1e9, "correlation": sigmas})

    add("harvest without a model", n, write)
    first = seconds(lambda: consume(store.stream(SITE, batch_size), 1))
    add("stream: first batch (verifies all)", n, first)
    add("plain memory map, in order", n, min(seconds(lambda: sequential(store)) for _ in range(3)))
    whole = store.read_rows(SITE, torch.arange(n)).view(torch.uint8).numpy()
    order = np.random.default_rng(0).permutation(n)
    add("plain array, random rows", n, min(seconds(lambda: gather(whole, order, batch_size)) for _ in range(3)))
    took = min(seconds(lambda: consume(store.stream(SITE, batch_size), batches)) for _ in range(3))
    exact = NumberedRows(min(n_text, (1 << 24) // CONTEXT))
    add("stream (float32 batches)", batches * batch_size, took)
    echo = NoiseModel(2, torch.float32)
    small = harvest(echo, exact, [SITE], folder / "places", HarvestConfig(shard_bytes=1 << 20))
    for seed in range(3):
        source = small.stream(SITE, batch_size, seed=seed)
        took = seconds(lambda source=source: consume(source, small.n_rows // batch_size))  # type: ignore[misc]
        sigmas = correlation(small.stream(SITE, batch_size, seed=seed), small.n_rows // batch_size)
        add(f"stream, width 2, seed {seed}", small.n_rows // batch_size * batch_size, took, sigmas)
    live = LiveStream(echo, exact, SITE, batch_size, buffer_rows=max(batch_size, n // 8), text_window=n_text)
    add("live, text in window, buffer 1/8", n, seconds(lambda: consume(live, batches)), correlation(live, batches))
    near = LiveStream(echo, exact, SITE, batch_size, buffer_rows=max(batch_size, n // 8), text_window=64)
    add("live, text window 64 rows", n, seconds(lambda: consume(near, batches)), correlation(near, batches))
    return found


def main() -> None:
    """Run and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    set_progress(False)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(arguments, Path(folder))
    table = Table(
        title=f"{arguments.rows:,} rows of {arguments.width} x {arguments.dtype}, batch {arguments.batch_size}"
    )
    for column in ("what", "rows/s", "GB/s on disk", "correlation (s.e.)"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for row in found:
        sigmas = "" if row["correlation"] is None else f"{row['correlation']:.1f}"
        table.add_row(row["what"], f"{row['rows_per_s']:,.0f}", f"{row['gb_per_s']:.2f}", sigmas)
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
