"""Sparse training compared: recipes at 80 %, 90 % and 2:4 on one small transformer, text and number of tokens.

    python benchmarks/sparse_training.py                        run what the results file does not have yet
    python benchmarks/sparse_training.py --rates 1.25e-3 2.5e-3 5e-3
                                                                the dense model at other learning rates
    python benchmarks/sparse_training.py --docs docs/sparse-training.md

The model is the embedded one's recipe made small (2 blocks, d_model 64, vocabulary 512, context 64) on the first part
of the same text. A seed is that of weights, data order and masks; the tokenizer is one for all. Runs are made seed by
seed, so that an interrupted benchmark has whole tables of fewer seeds.
"""

import argparse
import os
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.jsonl import add_table_options, append_row, markdown, mean_spread, printed, read_rows
from saelab.core.artifacts import read_json
from saelab.core.config import parse_config
from saelab.core.progress import set_progress
from saelab.models.text import open_text
from saelab.workflows.pretrain import PretrainJob, run_pretrain

RESULTS = Path(__file__).parent / "results" / "sparse_training.jsonl"
STEPS = 800
EVERY = 40  # steps between mask changes: 1 in 20 of the training
MODEL: dict[str, Any] = {
    "vocab_size": 512, "n_layers": 2, "d_model": 64, "n_heads": 4, "context": 64, "steps": STEPS, "batch_rows": 4,
    "micro_rows": 4, "lr": 2.5e-3, "warmup_steps": 100, "precision": "float32", "save_dtype": "float32",
    "eval_every": STEPS, "checkpoint_every": STEPS,
}  # fmt: skip
GROW = {"name": "drop-and-grow", "every": EVERY}
STATIC = {"score": "random", "allocation": "erk"}
UNSTRUCTURED: dict[str, dict[str, Any]] = {
    "random, ERK": STATIC,
    "SNIP": {"score": "sensitivity", "allocation": "global"},
    "one shot at 25 %": {"allocation": "global", "schedule": {"name": "once", "at": 0.25}},
    "gradual, 25 to 75 %": {"schedule": {"name": "cubic", "every": EVERY}},
    "SET": {**STATIC, "schedule": {**GROW, "grow": "random", "anneal": "constant"}},
    "RigL": {**STATIC, "schedule": {**GROW, "grow": "gradient"}},
    "sparse momentum": {**STATIC, "schedule": {**GROW, "grow": "momentum", "share": True}},
    "exploration": {**STATIC, "schedule": {**GROW, "grow": "explore"}},
    "SR-STE, per layer": {"schedule": {"name": "refresh", "every": 5}, "gradient": {"name": "sr-ste"}},
    "LOBSTER": {"allocation": "global", "schedule": {"name": "cubic", "every": EVERY}, "penalty": {"name": "lobster"}},
    "GSM": {"allocation": "global", "schedule": {"name": "once", "at": 0.75}, "penalty": {"name": "gsm"}},
    "PST": {"pattern": "row", "gradient": {"name": "pst"}},
    "SPDF, dense at the end": {**STATIC, "schedule": {"name": "release"}},
}
MLP = {"pattern": "neuron", "sparsity": 0.5, "include": ["*mlp.c_fc"], "schedule": {"name": "once", "at": 0.75}}
NEURONS: dict[str, dict[str, Any]] = {
    "magnitude": MLP,
    "WGSEF": {**MLP, "penalty": {"name": "wgsef"}},
    "MaskSparsity": {**MLP, "penalty": {"name": "mask-sparsity"}},
}
TICKET = {"allocation": "global", "cycles": {"rounds": 3, "rewind": 0.05}}
SOUP = {"allocation": "global", "cycles": {"rounds": 2, "rewind": None, "copies": 3, "decay_factor": 3}}
ALONE = {"allocation": "global", "cycles": {"rounds": 2, "rewind": None}}
REFRESH = {"name": "refresh"}
NM: dict[str, dict[str, Any]] = {
    "random": {"score": "random"},
    "one shot at 25 %": {"schedule": {"name": "once", "at": 0.25}},
    "STE": {"schedule": REFRESH, "gradient": {"name": "ste"}},
    "SR-STE": {"schedule": REFRESH, "gradient": {"name": "sr-ste"}},
    "S-STE": {"schedule": REFRESH, "gradient": {"name": "soft"}},
    "MdGf": {"schedule": REFRESH, "gradient": {"name": "decayed"}},
    "SdGf": {"schedule": {"name": "decay-pattern"}, "gradient": {"name": "ste"}},
    "BDWP": {"schedule": REFRESH, "gradient": {"name": "bdwp"}},
}
RATES = "learning rate"
TARGETS = ("80 %", "90 %", "2:4", "half of the MLP neurons", "as learned")


