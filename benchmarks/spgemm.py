"""On how many tokens two features are active together: saelab's product of a code with itself against scipy's.

    python benchmarks/spgemm.py [--tokens 1000000] [--d-sae 16384] [--k 32] [--weighted] [--json FILE]

``C^T C`` of a code of ``tokens`` rows with ``k`` entries each. Features are drawn evenly, or with frequencies like
``1 / (rank + 16)`` ("zipf"), as a trained dictionary's are nearer to. scipy gets its best case: CSR with int32 indices
and values, its transpose made beforehand and not timed. Both run in turns; ``CPU`` is milliseconds of processor time of
all threads; ``MB`` is the peak of the process's memory during a call above what it held before, measured apart. The two
results are compared entry by entry.

``floor ms``: the k^2 tokens additions at one per cycle of each core, and the features of a token read from the cache.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from memory import PeakMemory

from saelab.core.code import SparseCode
from saelab.kernels import co_activation_matrix

GHZ = 2.5
"""Cycles per nanosecond that the floor counts with."""


def draw(tokens: int, d_sae: int, k: int, zipf: bool) -> SparseCode:
    """Return a code with k distinct features per token: one of each of k interleaved strata of features."""
    generator = torch.Generator().manual_seed(0)
    size = d_sae // k
    weights = 1 / (torch.arange(size, dtype=torch.float64) * k + 16) if zipf else torch.ones(size, dtype=torch.float64)
    ends = (weights.cumsum(0) / weights.sum()).to(torch.float32)
    drawn = torch.searchsorted(ends, torch.rand(tokens, k, generator=generator)).clamp_(max=size - 1)
    indices = drawn.mul_(k).add_(torch.arange(k))
    values = torch.rand(tokens * k, generator=generator) + 0.1
    return SparseCode(indices.view(-1), values, torch.arange(tokens + 1) * k, d_sae)


def scipy_product(code: SparseCode, weighted: bool) -> Any:
    """Return a function that multiplies by scipy."""
    values = code.values.double().numpy() if weighted else np.ones(code.nnz, np.int32)
    arrays = values, code.indices.to(torch.int32).numpy(), code.offsets.to(torch.int32).numpy()
    matrix = scipy.sparse.csr_matrix(arrays, shape=(code.n_tokens, code.d_sae))
    transposed = matrix.T.tocsr()
    return lambda: transposed @ matrix


def measure(code: SparseCode, weighted: bool, repeats: int) -> dict[str, Any]:
    """Return medians, memory and whether both agree."""
    theirs_of = scipy_product(code, weighted)
    actions = {"saelab": lambda: co_activation_matrix(code, weighted=weighted), "scipy": theirs_of}
    times: dict[str, list[float]] = {name: [] for name in actions}
    cpu: dict[str, list[float]] = {name: [] for name in actions}
    peak: dict[str, float] = {}
    results: dict[str, Any] = {}
    for name, action in actions.items():
        with PeakMemory() as memory:
            results[name] = action()
        peak[name] = (memory.peak - memory.baseline) / 1e6
    ours: Tensor = results.pop("saelab")
    theirs = results.pop("scipy")
    agree = int(theirs.nnz) == int(ours.count_nonzero())
    for start in range(0, code.d_sae, 1024):
        piece = torch.from_numpy(theirs[start : start + 1024].toarray())
        agree &= bool(torch.allclose(ours[start : start + 1024].double(), piece.double(), rtol=1e-9))
    nnz = int(theirs.nnz)
    del ours, theirs
    for _ in range(repeats):
        for name, action in actions.items():
            started, spent = time.perf_counter(), time.process_time()
            action()
            times[name].append((time.perf_counter() - started) * 1e3)
            cpu[name].append((time.process_time() - spent) * 1e3)
    median = {name: statistics.median(values) for name, values in times.items()}
    pairs = int(code.offsets.diff().square().sum())
    floor = pairs / GHZ / 1e6 / torch.get_num_threads()
    return {
        "nnz": nnz,
        "pairs": pairs,
        "ratio": median["scipy"] / median["saelab"],
        "saelab_ms": median["saelab"],
        "scipy_ms": median["scipy"],
        "saelab_cpu_ms": statistics.median(cpu["saelab"]),
        "scipy_cpu_ms": statistics.median(cpu["scipy"]),
        "saelab_extra_mb": peak["saelab"],
        "scipy_extra_mb": peak["scipy"],
        "floor_ms": floor,
        "over_floor": median["saelab"] / floor,
        "equal": agree,
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 1_000_000), ("d-sae", 16384), ("k", 32), ("repeats", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--weighted", action="store_true", help="sums of products instead of counts")
    parser.add_argument("--features", choices=("even", "zipf"), nargs="+", default=["even", "zipf"])
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    about = (
        f"{torch.get_num_threads()} threads, {platform.processor() or platform.machine()}, scipy {scipy.__version__}"
    )
    print(f"{args.tokens} tokens x {args.d_sae} features, k = {args.k}; {about}")
    head = (
        "features",
        "scipy/saelab",
        "saelab ms",
        "scipy ms",
        "saelab CPU",
        "scipy CPU",
        "saelab MB",
        "scipy MB",
        "over floor",
        "equal",
    )
    print(" ".join(f"{name:>12s}" for name in head))
    rows = []
    for features in args.features:
        row = measure(draw(args.tokens, args.d_sae, args.k, features == "zipf"), args.weighted, args.repeats)
        row = {"features": features, **row}
        rows.append(row)
        cells = [
            f"{row['ratio']:.1f}",
            *(f"{row[key]:.0f}" for key in ("saelab_ms", "scipy_ms", "saelab_cpu_ms", "scipy_cpu_ms")),
        ]
        cells += [*(f"{row[key]:.0f}" for key in ("saelab_extra_mb", "scipy_extra_mb")), f"{row['over_floor']:.1f}"]
        print(" ".join(f"{cell:>12s}" for cell in (row["features"], *cells, str(row["equal"]))), flush=True)
    result = {"tokens": args.tokens, "d_sae": args.d_sae, "k": args.k, "weighted": args.weighted, "rows": rows}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if not all(row["equal"] for row in rows):
        raise SystemExit("the two products differ")


if __name__ == "__main__":
    main()
