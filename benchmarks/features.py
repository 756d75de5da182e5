"""Feature store: build rate, peak memory and query latency on a synthetic code matrix.

    python benchmarks/features.py [--features 20000] [--tokens 2000000] [--l0 32] [--memory-mb 512] [--json]

The "model" costs nothing and the "SAE" draws features with Zipf-like densities and exponential values, so that the
figures are those of the store itself. ``anon`` is the process's own memory (RssAnon), over what it had before;
memory-mapped file pages, which the kernel may drop at any time, are not in it.
"""

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from saelab.core.code import SparseCode
from saelab.features.build import build_features
from saelab.features.store import FeatureStore, open_features

SITE = "blocks.0.hook_mlp_hidden"
CONTEXT = 256


class Model:
    """Reads zeros of width 1."""

    name, fingerprint, d_vocab = "synthetic", "synthetic", 50_257

    def width(self, site: str) -> int:
        """Return 1."""
        return 1

    def read(self, tokens, sites):
        """Return zeros."""
        return {site: torch.zeros(*tokens.shape, 1) for site in sites}

    def logits(self, tokens, replace=None):
        """Not needed."""
        raise NotImplementedError("the store needs no logits")


class Rows:
    """Zipf-distributed token ids."""

    name = "synthetic text"

    def __init__(self, n_rows: int) -> None:
        self.n_rows = n_rows

    def batches(self, rows_per_batch: int, start_row: int = 0):
        """Yield rows."""
        generator = np.random.default_rng(0)
        for first in range(start_row, self.n_rows, rows_per_batch):
            shape = (min(rows_per_batch, self.n_rows - first), CONTEXT)
            tokens = torch.from_numpy((Model.d_vocab * generator.random(shape) ** 4).astype(np.int64))
            keep = torch.ones(shape, dtype=torch.bool)
            keep[:, 0] = False
            yield SimpleNamespace(tokens=tokens, keep=keep)


class Dictionary:
    """Draws about ``l0`` features for each token, feature i with density falling like a power of its number."""

    d_in = 1

    def __init__(self, d_sae: int, l0: int) -> None:
        self.d_sae, self.l0 = d_sae, l0
        self.W_enc, self.W_dec = torch.ones(1, d_sae), torch.ones(d_sae, 1)
        self.generator = np.random.default_rng(1)

    def encode(self, x):
        """Draw a code."""
        n = len(x)
        drawn = np.sort((self.d_sae * self.generator.random((n, self.l0)) ** 3).astype(np.int64), axis=1)
        first = np.ones_like(drawn, dtype=bool)
        first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
        values = self.generator.standard_exponential((n, self.l0), np.float32) + np.float32(1e-3)
        offsets = np.concatenate([[0], np.cumsum(first.sum(1))])
        pieces = (torch.from_numpy(piece) for piece in (drawn[first], values[first], offsets))
        return SparseCode(*pieces, self.d_sae)

    def decode(self, code):
        """Not needed."""
        raise NotImplementedError("the store decodes nothing")


def status(name: str) -> int:
    """A memory figure of this process in bytes (Linux), 0 elsewhere."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(name + ":")), 0)


def peak_anon(work: Callable[[], FeatureStore]) -> tuple[FeatureStore, int]:
    """Run ``work`` and watch how far the process's own memory grows."""
    before, peak, done = status("RssAnon"), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, status("RssAnon") - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        return work(), peak
    finally:
        done.set()
        thread.join()


def latencies(ask: Callable[[int], object], features: list[int]) -> dict[str, float]:
    """Milliseconds of a question over many features."""
    taken = []
    for i in features:
        start = time.perf_counter()
        ask(i)
        taken.append(1e3 * (time.perf_counter() - start))
    return {"p50": float(np.percentile(taken, 50)), "p95": float(np.percentile(taken, 95)), "max": max(taken)}


def measure(n_features: int, n_tokens: int, l0: int, memory_mb: int, folder: Path) -> dict[str, object]:
    """Build a store in ``folder`` and question it."""
    built, anon = peak_anon(
        lambda: build_features(
            Model(),
            Dictionary(n_features, l0),
            Rows(-(-n_tokens // CONTEXT)),
            SITE,
            folder,
            rows_per_batch=32,
            memory_bytes=memory_mb << 20,
            nearest=False,
        )
    )
    timings, nnz = built.timings, built.manifest["nnz"]
    started = time.perf_counter()
    store = open_features(folder)
    opened = 1e3 * (time.perf_counter() - started)
    count = np.array(store.column("count"))
    generator = np.random.default_rng(2)
    alive = np.flatnonzero(count)
    some = generator.choice(alive, min(500, len(alive)), replace=False).tolist()
    densest = np.argsort(-count)[:20].tolist()
    return {
        "features": n_features,
        "tokens": store.n_tokens,
        "entries": nnz,
        "densest_feature_entries": int(count.max()),
        "bytes": sum(about["bytes"] for about in store.manifest["files"].values()),
        "memory_mb": memory_mb,
        "build": {
            **timings,
            "transposed_entries_per_second": nnz / timings["transpose_seconds"],
            "store_tokens_per_second": store.n_kept / (timings["seconds"] - timings["encode_seconds"]),
            "peak_anon_mb": anon / 2**20,
            "peak_rss_mb": status("VmHWM") / 2**20,
        },
        "milliseconds": {
            "open": {"p50": opened},
            "top_contexts(20)": latencies(lambda i: store.top_contexts(i, 20), some),
            "top_contexts(20), densest": latencies(lambda i: store.top_contexts(i, 20), densest),
            "interval_samples(10, 5), densest": latencies(store.interval_samples, densest),
            "histogram, densest": latencies(store.histogram, densest),
            "co_active(20), densest": latencies(store.co_active, densest),
        },
    }


def print_tables(result: dict) -> None:
    """Show the figures."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(
        f"{result['features']:,} features, {result['tokens']:,} tokens, {result['entries']:,} entries, "
        f"{result['bytes'] / 2**30:.2f} GiB, memory {result['memory_mb']} MiB"
    )
    build = Table("build", "value")
    for name, value in result["build"].items():
        build.add_row(name, f"{value:,.1f}")
    console.print(build)
    queries = Table("query (ms)", "p50", "p95", "max")
    for name, figures in result["milliseconds"].items():
        queries.add_row(name, *(f"{figures[q]:.2f}" if q in figures else "" for q in ("p50", "p95", "max")))
    console.print(queries)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=20_000)
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--l0", type=int, default=32)
    parser.add_argument("--memory-mb", type=int, default=512)
    parser.add_argument("--dir", type=Path, default=None, help="where the store is written (a temporary folder)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        result = measure(options.features, options.tokens, options.l0, options.memory_mb, Path(folder) / "features")
    if options.json:
        print(json.dumps(result))
    else:
        print_tables(result)


if __name__ == "__main__":
    main()
