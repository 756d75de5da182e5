"""Each kernel by itself: the dense reference, the sparse twin, torch.compile, on a GPU Triton and sparsify's kernels.

    python benchmarks/kernels.py [--n 2048] [--d-in 512] [--d-sae 8192] [--k 32] [--compile] [--json FILE]
    python benchmarks/kernels.py --device cuda --n 8192 --d-in 2048 --d-sae 131072 --k 64

Rows of one operation are timed in turns; ``ratio`` is to the encoder's product in float32. sparsify's decoder kernels
are loaded from its environment (``benchmarks/peers/setup.sh sparsify``) where there is one, on a GPU only. ``break
even`` is the share of active features up to which the sparse twin is the faster one, from its time per entry.
``--compile`` adds ``torch.compile`` of what is made of many elementwise passes (on a CPU it needs a C++ compiler).
"""

import argparse
import importlib.util
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from train_step import ROOT, interleave

from saelab.core.code import SparseCode
from saelab.kernels import Impl, info
from saelab.kernels.dispatch import triton_problem
from saelab.kernels.product import product
from saelab.kernels.segments import bag_sum, entry_dots, group_by, grouped_sum, pick
from saelab.kernels.select import row_topk
from saelab.kernels.select_budget import keep_largest
from saelab.sae.decoder import normalize_rows_, remove_parallel_

Actions = dict[str, dict[str, Callable[[], Any]]]


def sparsify_bag() -> Callable[..., Tensor] | None:
    """Return sparsify's Triton decoder, or None when it is not installed."""
    files = sorted((ROOT / ".venv-peers/sparsify").glob("lib/python*/site-packages/sparsify/xformers.py"))
    if not files:
        return None
    spec = importlib.util.spec_from_file_location("sparsify_xformers", files[0])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    bag: Callable[..., Tensor] = module.xformers_embedding_bag
    return bag


def operations(args: argparse.Namespace) -> Actions:
    """Return operation -> twin -> what to time."""
    device, generator = args.device, torch.Generator().manual_seed(0)
    n, d, m, k = args.n, args.d_in, args.d_sae, args.k
    x = torch.randn(n, d, generator=generator).to(device)
    w = torch.randn(m, d, generator=generator).to(device)
    x_half, w_half = x.bfloat16(), w.bfloat16()
    gradient = torch.randn(n, d, generator=generator).to(device)
    buffer = torch.empty(n, m, device=device)
    rows_per_tile = min(n, 2048 if device != "cpu" else 512)
    tile = x[:rows_per_tile] @ w.T
    tile_half = tile.bfloat16()
    pool = tile.view(-1)[: 4 * n * k].clone()
    indices = torch.cat([row_topk(x[i : i + 512] @ w.T, k)[1] for i in range(0, n, 512)])
    code = SparseCode.from_topk(indices, torch.rand(n, k, generator=generator).to(device), m)
    dense, tokens = code.to_dense() if n * m <= 1 << 28 else None, code.rows()
    groups = group_by(code.indices, m)
    places = torch.arange(pool.numel(), device=device)
    twins: list[Impl] = ["sparse"] if triton_problem(device) or device == "cpu" else ["sparse", "triton"]
    ops: Actions = {
        "product": {
            "f32": lambda: x @ w.T,
            "f32 saelab": lambda: product(x, w, out=buffer),
            "bf16": lambda: x_half @ w_half.T,
        },
        "decode": {i: lambda i=i: bag_sum(w, code.indices, code.offsets, code.values, i) for i in twins},
        "weight gradient": {
            i: lambda i=i: grouped_sum(gradient, tokens, code.indices, m, code.values, groups, i) for i in twins
        },
        "dvalues": {i: lambda i=i: entry_dots(gradient, w, code.indices, tokens, groups, i) for i in twins},
        "group entries": {
            "sparse": lambda: group_by(code.indices, m),
            "torch.sort": lambda: torch.sort(code.indices, stable=True),
        },
        "gather": {
            "index_select": lambda: pick(code.values, groups.order),
            "indexing": lambda: code.values[groups.order],
        },
        f"top {k} of {rows_per_tile} rows": {
            "reference": lambda: tile.topk(k, dim=1),
            **{i: lambda i=i: row_topk(tile, k, i) for i in twins},
            **{f"{i} bf16": lambda i=i: row_topk(tile_half, k, i) for i in twins},
        },
        f"largest {n * k} of a pool": {i: lambda i=i: keep_largest(places, pool, n * k, i) for i in twins},
        "unit rows": {"sparse": lambda: normalize_rows_(w.clone())},
        "project gradient": {"sparse": lambda: remove_parallel_(gradient_of(w), w)},
    }
    if dense is not None:
        ops["decode"]["reference"] = lambda: dense @ w
        ops["weight gradient"]["reference"] = lambda: dense.T @ gradient
        ops["dvalues"]["reference"] = lambda: (gradient @ w.T).view(-1)[tokens * m + code.indices]
    theirs = sparsify_bag() if device != "cpu" else None
    if theirs is not None:
        values = code.values.view(n, k)
        ops["decode"]["sparsify"] = lambda: theirs(indices, w, values)
        ops["decode and backward"] = {
            "sparsify": lambda: _with_backward(lambda v, u: theirs(indices, u, v), values, w, gradient),
            **{i: lambda i=i: _with_backward(_ours(indices, m, i), values, w, gradient) for i in twins},
        }
    if args.compile:
        ops["unit rows"]["compiled"] = _compiled_unit_rows(w)
        compiled = torch.compile(lambda t: t.view(len(t), -1, 16).amax(2).topk(k, dim=1), dynamic=False)
        eager = ops[f"top {k} of {rows_per_tile} rows"]
        eager["group maxima"] = lambda: tile.view(len(tile), -1, 16).amax(2).topk(k, dim=1)
        eager["group maxima, compiled"] = lambda: compiled(tile)
    return ops


