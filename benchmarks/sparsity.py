"""What weight sparsity costs and what it buys: loss of every recipe, speed of the harvest.

    python benchmarks/sparsity.py loss     [--model embedded] [--seeds 0 1 2]     held-out loss by recipe and sparsity
    python benchmarks/sparsity.py harvest  [--model embedded]                     tokens/s of sparsified models

Seeds choose the calibration text (other rows of the training files); methods without calibration do not vary. Speeds
are medians of interleaved runs on the same rows, as ratios to the dense model in the same run.
"""

import argparse
import json
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from saelab.activations.harvest import HarvestConfig, harvest
from saelab.core.progress import set_progress
from saelab.models.subject import load_model
from saelab.models.text import open_text
from saelab.models.tokens import TokenRows, TokensConfig
from saelab.sparsity.core_neurons import CoreConfig, core_branches, core_cost, running_core
from saelab.sparsity.layers import linear_layers
from saelab.sparsity.measure import Cost, measure
from saelab.sparsity.recipe import Recipe
from saelab.sparsity.runtime import accelerate
from saelab.sparsity.sparsify import Sparsified, sparsify

SITE = "blocks.{}.hook_resid_post"


def rows_of(model: Any, text: str, n: int, skip: int = 0) -> Any:
    """Return ``n`` rows of a text, after ``skip`` others."""
    config = TokensConfig(context=min(256, model.n_ctx), max_rows=n + skip)
    rows = TokenRows(model.tokenizer, open_text(text), config, model.n_ctx)

    class Some:
        """The rows after the first ``skip``."""

        def batches(self, size: int, start_row: int = 0) -> Any:
            """Yield them."""
            return rows.batches(size, start_row + skip)

        def describe(self) -> dict[str, Any]:
            """Say what they are."""
            return {**rows.describe(), "skip": skip}

    return Some()


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
    for share in (0.6, 0.7):
        row: dict[str, Any] = {"pattern": "row", "sparsity": share}
        layer: dict[str, Any] = {"pattern": "layer", "sparsity": share}
        add("dsnot on magnitude", f"{share:.0%}", {"name": "dsnot", "start": "magnitude"}, **row)
        add("wanda, sensitivity", f"{share:.0%}", {"name": "wanda"}, allocation="sensitivity", **row)
        add("magnitude, global", f"{share:.0%}", {"name": "magnitude"}, allocation="global", **layer)
        add("magnitude, ERK", f"{share:.0%}", {"name": "magnitude"}, allocation="erk", **layer)
    for epsilon in (0.1, 0.2, 0.4):
        add("net_trim", f"epsilon {epsilon:g}", {"name": "net_trim", "epsilon": epsilon}, calibration_tokens=4096)
    for bits in (3, 4):
        add("spqr", f"{bits} bits", {"name": "spqr", "bits": bits})
    add("gqsa", "4 bits, half", {"name": "spqr", "bits": 4, "outliers": 0, "dropped": 0.5})
    for share in (0.25, 0.5, 0.75):
        add("structured", f"neurons -{share:.0%}", {"name": "structured", "neurons": share})
    add("structured", "heads -1/6", {"name": "structured", "neurons": 0, "heads": 1 / 6})
    return found


