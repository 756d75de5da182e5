"""What weight sparsity costs: held-out and calibration loss of every post-training recipe.

    python benchmarks/sparsity_loss.py                          run what the results file does not have yet
    python benchmarks/sparsity_loss.py --docs docs/sparsity.md

A seed chooses the calibration text (other rows of the training files); magnitude pruning uses none and varies only in
the calibration loss, which is that of the very tokens that calibrated.
"""

import argparse
import os
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.jsonl import add_table_options, append_row, markdown, mean_spread, printed, read_rows
from benchmarks.sparsity import rows_of
from saelab.core.progress import set_progress
from saelab.models.subject import load_model
from saelab.sparsity.measure import loss, measure
from saelab.sparsity.recipe import Recipe
from saelab.sparsity.sparsify import Sparsified, sparsify

RESULTS = Path(__file__).parent / "results" / "sparsity_loss.jsonl"


def loss_recipes() -> list[tuple[str, str, dict[str, Any]]]:
    """Return (method, setting, recipe) of every row of the loss table."""
    found: list[tuple[str, str, dict[str, Any]]] = []

    def add(method: str, setting: str, keys: dict[str, Any], **rest: Any) -> None:
        found.append((method, setting, {"method": keys, **rest}))

    for share in (0.6, 0.7, 0.5, 0.8):
        for name in ("magnitude", "wanda", "dsnot", "sparsegpt"):
            add(name, f"{share:.0%}", {"name": name}, pattern="row", sparsity=share)
    for name in ("random", "magnitude", "wanda", "dsnot", "sparsegpt"):
        add(name, "2:4", {"name": name}, pattern="2:4")
    for bits in (3, 4):
        add("spqr", f"{bits} bits", {"name": "spqr", "bits": bits})
    add("gqsa", "4 bits, half", {"name": "spqr", "bits": 4, "outliers": 0, "dropped": 0.5})
    for share in (0.25, 0.5, 0.75):
        add("structured", f"neurons -{share:.0%}", {"name": "structured", "neurons": share})
    add("structured", "heads -1/6", {"name": "structured", "neurons": 0, "heads": 1 / 6})
    add("random", "50%", {"name": "random"}, pattern="row", sparsity=0.5)
    for epsilon in (0.1, 0.2, 0.4):
        add("net_trim", f"epsilon {epsilon:g}", {"name": "net_trim", "epsilon": epsilon}, calibration_tokens=4096)
    for share in (0.6, 0.7):
        row: dict[str, Any] = {"pattern": "row", "sparsity": share}
        layer: dict[str, Any] = {"pattern": "layer", "sparsity": share}
        add("dsnot on magnitude", f"{share:.0%}", {"name": "dsnot", "start": "magnitude"}, **row)
        add("wanda, sensitivity", f"{share:.0%}", {"name": "wanda"}, allocation="sensitivity", **row)
        add("magnitude, global", f"{share:.0%}", {"name": "magnitude"}, allocation="global", **layer)
        add("magnitude, ERK", f"{share:.0%}", {"name": "magnitude"}, allocation="erk", **layer)
    return found


class Remembered:
    """The dense model, whose predictions on the same batches are computed once."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._found: dict[int, torch.Tensor] = {}

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits; ``tokens`` must be the same object to be recognised."""
        if id(tokens) not in self._found:
            self._found[id(tokens)] = self._model.logits(tokens)
        return self._found[id(tokens)]


def weighted_bits(done: Sparsified) -> float | None:
    """Return bits per weight over all layers of a quantised model; None for another."""
    layers = [layer for layer in done.layers if "bits_per_weight" in layer.facts]
    size = sum(layer.outputs * layer.inputs for layer in layers)
    bits = sum(layer.facts["bits_per_weight"] * layer.outputs * layer.inputs for layer in layers)
    return bits / size if size else None


