"""Real peers' checkpoints against saelab, both directions: largest differences of activations and reconstructions.

    benchmarks/peers/setup.sh                     once
    python benchmarks/interop.py [--json FILE]

In: each peer makes a small checkpoint of every kind it can save and evaluates it; saelab imports and evaluates it.
Out: saelab exports an SAE of every kind, with an input scale other than 1; the peer loads and evaluates it.
Differences are relative to the largest value. Exits with 1 when one exceeds 1e-5.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from saelab.core.errors import FormatError
from saelab.sae.formats import FORMATS, Portable, export_sae, read_checkpoint
from saelab.sae.registry import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("saelens", "sparsify", "dictionary_learning")
TOLERANCE = 1e-5
D_IN, D_SAE, K, TOKENS, SCALE = 32, 64, 8, 256, 0.37


@dataclass
class Row:
    """One line of the table."""

    direction: str
    peer: str
    checkpoint: str
    architecture: str
    acts: float | None = None
    recon: float | None = None
    l0: float | None = None
    note: str = ""

    @property
    def failed(self) -> bool:
        """Whether a difference is too large."""
        return max(self.acts or 0.0, self.recon or 0.0) > TOLERANCE


@dataclass
class Peer:
    """A peer's environment."""

    name: str
    version: str = ""
    archs: list[str] = field(default_factory=list)

    def run(self, *arguments: str) -> list[dict[str, Any]]:
        """Run ``checkpoint.py`` and return its answers."""
        python = ROOT / ".venv-peers" / self.name / "bin" / "python"
        command = [str(python), "-W", "ignore", str(ROOT / "benchmarks/peers/checkpoint.py"), "--peer", self.name]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{self.name}: {done.stderr.strip().splitlines()[-1]}")
        return [json.loads(line) for line in done.stdout.splitlines()]


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the rows here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        x = activations()
        save_file({"x": x}, Path(folder) / "x.safetensors")
        for name in PEERS:
            if not (ROOT / ".venv-peers" / name).is_dir():
                print(f"{name}: no environment, run benchmarks/peers/setup.sh {name}", file=sys.stderr)
                continue
            about = Peer(name).run("--list")[0]
            peer = Peer(name, about["version"], about["archs"])
            rows += imports(peer, Path(folder), x) + exports(peer, Path(folder), x)
    table(rows)
    if options.json:
        Path(options.json).write_text(json.dumps([{**vars(row), "failed": row.failed} for row in rows], indent=1))
    return int(any(row.failed for row in rows))


def activations() -> Tensor:
    """Return sparse combinations of random directions plus a mean, far from unit scale."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(2 * D_IN, D_IN, generator=generator)
    code = torch.rand(TOKENS, 2 * D_IN, generator=generator) * (torch.rand(TOKENS, 2 * D_IN, generator=generator) < 0.1)
    return 3 * code @ directions + torch.randn(D_IN, generator=generator)


def imports(peer: Peer, folder: Path, x: Tensor) -> list[Row]:
    """Import what the peer makes."""
    jobs = [
        {
            "arch": arch,
            "out": str(folder / f"{peer.name}-in-{i}"),
            "x": str(folder / "x.safetensors"),
            "y": str(folder / f"{peer.name}-in-{i}.safetensors"),
            "d_sae": D_SAE,
            "k": K,
        }
        for i, arch in enumerate(peer.archs)
    ]
    rows = []
    for answer in run_jobs(peer, jobs, folder):
        row = Row("in", f"{peer.name} {peer.version}", answer["arch"], "")
        if not answer["ok"]:
            row.note = f"the peer failed: {answer['error']}"
        else:
            measure(row, Path(answer["checkpoint"]), load_file(answer["y"]), x)
        rows.append(row)
    return rows


def measure(row: Row, checkpoint: Path, theirs: dict[str, Tensor], x: Tensor) -> None:
    """Import a checkpoint and compare."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            portable = read_checkpoint(checkpoint)
        row.architecture = portable.architecture
        row.note = "warned" if caught else ""
        compare(row, *evaluate(portable, x, row), theirs["acts"], theirs["recon"])
    except FormatError as error:
        row.note = f"refused: {str(error).split(': ', 1)[-1]}"


