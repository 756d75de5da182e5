"""Where zeros pay: sparse weights, N:M weights, gathered MLP slices and zero activations against dense products.

    python benchmarks/sparse_kernels.py weights     CSR SpMM (ours, torch's/MKL's) and N:M against a dense layer
    python benchmarks/sparse_kernels.py slices      an MLP on neurons gathered once per row, against the whole MLP
    python benchmarks/sparse_kernels.py skip        skipping neurons that are zero, against the dense down projection
    python benchmarks/sparse_kernels.py relufied --data FOLDER     share of zeros in a relufied Llama, and the same

Times are medians of interleaved runs; every column but "ms" is time over dense time, so below 1 sparse wins. "floor" is
the least the sparse product could take at the dense product's own rate of arithmetic, over dense time: the density.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from saelab.core.code import SparseCode
from saelab.core.progress import set_progress
from saelab.kernels.decode import decode
from saelab.kernels.n_of_m import pack, packed_linear
from saelab.kernels.spmm import SparseWeight, spmm
from saelab.sparsity.core_neurons import core_sets
from saelab.sparsity.pattern import NofM

SHAPES = ((768, 192), (192, 768), (3072, 768), (768, 3072))
"""(outputs, inputs): the MLPs of the embedded model and of GPT-2 small."""


def interleaved(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each function, called by turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def ratios(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Milliseconds of ``dense``, and the others over it."""
    times = interleaved(functions, repeats)
    dense = times.pop("dense")
    return {"dense ms": 1e3 * dense, **{name: value / dense for name, value in times.items()}}


def weights(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Time of sparse layers over the dense one by shape and sparsity."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for out, into in SHAPES:
        x = torch.randn(arguments.tokens, into, generator=generator)
        for sparsity in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98):
            weight = torch.randn(out, into, generator=generator)
            weight *= torch.rand(weight.shape, generator=generator) >= sparsity
            sparse, csr = SparseWeight.from_dense(weight), weight.to_sparse_csr()
            twins: dict[str, Callable[[], Any]] = {
                "dense": lambda x=x, w=weight: F.linear(x, w),  # type: ignore[misc]
                "sparse": lambda x=x, s=sparse: spmm(x, s),  # type: ignore[misc]
                "transposed": lambda x=x, s=sparse: spmm(x, s, transposed=True),  # type: ignore[misc]
                "torch CSR": lambda x=x, c=csr: (c @ x.T).T,  # type: ignore[misc]
            }
            row = {"layer": f"{into} -> {out}", "sparsity": f"{sparsity:.0%}", **ratios(twins, arguments.repeats)}
            found.append({**row, "2:4 packed": float("nan"), "floor": 1 - sparsity})
        weight = torch.randn(out, into, generator=generator)
        weight *= NofM(2, 4).mask(weight.abs())
        sparse, packed = SparseWeight.from_dense(weight), pack(weight, 2, 4)
        twins = {
            "dense": lambda x=x, w=weight: F.linear(x, w),  # type: ignore[misc]
            "sparse": lambda x=x, s=sparse: spmm(x, s),  # type: ignore[misc]
            "transposed": lambda x=x, s=sparse: spmm(x, s, transposed=True),  # type: ignore[misc]
            "2:4 packed": lambda x=x, p=packed: packed_linear(x, p),  # type: ignore[misc]
        }
        row = ratios(twins, arguments.repeats)
        found.append({"layer": f"{into} -> {out}", "sparsity": "2:4", **row, "torch CSR": float("nan"), "floor": 0.5})
    return [{name: row[name] for name in found[0]} for row in found]


