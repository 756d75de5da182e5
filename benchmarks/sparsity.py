"""What weight sparsity buys in speed: harvests of sparsified models (what it costs: ``sparsity_loss.py``).

    python benchmarks/sparsity.py harvest  [--model embedded]                     tokens/s of sparsified models

Speeds are medians of interleaved runs on the same rows, as ratios to the dense model in the same run.
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
from saelab.sparsity.measure import measure
from saelab.sparsity.recipe import Recipe
from saelab.sparsity.runtime import accelerate
from saelab.sparsity.sparsify import sparsify

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
    parser.add_argument("table", choices=["harvest"])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--text", default="stdlib:heldout")
    parser.add_argument("--calibration", default="stdlib:train")
    parser.add_argument("--calibration_tokens", type=int, default=16_384)
    parser.add_argument("--eval_rows", type=int, default=64)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    set_progress(False)
    found = harvest_table(arguments)
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
