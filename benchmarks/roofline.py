"""How fast this machine could be: what a training step must compute and move, over what the machine was seen to do.

Used by the other benchmarks. A floor is a sum over the phases of a step, which cannot overlap, of the longer of its
arithmetic (at the rate of the encoder's own product) and its traffic (at the rate of adding two large arrays).
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rates:
    """What the machine was seen to do."""

    gemm: dict[str, float]
    """Multiply-adds counted as two, per second, in the encoder's product in "f32" and "bf16"."""
    bandwidth: float
    """Bytes per second, read and written, of ``a + b`` on arrays that no cache holds."""


@dataclass(frozen=True)
class Work:
    """What a step must do at least."""

    flops: float
    bytes: float
    floor_ms: float


def synchronize(device: str) -> None:
    """Wait for a GPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(action: Callable[[], object], device: str) -> float:
    """Return the milliseconds of one call, the GPU's work included."""
    synchronize(device)
    started = time.perf_counter()
    action()
    synchronize(device)
    return (time.perf_counter() - started) * 1e3


def bandwidth(device: str = "cpu", repeats: int = 5) -> float:
    """Return bytes per second of ``a + b -> c``."""
    n = 1 << (28 if device.startswith("cuda") else 25)
    a, b, c = (torch.ones(n, device=device) for _ in range(3))
    timed(lambda: torch.add(a, b, out=c), device)
    return 12 * n / statistics.median(timed(lambda: torch.add(a, b, out=c), device) * 1e-3 for _ in range(repeats))


def step_work(  # noqa: PLR0917
    n: int, d_in: int, d_sae: int, active: float, precision: str, rates: Rates
) -> Work:
    """Return the least work of one TopK step with ``active`` entries per token, in float32 but for the product.

    Phases: the encoder's product; four sparse products over the entries (decode, both weight gradients, dvalues) that
    gather a row per entry from memory or cache; the passes over all parameters: both gradients written, decoder
    gradients projected, all gradients' norm, Adam (reads gradient, weight, two moments; writes three), rows normalised.
    """
    weights, entries = d_in * d_sae, n * active
    half = 2 if precision == "bf16" else 4
    phases = [
        (2 * n * weights / rates.gemm[precision], half * (n * d_in + weights)),
        (8 * entries * d_in / rates.gemm["f32"], 4 * (2 * n * d_in + 2 * weights)),
        (0.0, 4 * weights * (2 + 3 + 2 + 14 + 2)),
    ]
    floor = sum(max(seconds, moved / rates.bandwidth) for seconds, moved in phases)
    return Work(2 * n * weights + 8 * entries * d_in, float(sum(moved for _, moved in phases)), floor * 1e3)
