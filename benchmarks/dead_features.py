"""What leaves features dead in a short training: rates and warm-ups crossed; AuxK and Adam by themselves.

    python benchmarks/dead_features.py --work DIR [--k 64]          (DIR as of quality.py)

Trains TopK and Mutual-Choice SAEs on the embedded model's stored activations as ``quality.py`` does, with a seed that
it does not report, and prints FVU and dead features on validation text.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from jsonl import markdown
from quality_measure import HeldOut, measure
from quality_plan import BATCH, SWEEP_SEED
from quality_subjects import SUBJECTS, open_subject

from saelab.core.config import parse_config
from saelab.core.progress import set_progress
from saelab.sae import load_sae
from saelab.training import FitConfig, fit

PLAIN = {"k_warmup": 0.0, "lr_warmup": 0.05}
CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    *(
        (name, {"lr": lr, "k_warmup": k_warmup, "lr_warmup": lr_warmup})
        for name in ("topk", "mutual_choice")
        for lr in (8e-3, 1.2e-2, 1.6e-2)
        for k_warmup, lr_warmup in ((0.0, 0.05), (0.0, 0.1), (0.1, 0.05), (0.1, 0.1), (0.2, 0.1))
    ),
    ("topk", {"lr": 1.6e-2, **PLAIN, "beta2": 0.99}),
    ("topk", {"lr": 1.6e-2, **PLAIN, "dead_after_tokens": 5000}),
    ("topk", {"lr": 1.6e-2, **PLAIN, "aux_k": 8}),
    ("topk", {"lr": 1.6e-2, **PLAIN, "aux_k": 8, "aux_coefficient": 0.25}),
)
"""Architecture, and settings of the training that differ from ``quality.py``'s."""


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for stores, as of quality.py")
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    set_progress(False)
    opened = open_subject(SUBJECTS["embedded"], None, args.work / "embedded")
    subject = opened.subject
    heldout = HeldOut(opened.model, opened.heldout, opened.heldout_rows, subject.site, ce_rows=16)
    sizes = {"d_in": opened.train.d_in(subject.site), "d_sae": subject.d_sae, "k": args.k}
    common = {"tokens": subject.tokens, "batch_size": BATCH, "seed": SWEEP_SEED, "device": "cpu"}
    runs = []
    for number, (name, training) in enumerate(CASES):
        config = {"name": f"case{number}", "sae": {"architecture": name, **sizes}, "training": {**common, **training}}
        runs.append(parse_config(FitConfig, config))
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        fitted = fit(runs, opened.train.stream(subject.site, BATCH, SWEEP_SEED), Path(folder) / "fit")
        for (name, training), result in zip(CASES, fitted, strict=True):
            found = measure(load_sae(result.path), heldout, test=False, ce=False)
            settings = ", ".join(f"{key} {value:g}" for key, value in training.items())
            cells = [f"{found['fvu']:.4f}", f"{found['l0']:.1f}", f"{found['dead']:.1%}", f"{found['underused']:.1%}"]
            lines.append([f"{name}, {settings}", *cells])
    print(markdown([f"k = {args.k}", "FVU", "L0", "dead", "under-used"], lines))


if __name__ == "__main__":
    main()
