"""Why DSnoT's trades help or hurt: the error of its mask and of Wanda's before and after the nonlinearity.

    python -m benchmarks.dsnot                          run what the results file does not have yet
    python -m benchmarks.dsnot --docs docs/sparsity.md

One kind of layer at a time is pruned in all blocks (Wanda; DSnoT from Wanda's mask; and Wanda with the expected error
added to the bias, which takes away at once what DSnoT trades away), and once all kinds, DSnoT everywhere but in the
layers before the nonlinearity. For these the errors in the MLP of each block are measured too, on the same inputs.
"""

import argparse
import os
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.jsonl import add_table_options, append_row, markdown, mean_spread, printed, read_rows
from benchmarks.sparsity import rows_of
from saelab.core.progress import set_progress
from saelab.models.subject import load_model
from saelab.sparsity.layers import Layer, linear_layers
from saelab.sparsity.measure import loss
from saelab.sparsity.methods import DSnoT, Wanda
from saelab.sparsity.pattern import Unstructured
from saelab.sparsity.statistics import InputStatistics, watched

RESULTS = Path(__file__).parent / "results" / "dsnot.jsonl"
KINDS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
BEFORE_GELU = "mlp.c_fc"
BUT = f"all, {BEFORE_GELU} by Wanda"
MASKS = ("Wanda", "DSnoT", "Wanda + bias")


def kind(layer: Layer) -> str:
    """Return the last two parts of a layer's name."""
    return ".".join(layer.name.split(".")[-2:])


class Bench:
    """The embedded model, a calibration text and a sparsity."""

    def __init__(self, share: float, seed: int, rows: int) -> None:
        self.model = load_model("embedded")
        self.model.sites()
        self.layers = linear_layers(self.model.plain)
        self.dense = {name: value.clone() for name, value in self.model.plain.state_dict().items()}
        self.calibration = list(rows_of(self.model, "stdlib:train", 32, 64 * seed).batches(16))
        self.heldout = list(rows_of(self.model, "stdlib:heldout", rows).batches(16))
        self.pattern = Unstructured(share, per_row=True)
        self.generator = torch.Generator()

    def losses(self) -> dict[str, float]:
        """Return the losses of the model as it is."""
        return {"loss": loss(self.model, self.heldout), "calibration_loss": loss(self.model, self.calibration)}

    def inputs(self, layers: list[Layer]) -> dict[str, InputStatistics]:
        """Return statistics of the inputs of layers of one block."""
        with watched(layers, "inputs") as found:
            for batch in self.calibration:
                self.model.read(batch.tokens, [f"blocks.{layers[0].block}.hook_resid_post"])
        return found

    def prune(self, wanted: Callable[[Layer], str | None]) -> dict[str, float]:
        """Prune block by block each layer by the mask that ``wanted`` names, and return the losses."""
        self.model.plain.load_state_dict(self.dense)
        for block in sorted({layer.block for layer in self.layers}):
            here = [layer for layer in self.layers if layer.block == block and wanted(layer)]
            found = self.inputs(here)
            for layer in here:
                weight, shift = self.pruned(layer, found[layer.name], wanted(layer) or "")
                layer.weight.copy_(weight)
                layer.module.bias.data += shift  # type: ignore[operator,union-attr]
        return self.losses()

    def pruned(self, layer: Layer, inputs: InputStatistics, mask: str) -> tuple[Tensor, Tensor]:
        """Return the weight under a mask, and what is added to the bias."""
        dense = layer.weight.clone().contiguous()
        method = DSnoT() if mask == "DSnoT" else Wanda()
        weight = method.prune(dense, inputs, self.pattern, self.generator).weight
        shift = ((dense - weight).double() @ inputs.mean).float()
        return weight, shift if mask == "Wanda + bias" else torch.zeros_like(shift)

    def mlp_errors(self) -> list[dict[str, Any]]:
        """Return, per block and mask, the squared errors in the dense model's MLP, over the variance of what is hit."""
        self.model.plain.load_state_dict(self.dense)
        rows = []
        for layer in (found for found in self.layers if kind(found) == BEFORE_GELU):
            out = next(found for found in self.layers if found.block == layer.block and kind(found) == "mlp.c_proj")
            act = self.model.plain.get_submodule(layer.name.rpartition(".")[0]).act  # type: ignore[union-attr]
            inputs = self.inputs([layer])[layer.name]
            before = inputs.inputs @ layer.weight.T + layer.module.bias
            after = act(before)
            for mask in MASKS:
                weight, shift = self.pruned(layer, inputs, mask)
                moved = inputs.inputs @ weight.T + layer.module.bias + shift
                row = {"block": layer.block, "mask": mask, "mean_before": before.mean().item()}
                row |= {"mean": error(moved.mean(0), before.mean(0), before), "before": error(moved, before, before)}
                row |= {"after": error(act(moved), after, after), "fires": (moved > 0).float().mean().item()}
                row |= {"out": error(act(moved) @ out.weight.T, after @ out.weight.T, after @ out.weight.T)}
                rows.append({**row, "fires_dense": (before > 0).float().mean().item()})
        return rows


