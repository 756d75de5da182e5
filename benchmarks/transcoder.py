"""Transcoders beside SAEs of the same MLP: how much of the model's loss each keeps at equal k.

    python benchmarks/transcoder.py --work DIR
    python benchmarks/transcoder.py --docs docs/architectures.md

The claim to check is that a transcoder, which rebuilds an MLP's output from its *input*, keeps as much of the loss as
an SAE that sees the output (Dunefsky, Chlenski, Nanda 2024). Both are TopK with the same features, tokens and seeds;
the learning rate of each kind is the best of three by FVU on training text, with a seed that is not reported. Losses
are those of the model with the MLP's output replaced, on held-out text.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from jsonl import add_table_options, append_row, markdown, mean_spread, printed, read_rows

import saelab
from saelab.core.progress import set_progress

RESULTS = Path(__file__).parent / "results" / "transcoder.jsonl"
READS, WRITES = "blocks.2.ln2.hook_normalized", "blocks.2.hook_mlp_out"
KINDS: Mapping[str, dict[str, Any]] = {
    "SAE of the output": {"site": WRITES, "sae": {"architecture": "topk"}},
    "transcoder": {"site": READS, "target_site": WRITES, "sae": {"architecture": "transcoder"}},
    "skip transcoder": {"site": READS, "target_site": WRITES, "sae": {"architecture": "transcoder", "skip": True}},
}
KS, SEEDS, SWEEP_SEED, SWEEP_K = (8, 16, 32, 64), (0, 1, 2), 100, 32
LRS = (2e-3, 4e-3, 8e-3)
D_SAE, TOKENS, BATCH, STORED = 1024, 409_600, 1024, 400_000
SWEEP_TOKENS, TEST_TOKENS = 8_000, 20_000


def run(args: argparse.Namespace) -> None:
    """Train and measure what is missing."""
    store = args.work / "store"
    saelab.harvest("embedded", [READS, WRITES], max_tokens=STORED, out=store, resume=(store / "progress.json").exists())

    def measured(kind: str, k: int, seed: int, lr: float) -> dict[str, float]:
        keys = {**KINDS[kind], "sae": {**KINDS[kind]["sae"], "d_sae": D_SAE, "k": k}}
        training = {"tokens": TOKENS, "batch_size": BATCH, "lr": lr, "seed": seed, "device": "cpu"}
        place = args.work / f"{kind.replace(' ', '-')}-{k}-{seed}-{lr:g}"
        sae = saelab.train(store=store, out=place, training=training, force=True, **keys)
        sweep = seed == SWEEP_SEED
        text, tokens = ("stdlib:train", SWEEP_TOKENS) if sweep else ("stdlib:heldout", TEST_TOKENS)
        found = saelab.evaluate(sae, text=text, max_tokens=tokens)
        about = {"kind": kind, "k": k, "seed": seed, "lr": lr}
        scores = ("fvu", "ce_recovered", "ce_clean", "ce_sae", "ce_zero", "dead_fraction")
        row = {**about, **{name: float(getattr(found, name)) for name in scores}}
        append_row(args.results, row)
        print(row, flush=True)
        return row

    for kind in KINDS:
        rows = [row for row in read_rows(args.results) if row["kind"] == kind]
        tried = {row["lr"]: row["fvu"] for row in rows if row["seed"] == SWEEP_SEED}
        for lr in LRS:
            if lr not in tried:
                tried[lr] = measured(kind, SWEEP_K, SWEEP_SEED, lr)["fvu"]
        best = min(tried, key=tried.__getitem__)
        done = {(row["k"], row["seed"]) for row in rows}
        for seed in SEEDS:
            for k in KS:
                if (k, seed) not in done:
                    measured(kind, k, seed, best)


def tables(rows: list[dict[str, Any]]) -> str:
    """Return CE recovered, FVU and dead features of each kind at each k."""
    lines = []
    for kind in KINDS:
        cells = []
        for k in KS:
            here = [r for r in rows if r["kind"] == kind and r["k"] == k and r["seed"] != SWEEP_SEED]
            cells.append(
                f"{mean_spread(r['ce_recovered'] for r in here)}; {mean_spread((r['fvu'] for r in here), 2)}; "
                f"{mean_spread((r['dead_fraction'] for r in here), 0, percent=True)}"
            )
        rates = sorted({r["lr"] for r in rows if r["kind"] == kind and r["seed"] != SWEEP_SEED})
        lines.append([kind, *cells, "/".join(f"{lr:g}" for lr in rates)])
    losses = {(r["kind"], r["k"], r["seed"]): r["ce_sae"] for r in rows if r["seed"] != SWEEP_SEED}
    sae, *others = KINDS
    for kind in others:
        pairs = [[(losses.get((kind, k, s)), losses.get((sae, k, s))) for s in SEEDS] for k in KS]
        gaps = [mean_spread(a - b for a, b in at_k if a is not None and b is not None) for at_k in pairs]
        lines.append([f"{kind}: loss above that with the SAE, nats", *gaps, ""])
    return markdown(["CE recovered; FVU; dead, %", *(f"k {k}" for k in KS), "lr"], lines)


def main() -> None:
    """Run the benchmark, or print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for the store and the SAEs (1 GB)")
    parser.add_argument("--threads", type=int, default=1)
    add_table_options(parser, RESULTS)
    args = parser.parse_args()
    if printed(args, "transcoders", tables):
        return
    if args.work is None:
        parser.error("--work DIR is needed to run")
    torch.set_num_threads(args.threads)
    set_progress(False)
    run(args)


if __name__ == "__main__":
    main()