def loss_table(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Held-out loss for each recipe; mean and standard deviation over calibration texts."""
    plain = load_model(arguments.model)
    dense = Remembered(plain)
    held_out = list(rows_of(plain, arguments.text, arguments.eval_rows).batches(16))
    original = {name: value.clone() for name, value in plain.plain.state_dict().items()}
    found: list[dict[str, Any]] = []
    model = load_model(arguments.model)
    for method, setting, keys in loss_recipes():
        if arguments.only and method not in arguments.only:
            continue
        recipe = Recipe.model_validate({"calibration_tokens": arguments.calibration_tokens, **keys})
        costs, done = [], []
        for seed in arguments.seeds[:1] if method.startswith("magnitude") else arguments.seeds:
            if method == "structured":  # its matrices are smaller afterwards
                model = load_model(arguments.model)
            else:
                model.plain.load_state_dict(original)
            done.append(sparsify(model, rows_of(model, arguments.calibration, 64, 64 * seed), recipe, seed=seed))
            costs.append(measure(dense, model, held_out))
        found.append({"method": method, "setting": setting, **loss_row(costs, done)})
        if arguments.json:  # a long table: what is there is kept
            arguments.json.write_text(json.dumps({"threads": torch.get_num_threads(), "rows": found}, indent=1) + "\n")
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


def loss_row(costs: list[Cost], done: list[Sparsified]) -> dict[str, Any]:
    """Return means over the calibration texts."""
    losses = [c.loss_sparse for c in costs]
    bits = [value for d in done if (value := weighted_bits(d)) is not None]
    return {
        "sparsity": statistics.mean(d.sparsity for d in done),
        "loss": statistics.mean(losses),
        "sd": statistics.stdev(losses) if len(losses) > 1 else float("nan"),
        "kl": statistics.mean(c.kl for c in costs),
        "bits": statistics.mean(bits) if bits else float("nan"),
        "seconds": statistics.mean(d.seconds for d in done),
        "dense loss": costs[0].loss_dense,
    }


def weighted_bits(done: Sparsified) -> float | None:
    """Return bits per weight over all layers of a quantised model; None for another."""
    layers = [layer for layer in done.layers if "bits_per_weight" in layer.facts]
    size = sum(layer.outputs * layer.inputs for layer in layers)
    bits = sum(layer.facts["bits_per_weight"] * layer.outputs * layer.inputs for layer in layers)
    return bits / size if size else None


def interleaved(functions: dict[str, Any], repeats: int) -> dict[str, float]:
    """Median seconds of each function, called by turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def harvest_table(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Tokens/s of harvesting a sparsified model (as ``--sparse`` runs it) over the dense one, with loss and KL.

    Of core neurons the loss and KL are those after the prefix, where they run.
    """
    dense = load_model(arguments.model)
    site = SITE.format(dense.n_layers - 1)
    held_out = list(rows_of(dense, arguments.text, arguments.eval_rows).batches(16))
    rows = rows_of(dense, arguments.text, arguments.rows)
    tokens = next(iter(rows.batches(16))).tokens
    gpt = {"name": "sparsegpt"}
    recipes: list[tuple[str, Any]] = [("dense", None)]
    recipes += [(f"sparsegpt {s:.0%}", {"method": gpt, "sparsity": s}) for s in (0.5, 0.7, 0.8, 0.9, 0.95)]
    recipes += [(f"neurons -{s:.0%}", {"method": {"name": "structured", "neurons": s}}) for s in (0.25, 0.5, 0.75)]
    recipes += [("heads -1/6", {"method": {"name": "structured", "neurons": 0, "heads": 1 / 6}})]
    recipes += [(f"core {beta:.0%}", CoreConfig(beta=beta, prefix=32)) for beta in (0.25, 0.4, 0.6)]
    models: dict[str, tuple[Any, CoreConfig | None, dict[str, Any]]] = {}
    for name, keys in recipes:
        model = load_model(arguments.model)
        facts: dict[str, Any] = {"model": name, "loss": float("nan"), "kl": 0.0, "changed": 0}
        if isinstance(keys, CoreConfig):
            cost = core_cost(model, keys, held_out)
            facts |= {"loss": cost.loss_sparse, "kl": cost.kl, "changed": len(core_branches(model, keys))}
        elif keys is not None:
            recipe = Recipe.model_validate({"calibration_tokens": arguments.calibration_tokens, **keys})
            sparsify(model, rows_of(model, arguments.calibration, 64), recipe)
            cost = measure(dense, model, held_out)
            facts |= {"loss": cost.loss_sparse, "kl": cost.kl}
            models["dense"][2]["loss"] = cost.loss_dense
            pairs = zip(linear_layers(model.plain), linear_layers(dense.plain), strict=True)
            cut = sum(layer.shape != other.shape for layer, other in pairs)
            facts["changed"] = cut + sum(choice.run != "dense" for choice in accelerate(model, tokens, [site]))
        models[name] = (model, keys if isinstance(keys, CoreConfig) else None, facts)
    positions = sum(batch.tokens.numel() for batch in rows.batches(16))

    def run(model: Any, core: CoreConfig | None) -> None:
        with tempfile.TemporaryDirectory() as folder, running_core(model, core) if core else nullcontext():
            harvest(model, rows, [site], Path(folder) / "store", HarvestConfig(max_tokens=positions))

    times = interleaved(
        {name: (lambda m=m, c=c: run(m, c)) for name, (m, c, _) in models.items()},  # type: ignore[misc]
        arguments.repeats,
    )
    return [
        {**facts, "tokens/s": positions / times[name], "of dense": times["dense"] / times[name]}
        for name, (_, _, facts) in models.items()
    ]


def main() -> None:
    """Run one of the tables and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=["loss", "harvest"])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--text", default="stdlib:heldout")
    parser.add_argument("--calibration", default="stdlib:train")
    parser.add_argument("--calibration_tokens", type=int, default=16_384)
    parser.add_argument("--only", nargs="+", help="methods of the loss table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--eval_rows", type=int, default=64)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    set_progress(False)
    found = {"loss": loss_table, "harvest": harvest_table}[arguments.table](arguments)
    table = Table(title=f"{arguments.table}, {torch.get_num_threads()} threads", title_justify="left", box=None)
    for name, value in found[0].items():
        table.add_column(name, justify="left" if isinstance(value, str) else "right")
    for row in found:
        table.add_row(*(value if isinstance(value, str) else f"{value:,.4g}" for value in row.values()))
    Console(width=140).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"threads": torch.get_num_threads(), "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