def error(found: Tensor, true: Tensor, scale: Tensor) -> float:
    """Return the squared error per token over the variance per token of ``scale``, summed over units."""
    variance = scale.var(0, correction=0).sum()
    return float((found - true).square().reshape(-1, scale.shape[1]).mean(0).sum() / variance)


def run(args: argparse.Namespace) -> None:
    """Make what is missing."""
    set_progress(False)
    done = {(r["seed"], r["sparsity"], r["what"], r["mask"]) for r in read_rows(args.results)}
    for seed in args.seeds:
        bench = Bench(args.sparsity, seed, args.eval_rows)

        def note(what: str, mask: str, values: dict[str, Any], seed: int = seed) -> None:
            append_row(args.results, {"seed": seed, "sparsity": args.sparsity, "what": what, "mask": mask, **values})
            print(seed, what, mask, values, flush=True)

        def missing(what: str, mask: str, seed: int = seed) -> bool:
            return (seed, args.sparsity, what, mask) not in done

        if missing("mlp errors", "Wanda"):
            for row in bench.mlp_errors():
                note("mlp errors", row.pop("mask"), row)
        for what in KINDS:
            for mask in MASKS:
                if missing(what, mask):
                    note(what, mask, bench.prune(lambda layer, w=what, m=mask: m if kind(layer) == w else None))
        for what, mask in (("all", "Wanda"), ("all", "DSnoT"), (BUT, "DSnoT")):
            if missing(what, mask):
                by_wanda = BEFORE_GELU if what == BUT else ""
                note(what, mask, bench.prune(lambda layer, m=mask, b=by_wanda: "Wanda" if kind(layer) == b else m))


def tables(rows: list[dict[str, Any]]) -> str:
    """Return the change of the loss by kind of layer, and the errors in the MLP."""
    parts = []
    for share in sorted({r["sparsity"] for r in rows}):
        here = [r for r in rows if r["sparsity"] == share]
        wanda = {(r["what"], r["seed"]): r for r in here if r["mask"] == "Wanda"}
        lines = []
        for what in (*KINDS, "all", BUT):
            for mask in MASKS[1:]:
                group = [r for r in here if r["what"] == what and r["mask"] == mask]
                if group:
                    base = [wanda["all" if what == BUT else what, r["seed"]] for r in group]
                    lines.append([what, mask, *(above(group, base, name) for name in ("loss", "calibration_loss"))])
        seeds = len({r["seed"] for r in here})
        parts.append(
            f"Loss minus that of Wanda's mask at {share:.0%}, in nats, one kind of layer pruned at a time (then all), "
            f"mean ± standard deviation over {seeds} calibration texts:\n\n"
            + markdown(["layers", "mask", "held out", "calibration text"], lines)
        )
        parts.append(
            "Squared errors that a pruned `c_fc` alone makes in the dense model's MLP, over the variance of what they "
            "hit (mean over the texts): of the mean pre-activation, of the pre-activation, after the GELU, and in the "
            "MLP's output. *On*: share of pre-activations above 0, dense and pruned.\n\n"
            + mlp_table([r for r in here if r["what"] == "mlp errors"])
        )
    return "\n\n".join(parts)


def mlp_table(rows: list[dict[str, Any]]) -> str:
    """Return the errors in the MLP, a line per block and mask."""
    columns = {
        "mean_before": "mean pre-activation", "fires_dense": "on, dense", "fires": "on", "mean": "mean",
        "before": "pre-activation", "after": "GELU", "out": "output",
    }  # fmt: skip
    lines = []
    for block in sorted({r["block"] for r in rows}):
        for mask in MASKS:
            group = [r for r in rows if (r["block"], r["mask"]) == (block, mask)]
            lines.append([f"{block}", mask, *(mean_of(r[name] for r in group) for name in columns)])
    return markdown(["block", "mask", *columns.values()], lines)


def above(group: list[dict[str, Any]], base: list[dict[str, Any]], name: str) -> str:
    """Mean and spread of a paired difference."""
    return mean_spread(r[name] - b[name] for r, b in zip(group, base, strict=True))


def mean_of(values: Iterable[float]) -> str:
    """Return a mean to three places."""
    return f"{statistics.fmean(values):.3f}"


def main() -> None:
    """Measure, or print the tables of what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--eval_rows", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add_table_options(parser, RESULTS)
    args = parser.parse_args()
    if not printed(args, "dsnot", tables):
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        run(args)


if __name__ == "__main__":
    main()
