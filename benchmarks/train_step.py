"""One optimiser step against the encoder's matrix product alone, interleaved in one process.

    python benchmarks/train_step.py [--json FILE] [--n 2048] [--d-in 512] [--d-sae 8192] [--k 32]
    python benchmarks/train_step.py --device cuda --n 8192 --d-in 2048 --d-sae 131072 --k 64 --only topk,mutual_choice

Prints a table; ``ratio`` is the median time of a step over the median time of ``x @ W_enc`` in float32 as torch gives
it; ``gemm_f32_saelab`` is the same product as saelab's kernels make it (``saelab.kernels.product``: oneDNN, into a
buffer), and the floor goes by the faster of the two. Timings of all rows are taken in turns, so that a busy machine
slows all alike. ``peak extra`` is the rise of the process's peak memory over one step beyond parameters and optimiser
state, taken in a fresh process (see ``memory.py``). Peers whose environment is there (``benchmarks/peers/setup.sh``)
run their own TopK step by their own code in their own process, in turn with the rest; the milliseconds are those that
they report. Peers run on the CPU only.

Architectures whose codes have no fixed size (ReLU, JumpReLU, Gated) appear twice: as training starts, with 7 to 17 % of
all features active, and "at k", with biases or thresholds moved so that as many are active as in TopK's code, which is
where training takes them. ``over floor`` is the median over the least that the step's work could take on this machine
(``roofline.py``), with the number of active entries that the row has.
``--cpu-time --threads 1`` counts this process's own time, which a busy machine disturbs less; peers are left out.

With ``--device cuda`` each row is timed with the sparse and the Triton twins; memory is then torch's own peak.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from memory import measure_in_subprocess
from roofline import Rates, bandwidth, step_work, synchronize

from saelab.core.batch import Batch
from saelab.core.config import parse_config
from saelab.kernels import info
from saelab.kernels.product import product
from saelab.sae import ARCHITECTURES, build_sae
from saelab.training import FitConfig
from saelab.training.metrics import BatchSpread
from saelab.training.run import Run


def make_run(args: argparse.Namespace, architecture: str, precision: str) -> Run:
    """Return a run in mid-training."""
    sae = {"architecture": architecture, "d_in": args.d_in, "d_sae": args.d_sae, "input_scale": 1.0}
    if "k" in ARCHITECTURES[architecture].config.model_fields:
        sae["k"] = args.k
    training = {
        "tokens": args.n * 10_000,
        "batch_size": args.n,
        "k_warmup": 0,  # mid-training
        "precision": precision,
        "device": getattr(args, "device", "cpu"),
    }
    config = parse_config(FitConfig, {"sae": sae, "training": training})
    run = Run(config, build_sae(config.sae), torch.device(config.training.device))
    run.tokens = config.training.dead_after
    return run


def thin_out(run: Run, x: torch.Tensor, k: int) -> None:
    """Move biases or thresholds so that about ``k`` features per token are active, as they are after training."""
    sae = run.sae
    with torch.no_grad():
        z = (x[:256] * sae.input_scale - sae.b_dec) @ sae.W_enc
        level = z.reshape(-1).topk(min(256, len(x)) * k).values[-1]
        if hasattr(sae, "theta"):
            sae.theta.fill_(level)
        else:
            sae.b_enc.fill_(-level)


class TritonRun:
    """A run whose steps take the Triton twins."""

    def __init__(self, run: Run) -> None:
        self.run = run
        context = run._context
        run._context = lambda: replace(context(), impl="triton")  # type: ignore[method-assign]


def step(run: Run, batch: Batch, dead: int) -> None:
    """Make one optimiser step with ``dead`` dead features."""
    run.unfired[:dead] = run.config.training.dead_after
    run.step(batch, BatchSpread(batch.x))


PEERS = ("saelens", "sparsify", "dictionary_learning")
ROOT = Path(__file__).resolve().parents[1]


class Peer:
    """A peer's training step, served by a process of its own interpreter."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        python = ROOT / ".venv-peers" / name / "bin" / "python"
        sizes = ["--n", args.n, "--d-in", args.d_in, "--d-sae", args.d_sae, "--k", args.k]
        threads = ["--threads", args.threads] if args.threads else []
        command = [python, ROOT / "benchmarks/peers/step.py", "--peer", name, "--serve", *sizes, *threads]
        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.about = self.answer()

    @staticmethod
    def installed() -> list[str]:
        """Return the peers whose environment is there."""
        return [name for name in PEERS if (ROOT / ".venv-peers" / name / "bin" / "python").exists()]

    def answer(self) -> dict[str, Any]:
        """Read one line of the peer."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the peer stopped: {self.process.args}; run that command to see why")
        return dict(json.loads(line))

    def ask(self, command: str) -> dict[str, Any]:
        """Send a command and return the answer."""
        assert self.process.stdin is not None
        print(command, file=self.process.stdin, flush=True)
        return self.answer()

    def step_ms(self) -> float:
        """Make one optimiser step and return its milliseconds."""
        return float(self.ask("step")["ms"])


def interleave(
    actions: dict[str, Callable[[], Any]],
    repeats: int,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Return the median milliseconds of each action, taken in turns after one round of warm-up.

    An action that returns a float has timed itself.
    """
    times: dict[str, list[float]] = {name: [] for name in actions}
    for repeat in range(repeats + 1):
        for name, action in actions.items():
            synchronize(device)
            started = clock()
            own = action()
            synchronize(device)
            elapsed = own if isinstance(own, float) else (clock() - started) * 1e3
            if repeat:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    architecture: str
    precision: str
    dead: int = 0
    thin: bool = False
    """Codes brought to k active features per token."""
    impl: str = "sparse"

    @property
    def name(self) -> str:
        """What the table calls it."""
        extra = (f", {self.dead} dead" if self.dead else "") + (", at k" if self.thin else "")
        return f"saelab {self.architecture} {self.precision}{extra}" + (" triton" if self.impl == "triton" else "")