def evaluate(portable: Portable, x: Tensor, row: Row) -> tuple[Tensor, Tensor]:
    """Return activations and reconstructions of the SAE, or of the file where its architecture is not there."""
    if portable.architecture not in ARCHITECTURES:
        row.note = (row.note + " by formula, architecture not registered").strip()
        return portable.dense(x)
    sae = portable.to_sae()
    return sae.encode(x).to_dense(), sae(x)


def compare(row: Row, acts: Tensor, recon: Tensor, their_acts: Tensor, their_recon: Tensor) -> None:
    """Fill in the differences."""
    row.acts = float((acts - their_acts).abs().max() / their_acts.abs().max())
    row.recon = float((recon - their_recon).abs().max() / their_recon.abs().max())
    row.l0 = float((their_acts > 0).sum(1).float().mean())


def exports(peer: Peer, folder: Path, x: Tensor) -> list[Row]:
    """Export an SAE of each kind and have the peer evaluate it."""
    rows, jobs, ours = [], [], []
    for i, portable in enumerate(samples(x)):
        row = Row("out", f"{peer.name} {peer.version}", f"from {portable.architecture}", portable.architecture)
        rows.append(row)
        out = folder / f"{peer.name}-out-{i}"
        try:
            if portable.architecture in ARCHITECTURES:
                export_sae(portable.to_sae(), out, peer.name)
            else:
                write = FORMATS[peer.name].write
                assert write is not None
                write(portable, out)
        except FormatError as error:
            row.note = f"refused: {error}"
            continue
        y = str(folder / f"{peer.name}-out-{i}.safetensors")
        jobs.append({"arch": row.checkpoint, "load": str(out), "x": str(folder / "x.safetensors"), "y": y})
        ours.append((row, portable))
    for (row, portable), answer in zip(ours, run_jobs(peer, jobs, folder), strict=True):
        if not answer["ok"]:
            row.note = f"the peer failed: {answer['error']}"
            row.acts = float("inf")
            continue
        acts, recon = evaluate(portable, x, row)
        theirs = load_file(answer["y"])
        unit = 1.0 if peer.name == "saelens" else SCALE  # the others keep decoder rows and scale activations
        compare(row, acts, recon, theirs["acts"] * unit, theirs["recon"])
    return rows


def samples(x: Tensor) -> list[Portable]:
    """Return a dictionary of each kind, with random weights and an input scale."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    common: dict[str, Any] = {
        "W_enc": normal(D_IN, D_SAE) / D_IN**0.5,
        "b_enc": normal(D_SAE) * 0.2,
        "W_dec": torch.nn.functional.normalize(normal(D_SAE, D_IN), dim=1),
        "b_dec": x.mean(0) * SCALE,
        "input_scale": SCALE,
    }
    threshold = normal(D_SAE).abs() * 0.3
    return [
        Portable("topk", k=K, **common),
        Portable("jumprelu", threshold=torch.full((D_SAE,), 0.6), k=K, **common),
        Portable("jumprelu", threshold=torch.full((D_SAE,), 0.6), k=K, prefixes=(D_SAE // 4, D_SAE), **common),
        Portable("jumprelu", threshold=threshold, **common),
        Portable("relu", **common),
        Portable("gated", b_mag=normal(D_SAE) * 0.2, r_mag=normal(D_SAE) * 0.3, **common),
        Portable("topk", k=K, W_skip=normal(D_IN, D_IN) * 0.1, transcoder=True, **{**common, "centered": False}),
    ]


def run_jobs(peer: Peer, jobs: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Run jobs in one process of the peer."""
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    return peer.run("--jobs", str(file)) if jobs else []


def table(rows: list[Row]) -> None:
    """Print the rows as a Markdown table."""

    def number(value: float | None, pattern: str) -> str:
        return "" if value is None else pattern.format(value)

    print("| | peer | checkpoint | saelab architecture | activations | reconstructions | L0 | |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [row.direction, row.peer, row.checkpoint, row.architecture]
        cells += [number(row.acts, "{:.0e}"), number(row.recon, "{:.0e}"), number(row.l0, "{:.1f}")]
        print(f"| {' | '.join(cells)} | {row.note}{' **too far**' if row.failed else ''} |")


if __name__ == "__main__":
    sys.exit(main())