def plan() -> Iterator[tuple[str, str, dict[str, Any] | None]]:
    """Yield (target, recipe's name, recipe); the dense control first."""
    yield "0 %", "dense", None
    for name, recipe in NM.items():
        yield "2:4", name, {**recipe, "pattern": "2:4"}
    for target, sparsity in (("90 %", 0.9), ("80 %", 0.8)):
        for name, recipe in UNSTRUCTURED.items():
            yield target, name, {**recipe, "sparsity": sparsity}
    for name, recipe in NEURONS.items():
        yield "half of the MLP neurons", name, recipe
    yield "as learned", "AutoSparse", {"gradient": {"name": "autosparse"}}
    yield "90 %", "lottery ticket (IMP)", {**TICKET, "sparsity": 0.9}
    yield "90 %", "retrained, one model", {**ALONE, "sparsity": 0.9}
    yield "90 %", "soup of 3", {**SOUP, "sparsity": 0.9}


def texts(folder: Path, train: int = 600_000, heldout: int = 60_000) -> dict[str, str]:
    """Write the first part of the embedded model's texts to files."""
    found = {}
    for part, size in (("train", train), ("heldout", heldout)):
        path, written = folder / f"{part}.txt", 0
        found[part] = str(path)
        if path.exists():
            continue
        with path.open("w", encoding="utf-8") as file:
            for document in open_text(f"stdlib:{part}"):
                written += file.write(document + "\n")
                if written >= size:
                    break
    return found


