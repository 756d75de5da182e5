"""Planted truth: how many known features each architecture finds again.

    python benchmarks/recovery.py [--results FILE] [--fixtures superpos zipf hier] [--seeds 0 1 2]
    python benchmarks/recovery.py --table

Trains every architecture that needs nothing but activations (and, for the gradient SAE, the gradient of a made-up loss)
on the fixtures of ``saelab.analysis.synthetic``, with as many features as are planted and as many active as are
planted, and matches decoder rows with planted features. Learning rate and sparsity coefficient are chosen with a seed
of their own, by the FVU (coefficients: by the nearest L0), not by the recovery. A line of the results file that is
there is not made again.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from jsonl import add_table_options, append_row, markdown, mean_spread, printed, read_rows

from saelab.analysis.synthetic import Planted, PlantedStream, hier, recovery, superpos, zipf
from saelab.core.config import parse_config
from saelab.core.progress import set_progress
from saelab.sae import load_sae
from saelab.training import FitConfig, fit

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "recovery.jsonl"
FIXTURES: dict[str, Callable[..., Planted]] = {"superpos": superpos, "zipf": zipf, "hier": hier}
TOKENS, TEST_TOKENS, BATCH, STEPS = 40_960, 8_192, 512, 1000
SWEEP_SEED = 100
LRS = (3e-3, 1e-2)
COEFFICIENTS = (1.0, 2.0, 4.0, 8.0)
VARIANTS: dict[str, dict[str, Any]] = {
    "topk": {"architecture": "topk"},
    "mutual_choice": {"architecture": "mutual_choice"},
    "mutual_choice, aux_zipf": {"architecture": "mutual_choice", "aux": "zipf"},
    "feature_choice": {"architecture": "feature_choice"},
    "feature_choice, uniform": {"architecture": "feature_choice", "quotas": "uniform"},
    "feature_choice, aux_zipf": {"architecture": "feature_choice", "aux": "zipf"},
    "gradient": {"architecture": "gradient"},
    "relu": {"architecture": "relu"},
    "gated": {"architecture": "gated"},
    "jumprelu": {"architecture": "jumprelu"},
    "matryoshka": {"architecture": "matryoshka"},
}
BY_COEFFICIENT = ("relu", "gated")


def settings(variant: str, planted: Planted) -> dict[str, Any]:
    """Return the SAE's settings: the planted sizes and the planted L0."""
    active = float((planted.codes > 0).sum(1).double().mean())
    knob: dict[str, Any] = {"k": round(active)}
    if variant == "jumprelu":
        knob = {"target_l0": active}
    elif variant in BY_COEFFICIENT:
        knob = {}
    return {"d_in": planted.x.shape[1], "d_sae": len(planted.features), **knob, **VARIANTS[variant]}


def train(
    variant: str, train_on: Planted, test_on: Planted, seed: int, choices: Iterable[Mapping[str, float]]
) -> list[dict[str, Any]]:
    """Train an SAE for each choice of learning rate and coefficient, on one pass, and measure them."""
    chosen = [dict(choice) for choice in choices]
    runs = []
    for number, choice in enumerate(chosen):
        extra = {key: value for key, value in choice.items() if key != "lr"}
        training = {"tokens": STEPS * BATCH, "batch_size": BATCH, "lr": choice["lr"], "seed": seed, "device": "cpu"}
        sae = {**settings(variant, train_on), **extra}
        runs.append(parse_config(FitConfig, {"name": f"run{number}", "sae": sae, "training": training}))
    stream = PlantedStream(train_on, BATCH, seed, gradients=variant == "gradient")
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for choice, result in zip(chosen, fit(runs, stream, Path(folder) / "fit"), strict=True):
            fitted = load_sae(result.path)
            with torch.no_grad():
                code = fitted.encode(test_on.x.float())
                error = (test_on.x - fitted.decode(code)).square().sum()
            spread = (test_on.x - test_on.x.mean(0)).square().sum()
            measured = {"fvu": float(error / spread), "l0": float(code.l0().double().mean())}
            found.append({**choice, **measured, **recovery(fitted.W_dec, train_on.features).to_dict()})
    return found


