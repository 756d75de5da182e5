"""Which twin of an operation runs, and why."""

from typing import Literal

import torch

from saelab.core.errors import ConfigError

Impl = Literal["auto", "reference", "sparse"]
"""``reference``: dense, plain torch, obviously right. ``sparse``: tiled and sparse. ``auto``: the faster one here."""

_WHY = {
    "select_topk": "tiled over rows: no (N, d_sae) matrix outlives a tile, and selection needs no gradient",
    "select_budget": "one pass over tiles with a bound from the first rows: a flat topk costs more than the product",
    "select_columns": "tiled over features, in classes of similar quota",
    "select_above": "tiled over rows; groups of columns whose maximum is below the threshold are not looked at",
    "select_scored": "tiled over rows: neither pre-activations nor influences outlive a tile",
    "pre_activations_at": "backward visits the selected entries only, grouped by feature: deterministic",
    "decode": "embedding_bag reads k decoder rows per token instead of multiplying by all of them",
}


def use_sparse(impl: Impl) -> bool:
    """Return whether ``impl`` means the sparse twin; every sparse twin runs on CPU and CUDA, so ``auto`` does."""
    if impl not in ("auto", "reference", "sparse"):
        raise ConfigError(f"unknown impl {impl!r}, expected 'auto', 'reference' or 'sparse'")
    return impl != "reference"


def info(device: str = "cpu") -> dict[str, dict[str, str]]:
    """Say what ``impl="auto"`` runs for each operation on ``device``, and why.

    Returns operation -> ``{"impl", "why"}``, plus ``"machine"`` -> what the choice depends on.
    """
    machine = {"device": device, "torch": torch.__version__, "threads": str(torch.get_num_threads())}
    if device == "cpu":
        machine["capability"] = torch.backends.cpu.get_cpu_capability()
        machine["bf16_matrix_instructions"] = str(has_fast_bf16())
    return {"machine": machine, **{op: {"impl": "sparse", "why": why} for op, why in _WHY.items()}}


def has_fast_bf16() -> bool:
    """Return whether this CPU multiplies bf16 matrices in hardware; else ``precision="bf16"`` is slower than f32."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
