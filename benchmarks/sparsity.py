"""What weight sparsity costs and what it buys: loss of every recipe, break-even of the kernels, speed of the harvest.

    python benchmarks/sparsity.py loss     [--model embedded] [--seeds 0 1 2]     held-out loss by recipe and sparsity
    python benchmarks/sparsity.py kernels                                         sparse layers against dense ones
    python benchmarks/sparsity.py harvest  [--model embedded]                     tokens/s of sparsified models

Seeds choose the calibration text (other rows of the training files); methods without calibration do not vary. Speeds
are medians of interleaved runs on the same rows, as ratios to the dense model in the same run.
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from saelab.activations.harvest import HarvestConfig, harvest
from saelab.core.progress import set_progress
from saelab.kernels.spmm import SparseWeight, spmm
from saelab.models.subject import load_model
from saelab.models.text import open_text
from saelab.models.tokens import TokenRows, TokensConfig
from saelab.sparsity.measure import measure
from saelab.sparsity.recipe import Recipe
from saelab.sparsity.runtime import accelerate
from saelab.sparsity.sparsify import sparsify

SITE = "blocks.{}.hook_resid_post"
CALIBRATED = {"wanda", "dsnot", "sparsegpt"}


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


def loss_table(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Held-out loss for each method, pattern and sparsity; mean and standard deviation over calibration texts."""
    dense = load_model(arguments.model)
    held_out = list(rows_of(dense, arguments.text, arguments.eval_rows).batches(16))
    original = {name: value.clone() for name, value in dense.plain.state_dict().items()}
    model = load_model(arguments.model)
    found = []
    for method in ("random", "magnitude", "wanda", "dsnot", "sparsegpt"):
        for share in (0.5, 0.6, 0.7, 0.8, "2:4"):
            keys = {"pattern": share} if isinstance(share, str) else {"pattern": "row", "sparsity": share}
            recipe = Recipe.model_validate({"method": {"name": method}, "calibration_tokens": 16_384, **keys})
            seeds = arguments.seeds if method in CALIBRATED or method == "random" else arguments.seeds[:1]
            costs, seconds = [], []
            for seed in seeds:
                model.plain.load_state_dict(original)
                done = sparsify(model, rows_of(model, arguments.calibration, 64, 64 * seed), recipe, seed=seed)
                costs.append(measure(dense, model, held_out))
                seconds.append(done.seconds)
            losses, kls = [c.loss_sparse for c in costs], [c.kl for c in costs]
            found.append(
                {
                    "method": method,
                    "sparsity": str(share),
                    "loss": statistics.mean(losses),
                    "sd": statistics.stdev(losses) if len(losses) > 1 else float("nan"),
                    "kl": statistics.mean(kls),
                    "dense loss": costs[0].loss_dense,
                    "seconds": statistics.mean(seconds),
                }
            )
    return found


def kernel_table(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Time of the sparse layer over the dense one, and of torch's own CSR product (MKL), by shape and sparsity."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for out, into in ((768, 192), (192, 768), (3072, 768), (768, 3072)):
        x = torch.randn(4096, into, generator=generator)
        for sparsity in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98):
            weight = torch.randn(out, into, generator=generator)
            weight *= torch.rand(weight.shape, generator=generator) >= sparsity
            sparse, csr = SparseWeight.from_dense(weight), weight.to_sparse_csr()
            twins = {
                "dense": lambda x=x, w=weight: F.linear(x, w),
                "sparse": lambda x=x, s=sparse: spmm(x, s),
                "transposed": lambda x=x, s=sparse: spmm(x, s, transposed=True),
                "torch CSR": lambda x=x, c=csr: (c @ x.T).T,
            }
            times = interleaved(twins, arguments.repeats)
            dense = times.pop("dense")
            flops = 2 * x.shape[0] * len(sparse.values)
            found.append(
                {
                    "layer": f"{into} -> {out}",
                    "sparsity": sparsity,
                    "dense ms": 1e3 * dense,
                    **{name: value / dense for name, value in times.items()},
                    "sparse GFLOP/s": flops / times["sparse"] / 1e9,
                }
            )
    return found


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
    """Tokens/s of harvesting a sparsified model (as ``--sparse auto`` runs it) over the dense one, with loss and KL."""
    dense = load_model(arguments.model)
    site = SITE.format(dense.n_layers - 1)
    held_out = list(rows_of(dense, arguments.text, arguments.eval_rows).batches(16))
    rows = rows_of(dense, arguments.text, arguments.rows)
    tokens = next(iter(rows.batches(16))).tokens
    recipes = [("dense", None)]
    recipes += [(f"sparsegpt {s:.0%}", {"method": {"name": "sparsegpt"}, "sparsity": s}) for s in (0.5, 0.7, 0.8, 0.9)]
    recipes += [(f"neurons -{s:.0%}", {"method": {"name": "structured", "neurons": s}}) for s in (0.25, 0.5, 0.75)]
    models = {}
    for name, keys in recipes:
        model = load_model(arguments.model)
        facts: dict[str, Any] = {"model": name, "loss": float("nan"), "kl": 0.0, "sparse layers": 0}
        if keys is not None:
            recipe = Recipe.model_validate({"calibration_tokens": 16_384, **keys})
            sparsify(model, rows_of(model, arguments.calibration, 64), recipe)
            cost = measure(dense, model, held_out)
            facts |= {"loss": cost.loss_sparse, "kl": cost.kl}
            models["dense"][1]["loss"] = cost.loss_dense
            facts["sparse layers"] = sum(choice.run != "dense" for choice in accelerate(model, tokens))
        models[name] = (model, facts)
    positions = sum(batch.tokens.numel() for batch in rows.batches(16))

    def run(model: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            harvest(model, rows, [site], Path(folder) / "store", HarvestConfig(max_tokens=positions))

    times = interleaved({name: (lambda m=m: run(m)) for name, (m, _) in models.items()}, arguments.repeats)
    return [
        {**facts, "tokens/s": positions / times[name], "of dense": times["dense"] / times[name]}
        for name, (_, facts) in models.items()
    ]


def main() -> None:
    """Run one of the tables and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=["loss", "kernels", "harvest"])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--text", default="stdlib:heldout")
    parser.add_argument("--calibration", default="stdlib:train")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--eval_rows", type=int, default=64)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    set_progress(False)
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    found = {"loss": loss_table, "kernels": kernel_table, "harvest": harvest_table}[arguments.table](arguments)
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
