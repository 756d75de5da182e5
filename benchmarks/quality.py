"""How good trained SAEs are: every architecture of saelab, and the peers on the same activations for the same tokens.

    benchmarks/peers/setup.sh                                                      once, for the peers
    python benchmarks/quality.py --work DIR [--data DIR] [--subjects embedded ...] [--lanes saelab peers]
    python benchmarks/quality.py --table [--docs docs/quality.md] [--plot docs/images/quality.svg]

Results go to ``benchmarks/results/quality.jsonl`` (``--results``), a line per SAE as it is done; a line that is there
is not made again, so an interrupted run goes on where it was. For each subject (see ``quality_subjects.py``) the
learning rate of each variant at each k is chosen by the FVU on validation text, with a seed of its own; then every
variant is trained at every L0 with 3 seeds and measured on held-out text. The lanes may run in two processes.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

import quality_report
from jsonl import append_row, put_section, read_rows
from quality_measure import HeldOut, by_gradient, measure, measure_as_trained
from quality_plan import BATCH, PEERS, SAELAB, SEEDS, SWEEP_SEED, Variant, best_rate, key_of, planned, sweep_next
from quality_subjects import SUBJECTS, Opened, Subject, open_subject
from safetensors.torch import save_file

from saelab.core.config import parse_config
from saelab.core.progress import set_progress
from saelab.sae import SAE, load_sae
from saelab.sae.allocation import AllocatedSAE
from saelab.sae.formats import import_sae
from saelab.sae.gradient import GradientSAE
from saelab.training import FitConfig, fit

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "quality.jsonl"
CE_ROWS = 64
"""Rows of text that the model runs on with each SAE spliced in."""


class Lane:
    """Trains and measures the variants of saelab or of the peers on one subject."""

    def __init__(self, variants: Sequence[Variant], opened: Opened, results: Path, work: Path, threads: int) -> None:
        self.variants, self.opened, self.results, self.work, self.threads = variants, opened, results, work, threads
        self.subject = opened.subject
        self.heldout = HeldOut(opened.model, opened.heldout, opened.heldout_rows, self.subject.site, CE_ROWS)
        if not any(row["stage"] == "subject" and row["subject"] == self.subject.name for row in read_rows(results)):
            about = {"train_tokens_distinct": opened.train.n_rows, "d_in": opened.train.d_in(self.subject.site)}
            row = {"stage": "subject", "subject": self.subject.name, "site": self.subject.site}
            append_row(results, {**row, "d_sae": self.subject.d_sae, **about, **self.heldout.about()})

    def run(self, seed: int) -> None:
        """Train every variant at every L0, after finding its learning rate if it has none yet."""
        name = self.subject.name
        for variant in self.variants:
            while pairs := sweep_next(variant, name, read_rows(self.results)):
                self.train(variant, "lr", SWEEP_SEED, pairs)
            done = read_rows(self.results)
            rates = {point: best_rate(variant, name, done, self.variants, point) for point in variant.points_on(name)}
            self.train(variant, "main", seed, list(rates.items()))

    def train(self, variant: Variant, stage: str, seed: int, pairs: Sequence[tuple[float, float]]) -> None:
        """Train and measure those of some (knob, learning rate) pairs that are not done yet."""
        common = {
            "stage": stage,
            "subject": self.subject.name,
            "package": variant.package,
            "name": variant.name,
            "seed": seed,
            "tokens": self.subject.tokens,
        }
        done = {key_of(row) for row in read_rows(self.results) if row["stage"] in ("lr", "main")}
        rows = [{**common, "point": point, "lr": lr} for point, lr in pairs]
        rows = [row for row in rows if key_of(row) not in done]
        if not rows:
            return
        out = self.work / f"{stage}-{variant.label.replace(' ', '-').replace(',', '')}-{seed}"
        make = self.saelab if variant.package == "saelab" else self.peer
        for row, sae, more in make(variant, seed, rows, out):
            final = stage == "main"
            measured = measure(sae, self.heldout, test=final, ce=final)
            if final and isinstance(sae, AllocatedSAE):
                measured |= measure_as_trained(sae, self.heldout, BATCH)
            if final and isinstance(sae, GradientSAE):
                seen = measure(sae, self.heldout, encode=by_gradient(sae))
                measured |= {f"{name}_by_gradient": value for name, value in seen.items()}
            append_row(self.results, {**row, "knob": variant.knob, "batch": BATCH, **measured, **more})
            print(f"{time.strftime('%H:%M:%S')} {row} fvu {measured['fvu']:.4f} l0 {measured['l0']:.1f}", flush=True)

    def saelab(
        self, variant: Variant, seed: int, rows: list[dict[str, Any]], out: Path
    ) -> Iterator[tuple[dict[str, Any], SAE, dict[str, Any]]]:
        """Train with saelab, on one pass over the data."""
        runs = []
        for row in rows:
            sae = {
                "architecture": variant.architecture,
                "d_in": self.opened.train.d_in(self.subject.site),
                "d_sae": self.subject.d_sae,
                variant.knob: row["point"],
                **variant.own_settings(),
            }
            training = {"tokens": row["tokens"], "batch_size": BATCH, "lr": row["lr"], "seed": seed, "device": "cpu"}
            name = f"{row['stage']}-{variant.knob}={row['point']}-lr={row['lr']}"
            runs.append(parse_config(FitConfig, {"name": name, "sae": sae, "training": training}))
        stream = self.opened.train.stream(self.subject.site, BATCH, seed, gradient=variant.architecture == "gradient")
        start = time.perf_counter()
        fitted = fit(runs, stream, out / time.strftime("%H%M%S"))
        seconds = (time.perf_counter() - start) / len(runs)
        for row, result in zip(rows, fitted, strict=True):
            metrics = {"train_fvu": result.metrics["fvu"], "dead_in_training": result.metrics["dead_fraction"]}
            yield row, load_sae(result.path), {"seconds": seconds, **metrics}

    def peer(
        self, variant: Variant, seed: int, rows: list[dict[str, Any]], out: Path
    ) -> Iterator[tuple[dict[str, Any], SAE, dict[str, Any]]]:
        """Train with a peer's own code, in its own interpreter."""
        python = ROOT / ".venv-peers" / variant.package / "bin" / "python"
        activations = self.work / "x.safetensors"
        if not activations.is_file():
            x = self.opened.train.read_rows(self.subject.site, torch.arange(self.opened.train.n_rows))
            save_file({"x": x.float()}, activations.with_suffix(".part"))
            activations.with_suffix(".part").rename(activations)
        jobs = [
            {
                "arch": variant.name,
                "k": int(row["point"]),
                "lr": row["lr"],
                "seed": seed,
                "tokens": row["tokens"],
                "out": str(out / f"{row['point']}-{row['lr']}"),
            }
            for row in rows
        ]
        out.mkdir(parents=True, exist_ok=True)
        (out / "jobs.json").write_text(json.dumps(jobs))
        options: dict[str, Any] = {
            "peer": variant.package,
            "activations": activations,
            "d-sae": self.subject.d_sae,
            "batch": BATCH,
            "threads": self.threads,
            "jobs": out / "jobs.json",
        }
        command = [str(python), "-W", "ignore", str(ROOT / "benchmarks/peers/train.py")]
        command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
        with (out / "log.txt").open("w") as log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdout is not None
        for row, line in zip(rows, process.stdout, strict=False):
            answer = json.loads(line)
            sae = import_sae(answer["checkpoint"])
            yield row, sae, {"seconds": answer["seconds"], "version": answer["version"]}
        if process.wait():
            raise SystemExit(f"{variant.label} failed; see {out / 'log.txt'}")