def choices_of(variant: str) -> list[dict[str, float]]:
    """Return what the sweep tries."""
    if variant in BY_COEFFICIENT:
        return [{"lr": lr, "sparsity": value} for lr in LRS for value in COEFFICIENTS]
    return [{"lr": lr} for lr in LRS]


def choose(variant: str, tried: list[dict[str, Any]], planted_l0: float) -> dict[str, float]:
    """Return the choice with the least FVU; coefficients first go by the L0 that is nearest to the planted one."""
    best = tried
    if variant in BY_COEFFICIENT:
        per_rate = [[row for row in tried if row["lr"] == lr] for lr in LRS]
        best = [min(rows, key=lambda row: abs(row["l0"] - planted_l0)) for rows in per_rate]
    winner = min(best, key=lambda row: row["fvu"])
    return {key: winner[key] for key in ("lr", "sparsity") if key in winner}


def run(args: argparse.Namespace) -> None:
    """Train what is not in the results yet."""
    for fixture in args.fixtures:
        train_on = FIXTURES[fixture](tokens=TOKENS, seed=1)
        test_on = FIXTURES[fixture](tokens=TEST_TOKENS, seed=2)
        planted_l0 = float((train_on.codes > 0).sum(1).double().mean())
        for variant in VARIANTS:
            rows = [r for r in read_rows(args.results) if (r["fixture"], r["variant"]) == (fixture, variant)]
            common = {"fixture": fixture, "variant": variant, "planted_l0": planted_l0}
            tried = [row for row in rows if row["seed"] == SWEEP_SEED]
            if not tried:
                tried = train(variant, train_on, test_on, SWEEP_SEED, choices_of(variant))
                for row in tried:
                    append_row(args.results, {**common, "seed": SWEEP_SEED, **row})
            for seed in args.seeds:
                if any(row["seed"] == seed for row in rows):
                    continue
                (row,) = train(variant, train_on, test_on, seed, [choose(variant, tried, planted_l0)])
                append_row(args.results, {**common, "seed": seed, **row})
                print(fixture, variant, seed, {k: round(v, 3) for k, v in row.items()}, flush=True)
        row = {"fixture": fixture, "variant": "random rows", "planted_l0": planted_l0}
        done = {(r["fixture"], r["variant"], r["seed"]) for r in read_rows(args.results)}
        for seed in args.seeds:
            if (fixture, "random rows", seed) not in done:
                chance = torch.randn(train_on.features.shape, generator=torch.Generator().manual_seed(seed))
                append_row(args.results, {**row, "seed": seed, **recovery(chance, train_on.features).to_dict()})


def tables(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table for each fixture."""
    parts = []
    for fixture in FIXTURES:
        mine = [row for row in rows if row["fixture"] == fixture and row["seed"] != SWEEP_SEED]
        if not mine:
            continue
        lines = []
        for variant in (*VARIANTS, "random rows"):
            runs = [row for row in mine if row["variant"] == variant]
            if not runs:
                continue
            cells = [
                mean_spread([r["recovered"] for r in runs], 1, percent=True),
                *(mean_spread([r[key] for r in runs]) for key in ("matched", "mmcs", "mmcs_back")),
                *(mean_spread([r.get(key, float("nan")) for r in runs]) for key in ("fvu", "l0")),
            ]
            lines.append([variant, *cells])
        header = ["", "recovered %", "matched cosine", "MMCS", "MMCS back", "FVU", "L0"]
        l0 = mine[0]["planted_l0"]
        seeds = len({row["seed"] for row in mine})
        parts.append(f"**{fixture}** (planted L0 {l0:.2f}, {mine[0]['n_planted']} features, {seeds} seeds)\n\n")
        parts[-1] += markdown(header, lines)
    return "\n\n".join(parts)


def main() -> None:
    """Run the benchmark, or print what it found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_table_options(parser, RESULTS)
    parser.add_argument("--fixtures", nargs="+", choices=FIXTURES, default=list(FIXTURES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if printed(args, "recovery", tables):
        return
    torch.set_num_threads(args.threads)
    set_progress(False)
    run(args)


if __name__ == "__main__":
    main()
