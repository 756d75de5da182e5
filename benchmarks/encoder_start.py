"""Where the encoder begins: held-out FVU and dead features for several norms of its columns at the start.

    python benchmarks/encoder_start.py --work DIR [--starts 1 0.3 0.2 0.1]          (DIR as of quality.py)

Trains TopK and Mutual-Choice SAEs on the embedded model's stored activations as ``quality.py`` does, with a seed that
it does not report, and prints a table of validation text.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from jsonl import markdown
from quality_measure import HeldOut, measure
from quality_plan import BATCH, SWEEP_SEED
from quality_subjects import SUBJECTS, open_subject

from saelab.core.config import parse_config
from saelab.core.progress import set_progress
from saelab.sae import SAE, load_sae
from saelab.training import FitConfig, fit


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for stores, as of quality.py")
    parser.add_argument("--starts", nargs="+", type=float, default=[1.0, 0.3, 0.2, 0.1])
    parser.add_argument("--lr", type=float, default=8e-3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    set_progress(False)
    opened = open_subject(SUBJECTS["embedded"], None, args.work / "embedded")
    subject = opened.subject
    heldout = HeldOut(opened.model, opened.heldout, opened.heldout_rows, subject.site, ce_rows=16)
    sizes = {"d_in": opened.train.d_in(subject.site), "d_sae": subject.d_sae}
    training = {"tokens": subject.tokens, "batch_size": BATCH, "lr": args.lr, "seed": SWEEP_SEED, "device": "cpu"}
    cases = [(architecture, k) for architecture in ("topk", "mutual_choice") for k in (8, 32)]
    lines = []
    for start in args.starts:
        SAE.encoder_start = start
        runs = [
            parse_config(
                FitConfig,
                {"name": f"{name}-{k}", "sae": {"architecture": name, "k": k, **sizes}, "training": training},
            )
            for name, k in cases
        ]
        with tempfile.TemporaryDirectory() as folder:
            fitted = fit(runs, opened.train.stream(subject.site, BATCH, SWEEP_SEED), Path(folder) / "fit")
            found = [measure(load_sae(result.path), heldout, test=False, ce=False) for result in fitted]
        lines.append([f"{start:g}", *(f"{m['fvu']:.4f} ({m['l0']:.1f}, {m['dead']:.1%})" for m in found)])
    print(markdown(["start; FVU (L0, dead)", *(f"{name} {k}" for name, k in cases)], lines))


if __name__ == "__main__":
    main()
