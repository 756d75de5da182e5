"""Which architectures absorb a planted parent: ``saelab eval --full``'s planted hierarchy, over seeds.

    python benchmarks/absorption.py [--seeds 0 1 2 3 4]
    python benchmarks/absorption.py --docs docs/saebench.md

The claim to check is that Matryoshka SAEs absorb less than BatchTopK (Bussmann et al. 2025). A result that is in
``benchmarks/results/absorption.jsonl`` is not made again.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from jsonl import add_table_options, append_row, markdown, mean_spread, printed, read_rows

from saelab.analysis.saebench.hierarchy import ACTIVE, CHILDREN, PARENTS, WIDTH, planted_absorption
from saelab.core.progress import set_progress
from saelab.sae.registry import ARCHITECTURES

RESULTS = Path(__file__).parent / "results" / "absorption.jsonl"
NAMES = ("topk", "mutual_choice", "matryoshka", "feature_choice")
SCORES = {
    "mean_absorption_fraction_score": "absorption fraction",
    "mean_full_absorption_score": "full absorption",
    "main_features_f1": "F1 of the parents' features",
}


def run(args: argparse.Namespace) -> None:
    """Train and score what is missing."""
    done = {(row["architecture"], row["seed"]) for row in read_rows(args.results)}
    for seed in args.seeds:
        for name in NAMES:
            if (name, seed) in done:
                continue
            sizes = {"d_in": WIDTH, "d_sae": PARENTS * (1 + CHILDREN)}
            result = planted_absorption(ARCHITECTURES[name].config(**sizes, k=ACTIVE), seed=seed)
            row: dict[str, Any] = {"architecture": name, "seed": seed}
            row |= {key: result.value(key) for key in SCORES}
            row |= {f"untrained_{key}": result.value(key, "untrained") for key in SCORES}
            append_row(args.results, row)
            print(row, flush=True)


def tables(rows: list[dict[str, Any]]) -> str:
    """Return one line per architecture."""
    lines = []
    for name in NAMES:
        of_name = [row for row in rows if row["architecture"] == name]
        lines.append([name, *(mean_spread(row[key] for row in of_name) for key in SCORES), str(len(of_name))])
    control = [mean_spread(row[f"untrained_{key}"] for row in rows) for key in SCORES]
    lines.append(["untrained dictionaries", *control, str(len(rows))])
    return markdown(["architecture", *SCORES.values(), "seeds"], lines)


def main() -> None:
    """Run the benchmark, or print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--threads", type=int, default=1)
    add_table_options(parser, RESULTS)
    args = parser.parse_args()
    if printed(args, "absorption", tables):
        return
    torch.set_num_threads(args.threads)
    set_progress(False)
    run(args)


if __name__ == "__main__":
    main()
