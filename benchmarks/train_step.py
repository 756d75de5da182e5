"""One optimiser step against the encoder's matrix product alone, interleaved in one process.

    python benchmarks/train_step.py [--json FILE] [--n 2048] [--d-in 512] [--d-sae 8192] [--k 32]

Prints a table; ``ratio`` is the median time of a step over the median time of ``x @ W_enc`` in float32. Timings of all
rows are taken in turns, so that a busy machine slows all alike. ``peak extra`` is the rise of the process's peak
memory over one step beyond parameters and optimiser state, taken in a fresh process (see ``memory.py``). Peers whose
environment is there (``benchmarks/peers/setup.sh``) run their own TopK step by their own code in their own process, in
turn with the rest; the milliseconds are those that they report.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from memory import measure_in_subprocess

from saelab.core.batch import Batch
from saelab.core.config import parse_config
from saelab.kernels import info
from saelab.sae import ARCHITECTURES, build_sae
from saelab.training import FitConfig
from saelab.training.metrics import BatchSpread
from saelab.training.run import Run


def make_run(args: argparse.Namespace, architecture: str, precision: str) -> Run:
    """Return a run in mid-training."""
    sae = {"architecture": architecture, "d_in": args.d_in, "d_sae": args.d_sae, "input_scale": 1.0}
    if "k" in ARCHITECTURES[architecture].config.model_fields:
        sae["k"] = args.k
    training = {"tokens": args.n * 10_000, "batch_size": args.n, "precision": precision, "device": "cpu"}
    config = parse_config(FitConfig, {"sae": sae, "training": training})
    run = Run(config, build_sae(config.sae), torch.device("cpu"))
    run.tokens = config.training.dead_after
    return run


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


def interleave(actions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the median milliseconds of each action, taken in turns after one round of warm-up.

    An action that returns a float has timed itself.
    """
    times: dict[str, list[float]] = {name: [] for name in actions}
    for repeat in range(repeats + 1):
        for name, action in actions.items():
            started = time.perf_counter()
            own = action()
            elapsed = own if isinstance(own, float) else (time.perf_counter() - started) * 1e3
            if repeat:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("n", 2048), ("d-in", 512), ("d-sae", 8192), ("k", 32), ("repeats", 15), ("threads", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--no-memory", action="store_true", help="skip the memory column")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(args.n, args.d_in, generator=generator)
    gradient = torch.randn(args.n, args.d_in, generator=generator)
    w = torch.randn(args.d_sae, args.d_in, generator=generator)
    x_half, w_half = x.bfloat16(), w.bfloat16()
    batch = Batch(x, gradient=gradient)

    cases = [(name, precision, 0) for name in ARCHITECTURES for precision in ("f32", "bf16")]
    cases += [("topk", "f32", args.d_sae // 20), ("topk", "f32", args.d_sae // 2)]
    actions: dict[str, Callable[[], Any]] = {"gemm_f32": lambda: x @ w.T, "gemm_bf16": lambda: x_half @ w_half.T}
    names = []
    for architecture, precision, dead in cases:
        run = make_run(args, architecture, precision)
        name = f"saelab {architecture} {precision}" + (f", {dead} dead" if dead else "")
        names.append(name)
        actions[name] = lambda run=run, dead=dead: step(run, batch, dead)  # type: ignore[misc]
    peers = {name: Peer(name, args) for name in Peer.installed()}
    for name, peer in peers.items():
        actions[name] = peer.step_ms
    times = interleave(actions, args.repeats)

    rows = []
    for name, (architecture, precision, dead) in zip(names, cases, strict=True):
        shape = [args.n, args.d_in, args.d_sae, args.k]
        peak = None if args.no_memory else measure_in_subprocess(*shape, architecture, precision, dead)["peak_extra_mb"]
        ratio = times[name] / times["gemm_f32"]
        rows.append(
            {
                "name": name,
                "architecture": architecture,
                "precision": precision,
                "median_ms": times[name],
                "ratio_to_gemm_f32": ratio,
                "peak_extra_mb": peak,
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
    result = {
        "n": args.n,
        "d_in": args.d_in,
        "d_sae": args.d_sae,
        "k": args.k,
        "machine": {**info()["machine"], "processor": platform.processor() or platform.machine()},
        "gemm_f32_ms": times["gemm_f32"],
        "gemm_bf16_ms": times["gemm_bf16"],
        "rows": rows,
    }
    print(f"N = {args.n}, d_in = {args.d_in}, d_sae = {args.d_sae}, k = {args.k}; {result['machine']}")
    print(f"{'':36s} {'ratio':>7s} {'median ms':>10s} {'peak extra MB':>14s}")
    for name in ("gemm_f32", "gemm_bf16"):
        print(f"{name:36s} {times[name] / times['gemm_f32']:7.2f} {times[name]:10.1f}")
    for row in rows:
        peak = "-" if row["peak_extra_mb"] is None else f"{row['peak_extra_mb']:.0f}"
        print(f"{row['name']:36s} {row['ratio_to_gemm_f32']:7.2f} {row['median_ms']:10.1f} {peak:>14s}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