OPEN = ("relu", "jumprelu", "gated")
"""Architectures whose codes have no fixed size."""


def cases_of(args: argparse.Namespace) -> list[Case]:
    """Return the rows to time."""
    wanted = args.only.split(",") if args.only else [name for name, _ in ARCHITECTURES.items()]
    cases = []
    for name in wanted:
        for precision in ("f32", "bf16"):
            cases += [Case(name, precision)] + ([Case(name, precision, thin=True)] if name in OPEN else [])
    if "topk" in wanted:
        cases += [Case("topk", p, dead) for dead in (args.d_sae // 20, args.d_sae // 2) for p in ("f32", "bf16")]
    if args.device.startswith("cuda"):
        cases += [replace(case, impl="triton") for case in cases]
    return cases


def active_per_token(run: Run, batch: Batch) -> float:
    """Return how many entries a token has in the code that a step would use."""
    with torch.no_grad():
        code = run.sae.encode_training(run.sae.scale_batch(batch), run._context()).code
    return code.nnz / max(code.n_tokens, 1)


def gpu_peak_mb(run: Run, batch: Batch, dead: int) -> float:
    """Return the peak memory of one step beyond what is held before it."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(run, batch, dead)
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def peak_mb(args: argparse.Namespace, case: Case, run: Run, batch: Batch) -> float | None:
    """Return the memory column."""
    if args.no_memory:
        return None
    if args.device.startswith("cuda"):
        return gpu_peak_mb(run, batch, case.dead)
    shape = [args.n, args.d_in, args.d_sae, args.k]
    measured = measure_in_subprocess(*shape, case.architecture, case.precision, case.dead, int(case.thin))
    return float(measured["peak_extra_mb"])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("n", 2048), ("d-in", 512), ("d-sae", 8192), ("k", 32), ("repeats", 15), ("threads", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for the Triton twins beside the sparse ones")
    parser.add_argument("--only", help="architectures, separated by commas (all)")
    parser.add_argument("--no-memory", action="store_true", help="skip the memory column")
    parser.add_argument("--no-peers", action="store_true", help="leave the peers out")
    parser.add_argument("--cpu-time", action="store_true", help="time of this process instead of the clock's")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = False

    generator = torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(args.n, args.d_in, generator=generator).to(args.device) for _ in range(2))
    w = torch.randn(args.d_sae, args.d_in, generator=generator).to(args.device)
    x_half, w_half = x.bfloat16(), w.bfloat16()
    batch = Batch(x, gradient=gradient)
    buffer = torch.empty(args.n, args.d_sae, device=args.device)
    actions: dict[str, Callable[[], Any]] = {
        "gemm_f32": lambda: x @ w.T,
        "gemm_f32_saelab": lambda: product(x, w, out=buffer),
        "gemm_bf16": lambda: x_half @ w_half.T,
    }
    cases, runs, active = cases_of(args), {}, {}
    for case in cases:
        run = runs[case.name] = make_run(args, case.architecture, case.precision)
        if case.thin:
            thin_out(run, x, args.k)
        if case.impl == "triton":
            TritonRun(run)
        active[case.name] = active_per_token(run, batch)
        actions[case.name] = lambda run=run, dead=case.dead: step(run, batch, dead)  # type: ignore[misc]
    peers = (
        {}
        if args.no_peers or args.cpu_time or args.device != "cpu"
        else {name: Peer(name, args) for name in Peer.installed()}
    )
    for name, peer in peers.items():
        actions[name] = peer.step_ms
    clock = time.process_time if args.cpu_time else time.perf_counter
    times = interleave(actions, args.repeats, args.device, clock)

    flops = 2 * args.n * args.d_in * args.d_sae * 1e3
    best = {"f32": min(times["gemm_f32"], times["gemm_f32_saelab"]), "bf16": times["gemm_bf16"]}
    rates = Rates({p: flops / took for p, took in best.items()}, bandwidth(args.device))
    rows: list[dict[str, Any]] = []
    for case in cases:
        work = step_work(args.n, args.d_in, args.d_sae, active[case.name], case.precision, rates)
        rows.append(
            {
                "name": case.name,
                "architecture": case.architecture,
                "precision": case.precision,
                "median_ms": times[case.name],
                "ratio_to_gemm_f32": times[case.name] / times["gemm_f32"],
                "peak_extra_mb": peak_mb(args, case, runs[case.name], batch),
                "active_per_token": active[case.name],
                "gflop": work.flops / 1e9,
                "gbyte": work.bytes / 1e9,
                "floor_ms": work.floor_ms,
                "over_floor": times[case.name] / work.floor_ms,
            }
        )
    for name, peer in peers.items():
        rows.append(
            {
                "name": f"{name} {peer.about['version']} topk f32",
                "architecture": "topk",
                "precision": "f32",
                "median_ms": times[name],
                "ratio_to_gemm_f32": times[name] / times["gemm_f32"],
                "peak_extra_mb": None if args.no_memory else peer.ask("memory")["peak_extra_mb"],
            }
        )
        peer.process.stdin.close()  # type: ignore[union-attr]
        peer.process.wait()
    processor = torch.cuda.get_device_name() if args.device != "cpu" else platform.processor() or platform.machine()
    result = {
        "n": args.n,
        "d_in": args.d_in,
        "d_sae": args.d_sae,
        "k": args.k,
        "machine": {**info(args.device)["machine"], "processor": processor},
        "gemm_f32_ms": times["gemm_f32"],
        "gemm_f32_saelab_ms": times["gemm_f32_saelab"],
        "gemm_bf16_ms": times["gemm_bf16"],
        "bandwidth_gb_per_s": rates.bandwidth / 1e9,
        "rows": rows,
    }
    report(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def report(result: dict[str, Any]) -> None:
    """Print the table."""
    shape = ", ".join(f"{name} = {result[name]}" for name in ("n", "d_in", "d_sae", "k"))
    print(f"{shape}; {result['bandwidth_gb_per_s']:.0f} GB/s; {result['machine']}")
    columns = ("ratio", "median ms", "peak extra MB", "active", "GFLOP", "GB", "floor ms", "over floor")
    print(" " * 36 + "".join(f"{column:>14s}" for column in columns))
    for name in ("gemm_f32", "gemm_f32_saelab", "gemm_bf16"):
        print(f"{name:36s}{result[name + '_ms'] / result['gemm_f32_ms']:14.2f}{result[name + '_ms']:14.1f}")
    keys = ("ratio_to_gemm_f32", "median_ms", "peak_extra_mb", "active_per_token", "gflop", "gbyte", "floor_ms")
    for row in result["rows"]:
        cells = [(row.get(key), 2 if key in ("ratio_to_gemm_f32", "gbyte") else 0) for key in keys]
        cells[1] = (row["median_ms"], 1)
        cells.append((row.get("over_floor"), 2))
        print(f"{row['name']:36s}" + "".join(f"{'-' if v is None else format(v, f'.{p}f'):>14s}" for v, p in cells))


if __name__ == "__main__":
    main()