def trained(
    folder: Path, data: dict[str, Any], seed: int, recipe: dict[str, Any] | None, dense: Path
) -> dict[str, Any]:
    """Train once and return what is reported."""
    job = {**data, "seed": seed}
    if recipe is not None:
        job |= {"sparsity": {**recipe, "seed": seed}, "dense": str(dense)}
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = dense.parent / "tokenizer.json"
    if tokenizer.exists():
        for place in (folder, folder / "rounds" / "0") if recipe and "cycles" in recipe else (folder,):
            place.mkdir(parents=True, exist_ok=True)
            (place / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    result = run_pretrain(parse_config(PretrainJob, job), folder, resume=True)
    if not tokenizer.exists():
        tokenizer.write_bytes((folder / "tokenizer.json").read_bytes())
    row = {"loss": result.heldout.loss, "seconds": result.training["seconds"], "trainings": 1}
    if recipe is None:
        return row
    report = read_json(folder / "sparsity.json")
    row |= {"sparsity": report["sparsity"], "kl": report["cost"]["kl"], "trainings": report.get("trainings", 1)}
    row["density"] = report.get("average_density")
    if "history" in report:
        row["sad"] = statistics.fmean(line["sad"] for line in report["history"][-10:])
    if report.get("control_loss") is not None:
        row["control"] = report["control_loss"]
    if "rounds" in report:
        row["copies"] = report["rounds"][-1]["heldout_loss"]
    return row


def run_rates(args: argparse.Namespace) -> None:
    """Train the dense model of the first seed at each learning rate."""
    set_progress(False)
    with tempfile.TemporaryDirectory() as temporary:
        data = MODEL | texts(Path(temporary))
        for rate in args.rates:
            place = Path(temporary) / f"{rate:g}" / "model"
            row = trained(place, {**data, "lr": rate}, args.seeds[0], None, place)
            append_row(args.results, {"target": RATES, "recipe": f"{rate:g}", "seed": args.seeds[0], **row})
            print(f"learning rate {rate:g}: loss {row['loss']:.4f}, {row['seconds']:.1f} s", flush=True)


def run(args: argparse.Namespace) -> None:
    """Make what is missing."""
    done = {(r["target"], r["recipe"], r["seed"]) for r in read_rows(args.results)}
    set_progress(False)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        data = MODEL | texts(folder)
        for seed in args.seeds:
            dense = folder / f"dense-{seed}"
            for number, (target, name, recipe) in enumerate(plan()):
                wanted = (not args.only or name in args.only) and (not args.targets or target in args.targets)
                missing = wanted and (target, name, seed) not in done
                if not missing and name != "dense":
                    continue
                place = dense if recipe is None else folder / f"{seed}-{number}"
                row = trained(place, data, seed, recipe, dense)
                if missing:
                    append_row(args.results, {"target": target, "recipe": name, "seed": seed, **row})
                print(f"{target} {name} seed {seed}: loss {row['loss']:.4f}, {row['seconds']:.1f} s", flush=True)


def tables(rows: list[dict[str, Any]]) -> str:
    """Return one table per target, sorted by loss."""
    dense = [r for r in rows if r["recipe"] == "dense"]
    rates = {r["recipe"]: f"{r['loss']:.3f}" for r in rows if r["target"] == RATES}
    seeds = sorted({r["seed"] for r in rows if r["target"] != RATES})
    tokens = STEPS * MODEL["batch_rows"] * MODEL["context"]
    control = mean_spread(r["loss"] for r in dense)
    parts = [
        f"Held-out loss in nats per token, mean ± standard deviation over {len(seeds)} seeds; dense: {control}. One "
        f"training is {STEPS} steps, {tokens:,} tokens. *density* is the mean over the steps of the share of weights "
        "in use, *zeros* what the saved weights hold, *KL* that to the dense model of the same seed."
    ]
    if rates:
        found_rates = ", ".join(f"{loss} at {rate}" for rate, loss in rates.items())
        parts.append(f"Learning rate {MODEL['lr']:g} for all recipes; the dense model of one seed: {found_rates}.")
    for target in TARGETS:
        found: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            if row["target"] == target:
                found.setdefault(row["recipe"], []).append(row)
        if not found:
            continue
        lines = []
        for name, group in sorted(found.items(), key=lambda item: statistics.fmean(r["loss"] for r in item[1])):
            densities = [r["density"] for r in group if r.get("density") is not None]
            above = [r["loss"] - d["loss"] for r in group for d in dense if d["seed"] == r["seed"]]
            lines.append(
                [
                    name if len(group) == len(seeds) else f"{name} ({len(group)} seeds)",
                    mean_spread(r["loss"] for r in group),
                    mean_spread(above),
                    mean_spread(r["kl"] for r in group),
                    mean_spread((r["sparsity"] for r in group), 1, percent=True),
                    mean_spread(densities, 2) if densities else "-",
                    mean_spread((r["sad"] for r in group if "sad" in r), 2, percent=True),
                    str(group[0]["trainings"]),
                ]
            )
        header = ["recipe", "loss", "above dense", "KL", "zeros, %", "density", "SAD at the end, %", "trainings"]
        parts.append(f"**{target}**\n\n{markdown(header, lines)}")
    return "\n\n".join(parts + beside(rows))


def beside(rows: list[dict[str, Any]]) -> list[str]:
    """Say what the controls of lottery tickets and soups gave."""
    said = []
    for target in TARGETS:
        tickets = [r for r in rows if r["target"] == target and "control" in r]
        if tickets:
            gain = mean_spread(r["control"] - r["loss"] for r in tickets)
            said.append(f"Lottery tickets at {target}: the same mask from other random weights is {gain} nats worse.")
    soups = [r for r in rows if r["recipe"].startswith("soup")]
    if soups:
        gain = mean_spread(statistics.fmean(r["copies"]) - r["loss"] for r in soups)
        said.append(f"Soup: the average is {gain} nats better than the mean of the copies it is made of.")
    return said


def main() -> None:
    """Measure, or print the tables of what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="names of recipes to run")
    parser.add_argument("--targets", nargs="+", help="targets to run, such as 2:4")
    parser.add_argument("--work", type=Path, help="folder that keeps the models; a run that was stopped goes on there")
    parser.add_argument("--rates", type=float, nargs="+", help="learning rates to train the dense model at")
    add_table_options(parser, RESULTS)
    args = parser.parse_args()
    if not printed(args, "sparse training", tables):
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        (run_rates if args.rates else run)(args)


if __name__ == "__main__":
    main()