def gradient_of(w: Tensor) -> Tensor:
    """Return something of the shape of a gradient that may be changed."""
    return w.roll(1, 0)


def _ours(indices: Tensor, m: int, impl: Impl) -> Callable[[Tensor, Tensor], Tensor]:
    from saelab.kernels import decode

    return lambda values, weight: decode(SparseCode.from_topk(indices, values, m), weight, impl=impl)


def _with_backward(run: Callable[[Tensor, Tensor], Tensor], values: Tensor, w: Tensor, gradient: Tensor) -> None:
    values, w = values.detach().requires_grad_(), w.detach().requires_grad_()
    torch.autograd.grad(run(values, w), (values, w), gradient)


def _compiled_unit_rows(w: Tensor) -> Callable[[], Any]:
    compiled = torch.compile(lambda t: t / torch.linalg.vector_norm(t, dim=1, keepdim=True).clamp_min(1e-12))
    return lambda: compiled(w)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("n", 2048), ("d-in", 512), ("d-sae", 8192), ("k", 32), ("repeats", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="add torch.compile where it might pay")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    machine = info(args.device)["machine"]
    machine["processor"] = (
        torch.cuda.get_device_name() if args.device != "cpu" else platform.processor() or platform.machine()
    )
    print(f"N = {args.n}, d_in = {args.d_in}, d_sae = {args.d_sae}, k = {args.k}; {machine}")
    print(f"{'':26s} {'':24s} {'ratio':>8s} {'median ms':>10s} {'break even':>11s}")
    rows: list[dict[str, Any]] = []
    base = 0.0
    for op, twins in operations(args).items():
        times = interleave(twins, args.repeats, args.device)
        base = times["f32"] if op == "product" else base
        for twin, ms in times.items():
            even = args.k / args.d_sae * times["reference"] / ms if twin == "sparse" and "reference" in times else None
            even = None if op.startswith("top") else even
            rows.append({"op": op, "impl": twin, "median_ms": ms, "ratio_to_gemm_f32": ms / base, "break_even": even})
            shown = "" if even is None else f"{even:10.0%}"
            print(f"{op:26s} {twin:24s} {ms / base:8.3f} {ms:10.2f} {shown:>11s}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
