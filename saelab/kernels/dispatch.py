"""Which twin of an operation runs, and why."""

import importlib.util
import os
from typing import Literal

import torch

from saelab.core.errors import ConfigError
from saelab.kernels.product import use_onednn

Impl = Literal["auto", "reference", "sparse", "triton"]
"""``reference``: dense, plain torch, obviously right. ``sparse``: tiled and sparse, in torch's own operations.
``triton``: the same algorithms as GPU kernels written in Triton. ``auto``: what :func:`info` says."""

_WHY = {
    "product": "float32 on a CPU goes to oneDNN, twice as fast as torch's own choice (MKL) on AMD processors",
    "select_topk": "tiled over rows: no (N, d_sae) matrix outlives a tile, and selection needs no gradient",
    "select_budget": "one pass over tiles with a bound from the first rows: a flat topk costs more than the product",
    "select_columns": "tiled over features, in classes of similar quota",
    "select_above": "tiled over rows; groups of columns whose maximum is below the threshold are not looked at",
    "select_scored": "tiled over rows: neither pre-activations nor influences outlive a tile",
    "pre_activations_at": "backward visits the selected entries only, grouped by feature: deterministic",
    "decode": "embedding_bag reads k decoder rows per token instead of multiplying by all of them",
    "co_activation": "one addition per pair of active features of a token, into rows that a core's cache holds",
}


def use_sparse(impl: Impl) -> bool:
    """Return whether ``impl`` is not the dense reference; both other twins run on CPU and CUDA, so ``auto`` is."""
    if impl not in ("auto", "reference", "sparse", "triton"):
        raise ConfigError(f"unknown impl {impl!r}, expected 'auto', 'reference', 'sparse' or 'triton'")
    return impl != "reference"


def use_triton(impl: Impl, device: torch.device) -> bool:
    """Return whether ``impl`` asks for the Triton twin; :class:`ConfigError` when that cannot run on ``device``."""
    if impl != "triton":
        return False
    if problem := triton_problem(device.type):
        raise ConfigError(f"impl 'triton' cannot run here: {problem}; use impl 'sparse'")
    return True


def triton_problem(device: str) -> str | None:
    """Return why Triton kernels cannot run on tensors of this kind of device, or None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device == "cpu" and not interpreting():
        return "tensors are on the CPU, where Triton runs only with TRITON_INTERPRET=1 (an interpreter for tests)"
    return None


def interpreting() -> bool:
    """Return whether Triton kernels go through its interpreter, which needs no GPU and is for tests only."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def info(device: str = "cpu") -> dict[str, dict[str, str]]:
    """Say what ``impl="auto"`` runs for each operation on ``device``, and why.

    Returns operation -> ``{"impl", "why"}``, plus ``"machine"`` -> what the choice depends on, and ``"triton"`` ->
    whether ``impl="triton"`` would run on ``device``, and why ``auto`` does not take it.
    """
    kind = device.split(":", maxsplit=1)[0]
    machine = {"device": device, "torch": torch.__version__, "threads": str(torch.get_num_threads())}
    if kind == "cpu":
        machine["capability"] = torch.backends.cpu.get_cpu_capability()
        machine["f32_product"] = "oneDNN" if use_onednn(torch.empty(0)) else "torch.mm"
        machine["bf16_matrix_instructions"] = str(has_fast_bf16())
    problem = triton_problem(kind)
    triton = {
        "impl": "unavailable" if problem else "on request",
        "why": problem
        or "equal to the reference under Triton's interpreter, not yet timed on a GPU: ask for it by impl='triton'",
    }
    return {"machine": machine, "triton": triton, **{op: {"impl": "sparse", "why": why} for op, why in _WHY.items()}}


def has_fast_bf16() -> bool:
    """Return whether this CPU multiplies bf16 matrices in hardware; else ``precision="bf16"`` is slower than f32."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
