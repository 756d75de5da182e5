"""Peak extra memory of one optimiser step, measured in a fresh process.

    python benchmarks/memory.py [--n 4096] [--d-in 512] [--d-sae 131072] [--k 32] [--dead 0] [--json FILE]

The process builds SAE and optimiser (parameters and Adam's two moments are there: the baseline), resets its high-water
mark of resident memory, makes one step, and reads the mark. Gradients count as extra.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any


def measure_in_subprocess(*arguments: object) -> dict[str, Any]:
    """Measure (n, d_in, d_sae, k, architecture, precision, dead[, thin]) in a process of its own."""
    command = [sys.executable, __file__, "--measure", *map(str, arguments)]
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result


class PeakMemory:
    """Peak resident memory of this process between enter and exit, sampled every millisecond, in bytes."""

    def __enter__(self) -> "PeakMemory":
        """Note the baseline and begin."""
        self.baseline = self.peak = _resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.peak = max(self.peak, _resident())
            time.sleep(0.001)


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(shape: list[int], architecture: str, precision: str, dead: int, thin: bool) -> dict[str, Any]:
    """Measure in this process."""
    import torch
    from train_step import make_run, step, thin_out

    from saelab.core.batch import Batch
    from saelab.sae import ARCHITECTURES

    n, d_in, d_sae, k = shape
    run = make_run(argparse.Namespace(n=n, d_in=d_in, d_sae=d_sae, k=k), architecture, precision)
    generator = torch.Generator().manual_seed(0)

    def batch(rows: int) -> Batch:
        x = torch.randn(rows, d_in, generator=generator)
        return Batch(x, gradient=torch.randn_like(x) if ARCHITECTURES[architecture].sae.needs_gradient else None)

    small, full = batch(1), batch(n)
    if thin:
        thin_out(run, full.x, k)
    step(run, small, 0)  # makes Adam's moments and the libraries' workspaces
    with PeakMemory() as memory:
        step(run, full, dead)
    return {
        "n": n,
        "d_in": d_in,
        "d_sae": d_sae,
        "k": k,
        "architecture": architecture,
        "precision": precision,
        "dead": dead,
        "baseline_mb": memory.baseline / 1e6,
        "peak_extra_mb": (memory.peak - memory.baseline) / 1e6,
        "dense_activations_mb": 4 * n * d_sae / 1e6,
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("n", 4096), ("d-in", 512), ("d-sae", 131072), ("k", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--architecture", default="topk")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    print(f"N = {args.n}, d_in = {args.d_in}, d_sae = {args.d_sae}, k = {args.k}, {args.architecture}")
    print(f"one dense (N, d_sae) matrix: {4 * args.n * args.d_sae / 1e6:.0f} MB")
    print(f"{'precision':10s} {'dead':>8s} {'baseline MB':>12s} {'peak extra MB':>14s}")
    rows = []
    for precision, dead in (("f32", 0), ("bf16", 0), ("f32", args.d_sae // 128), ("f32", args.d_sae // 2)):
        row = measure_in_subprocess(args.n, args.d_in, args.d_sae, args.k, args.architecture, precision, dead)
        rows.append(row)
        print(f"{precision:10s} {dead:8d} {row['baseline_mb']:12.0f} {row['peak_extra_mb']:14.0f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        values = sys.argv[2:]
        print(
            json.dumps(measure([int(v) for v in values[:4]], values[4], values[5], int(values[6]), values[7:] == ["1"]))
        )
    else:
        main()