def installed(variants: Sequence[Variant]) -> list[Variant]:
    """Return the variants whose package can run here, and say which cannot."""
    here = []
    for variant in variants:
        if variant.package == "saelab" or (ROOT / ".venv-peers" / variant.package).is_dir():
            here.append(variant)
        else:
            print(f"{variant.label}: skipped, no environment (benchmarks/peers/setup.sh {variant.package})")
    return here


def run(args: argparse.Namespace) -> None:
    """Train and measure whatever is not in the results yet."""
    for name in args.subjects:
        subject: Subject = SUBJECTS[name]
        missing = subject.missing(args.data)
        if missing:
            print(f"{name}: skipped, {missing}")
            continue
        if args.tokens:
            subject = replace(subject, tokens=args.tokens)
        work = args.work / name
        opened = open_subject(subject, args.data, work)
        lanes = {"saelab": SAELAB, "peers": PEERS}
        planned_lanes = [installed(planned(lanes[lane], name)) for lane in args.lanes]
        opened_lanes = [Lane(lane, opened, args.results, work, args.threads) for lane in planned_lanes]
        for seed in args.seeds:
            for lane in opened_lanes:
                lane.run(seed)


def main() -> None:
    """Run the benchmark, or print what it found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for stores and SAEs (2 GB)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    data = os.environ.get("SAELAB_QUALITY_DATA")
    parser.add_argument("--data", type=Path, default=Path(data) if data else None)
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--lanes", nargs="+", choices=("saelab", "peers"), default=["saelab", "peers"])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--tokens", type=int, help="tokens per SAE, if not the subject's own number")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="print the tables of the results")
    parser.add_argument("--docs", type=Path, help="put the tables into this page")
    parser.add_argument("--plot", type=Path, help="draw FVU and CE recovered against L0 into this file")
    args = parser.parse_args()
    if args.table or args.docs or args.plot:
        rows = read_rows(args.results)
        if args.table:
            print(quality_report.tables(rows))
        if args.docs:
            put_section(args.docs, "quality", quality_report.tables(rows))
        if args.plot:
            quality_report.plot(rows, args.plot)
        return
    if args.work is None:
        parser.error("give --work, a folder for stores and SAEs")
    torch.set_num_threads(args.threads)
    set_progress(False)
    run(args)


if __name__ == "__main__":
    main()