def slices(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Time of an MLP on core neurons chosen and gathered per row, over the whole MLP, by their share."""
    generator = torch.Generator().manual_seed(0)
    found = []
    rows, prefix, length = 16, 32, 256
    for width, d in ((768, 192), (3072, 768)):
        into = torch.randn(width, d, generator=generator) / d**0.5
        out = torch.randn(width, d, generator=generator) / width**0.5
        x = torch.randn(rows, length, d, generator=generator)

        def mlp(x: Any, a: Any, b: Any) -> Any:
            return F.linear(F.gelu(F.linear(x, a)), b.T)

        def sliced(beta: float, x: Any = x, into: Any = into, out: Any = out, mlp: Any = mlp) -> Any:
            h = F.gelu(F.linear(x[:, :prefix], into))
            parts = [F.linear(h, out.T)]
            for row, core in zip(x, core_sets(h, 0.05, beta), strict=True):
                parts.append(mlp(row[None, prefix:], into[core], out[core]))
            return parts

        for beta in (0.25, 0.4, 0.6, 0.8):
            twins = {"dense": lambda x=x, a=into, b=out, m=mlp: m(x, a, b), "sliced": lambda b=beta, s=sliced: s(b)}
            row = ratios(twins, arguments.repeats)  # type: ignore[arg-type]
            floor = prefix / length + (1 - prefix / length) * beta
            found.append({"MLP": f"{d} -> {width} -> {d}", "neurons": f"{beta:.0%}", **row, "floor": floor})
    return found


def skip(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Time of skipping zero neurons in the down projection, over the dense product, by share of zeros."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for width, d in ((384, 128), (768, 192), (3072, 768)):
        weight = torch.randn(width, d, generator=generator)
        for tokens in (1, arguments.tokens):
            for share in (0.5, 0.7, 0.9, 0.95, 0.98):
                h = torch.rand(tokens, width, generator=generator)
                h *= torch.rand(h.shape, generator=generator) >= share
                found.append(skip_row(h, weight, share, arguments.repeats))
    return found


def skip_row(h: torch.Tensor, weight: torch.Tensor, share: float, repeats: int) -> dict[str, Any]:
    """Time the ways to multiply sparse activations (n, width) with (width, d)."""
    code, column_major = SparseCode.from_dense(h), weight.T.contiguous()
    twins: dict[str, Callable[[], Any]] = {
        "dense": lambda: F.linear(h, column_major),
        "find and skip": lambda: decode(SparseCode.from_dense(h), weight),
        "skip": lambda: decode(code, weight),
    }
    if h.shape[0] == 1:
        twins["gather"] = lambda: gathered(h[0], weight)
    row = ratios(twins, max(repeats, 200) if h.shape[0] == 1 else repeats)
    width, d = weight.shape
    found = {"down": f"{width} -> {d}", "tokens": h.shape[0], "zeros": f"{share:.1%}", **row}
    return {**found, "gather": row.get("gather", float("nan")), "floor": 1 - share}


def gathered(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """One token: read only the rows of the neurons that are not zero."""
    at = h.nonzero()[:, 0]
    return h[at] @ weight[at]


def relufied(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Share of exact zeros in the relufied TinyStories Llama's MLPs, and what skipping them takes."""
    from quality_subjects import STORIES, SUBJECTS

    from saelab.models.text import open_text
    from saelab.models.tokens import TokenRows

    if arguments.data is None:
        raise SystemExit("relufied needs --data FOLDER with relu-stories2M/ and text/tinystories-600.jsonl")
    subject = SUBJECTS["relu-stories2M"]
    model = subject.load(arguments.data)
    rows = TokenRows(model.tokenizer, open_text(str(arguments.data / STORIES)), subject.tokens_config(), model.n_ctx)
    batch = next(iter(rows.batches(8)))
    found = []
    for layer in range(model.n_layers):
        names = [f"blocks.{layer}.mlp.hook_post", f"blocks.{layer}.mlp.hook_pre", f"blocks.{layer}.ln2.hook_out"]
        read = model.read(batch.tokens, names)
        h, gate, norm = (read[name][batch.keep] for name in names)
        active_gate = float((gate > model.plain.model.layers[layer].mlp.act_fn.shift).float().mean())  # type: ignore
        weight = model.plain.get_submodule(f"model.layers.{layer}.mlp.down_proj").weight.detach().T.contiguous()
        row = skip_row(h, weight, float((h == 0).float().mean()), arguments.repeats)
        one = skip_row(h[:1], weight, float((h[:1] == 0).float().mean()), arguments.repeats)
        facts = {
            "layer": layer,
            "active gates": f"{active_gate:.1%}",
            "zero MLP inputs": f"{float((norm == 0).float().mean()):.1%}",
        }
        found += [{**facts, **row}, {**facts, **one}]
    return found


TABLES = {"weights": weights, "slices": slices, "skip": skip, "relufied": relufied}


def main() -> None:
    """Run one of the tables and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=list(TABLES))
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--data", type=Path, help="folder with relu-stories2M/ (see quality_subjects.py)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    set_progress(False)
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    with torch.inference_mode():
        found = TABLES[arguments.table](arguments)
    table = Table(title=f"{arguments.table}, {torch.get_num_threads()} threads", title_justify="left", box=None)
    for name, value in found[0].items():
        table.add_column(name, justify="left" if isinstance(value, str) else "right")
    for row in found:
        table.add_row(*(value if isinstance(value, str) else f"{value:,.3g}" for value in row.values()))
    Console(width=140).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"threads": torch.get_num_threads(), "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