def run(args: argparse.Namespace) -> None:
    """Make what is missing, seed by seed."""
    set_progress(False)
    done = {(r["method"], r["setting"], r["seed"]) for r in read_rows(args.results)}
    plain = load_model(args.model)
    dense, held_out = Remembered(plain), list(rows_of(plain, args.text, args.eval_rows).batches(16))
    original = {name: value.clone() for name, value in plain.plain.state_dict().items()}
    used = args.calibration_tokens // min(256, plain.n_ctx)
    texts = {seed: list(rows_of(plain, args.calibration, used, 64 * seed).batches(16)) for seed in args.seeds}
    unpruned = {seed: loss(plain, batches) for seed, batches in texts.items()}
    model = load_model(args.model)
    for seed in args.seeds:
        for method, setting, keys in loss_recipes():
            wanted = (not args.only or method in args.only) and (not args.settings or setting in args.settings)
            if (method, setting, seed) in done or not wanted:
                continue
            recipe = Recipe.model_validate({"calibration_tokens": args.calibration_tokens, **keys})
            if method == "structured":  # its matrices are smaller afterwards
                model = load_model(args.model)
            else:
                model.plain.load_state_dict(original)
            pruned = sparsify(model, rows_of(model, args.calibration, 64, 64 * seed), recipe, seed=seed)
            cost = measure(dense, model, held_out)
            row = {"method": method, "setting": setting, "seed": seed, "sparsity": pruned.sparsity}
            row |= {"loss": cost.loss_sparse, "kl": cost.kl, "dense_loss": cost.loss_dense}
            row |= {"calibration_loss": loss(model, texts[seed]), "dense_calibration_loss": unpruned[seed]}
            append_row(args.results, {**row, "bits": weighted_bits(pruned), "seconds": pruned.seconds})
            print(f"{method} {setting} seed {seed}: {cost.loss_sparse:.4f}", flush=True)


def tables(rows: list[dict[str, Any]]) -> str:
    """Return the table in the plan's order of methods, and how DSnoT, Wanda and magnitude compare."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["method"], row["setting"]), []).append(row)
    methods = list(dict.fromkeys(method for method, _, _ in loss_recipes()))
    lines = []
    for (method, setting), group in sorted(found.items(), key=lambda item: (methods.index(item[0][0]), item[0][1])):
        bits = [r["bits"] for r in group if r["bits"] is not None]
        lines.append(
            [
                method,
                setting,
                mean_spread([statistics.fmean(r["sparsity"] for r in group)], 1, percent=True),
                mean_spread(r["loss"] for r in group),
                mean_spread(r["kl"] for r in group),
                mean_spread(r["calibration_loss"] for r in group),
                mean_spread([statistics.fmean(bits)], 2) if bits else "",
                str(len(group)),
            ]
        )
    dense = rows[0]["dense_loss"]
    calibration = mean_spread({r["seed"]: r["dense_calibration_loss"] for r in rows}.values())
    header = ["method", "setting", "zeros, %", "loss", "KL", "calibration loss", "bits", "texts"]
    return (
        f"Nats per token, mean ± standard deviation over calibration texts (*texts*: how many were run). "
        f"Dense: loss {dense:.3f}, calibration loss {calibration}.\n\n{markdown(header, lines)}\n\n"
        + "\n".join(ordering(found))
    )


def ordering(found: dict[tuple[str, str], list[dict[str, Any]]]) -> list[str]:
    """Say by how much each method is above the one that should be no better, paired by calibration text."""
    said = []
    for setting in dict.fromkeys(setting for _, setting in found):
        for better, worse in (("dsnot", "wanda"), ("wanda", "magnitude")):
            left, right = ({r["seed"]: r for r in found.get((name, setting), [])} for name in (better, worse))
            both = [seed for seed in left if seed in right]  # the same calibration texts
            if both:
                differences = [
                    mean_spread(left[s][measure] - right[s][measure] for s in both)
                    for measure in ("loss", "calibration_loss")
                ]
                said.append(
                    f"* {better} minus {worse} at {setting}: {differences[0]} held out, {differences[1]} on the "
                    f"calibration text ({len(both)} texts)."
                )
    return said


def main() -> None:
    """Measure, or print the table of what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--text", default="stdlib:heldout")
    parser.add_argument("--calibration", default="stdlib:train")
    parser.add_argument("--calibration_tokens", type=int, default=8192)
    parser.add_argument("--eval_rows", type=int, default=32)
    parser.add_argument("--only", nargs="+", help="methods to run")
    parser.add_argument("--settings", nargs="+", help="settings to run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add_table_options(parser, RESULTS)
    args = parser.parse_args()
    if not printed(args, "loss", tables):
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        run(args)


if __name__ == "__main__":
    main()
