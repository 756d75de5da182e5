"""How the cost of a TopK step grows with N, d_sae, k and d_in: fitted exponents.

    python benchmarks/scaling.py [--repeats 5] [--precision f32] [--json FILE]

Each size is varied alone by powers of 2 around N = 1024, d_in = 256, d_sae = 4096, k = 32, all sizes in turns. The
exponent is the slope of a straight line through (log size, log median ms), with the standard error of that slope; the
one of the encoder's product alone stands beside it. 1 is proportional, below 1 something fixed weighs in.
"""

import argparse
import json
import math
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

from train_step import interleave, make_run, step

from saelab.core.batch import Batch
from saelab.kernels import info

BASE = {"n": 1024, "d_in": 256, "d_sae": 4096, "k": 32}
VARIED = {
    "n": (512, 1024, 2048, 4096),
    "d_in": (128, 256, 512, 1024),
    "d_sae": (2048, 4096, 8192, 16384),
    "k": (8, 16, 32, 64, 128),
}


def slope(sizes: tuple[int, ...], times: list[float]) -> tuple[float, float]:
    """Return the exponent of a power law and its standard error."""
    x, y = np.log(np.array(sizes, float)), np.log(np.array(times))
    fitted, residuals, *_ = np.linalg.lstsq(np.stack([x, np.ones_like(x)], 1), y, rcond=None)
    error = math.sqrt(float(residuals.sum()) / (len(x) - 2) / float(((x - x.mean()) ** 2).sum()))
    return float(fitted[0]), error


def actions_of(sizes: dict[str, int], precision: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return a step and the encoder's product alone at these sizes."""
    run = make_run(argparse.Namespace(**sizes), "topk", precision)
    generator = torch.Generator().manual_seed(0)
    batch = Batch(torch.randn(sizes["n"], sizes["d_in"], generator=generator))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    x, w = batch.x.to(dtype), torch.randn(sizes["d_sae"], sizes["d_in"], generator=generator).to(dtype)
    return lambda: step(run, batch, 0), lambda: x @ w.T


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", choices=("f32", "bf16"), default="f32")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    machine = {**info()["machine"], "processor": platform.processor() or platform.machine()}
    print(f"topk {args.precision} around {BASE}; {machine}")
    print(f"{'size':6s} {'step':>14s} {'product':>14s}   median ms of a step at each size")
    rows = []
    for name, sizes in VARIED.items():
        actions: dict[str, Callable[[], Any]] = {}
        for size in sizes:
            actions[f"step {size}"], actions[f"gemm {size}"] = actions_of({**BASE, name: size}, args.precision)
        times = interleave(actions, args.repeats)
        step_ms, gemm_ms = ([times[f"{what} {size}"] for size in sizes] for what in ("step", "gemm"))
        (exponent, error), (gemm_exponent, gemm_error) = slope(sizes, step_ms), slope(sizes, gemm_ms)
        points = {str(size): ms for size, ms in zip(sizes, step_ms, strict=True)}
        rows.append(
            {
                "size": name,
                "exponent": exponent,
                "standard_error": error,
                "gemm_exponent": gemm_exponent,
                "gemm_standard_error": gemm_error,
                "step_ms": points,
                "gemm_ms": {str(size): ms for size, ms in zip(sizes, gemm_ms, strict=True)},
            }
        )
        ladder = ", ".join(f"{size}: {ms:.1f}" for size, ms in points.items())
        fits = f"{exponent:6.2f} +- {error:4.2f} {gemm_exponent:7.2f} +- {gemm_error:4.2f}"
        print(f"{name:6s} {fits}   {ladder}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"base": BASE, "machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
