"""The product of rows with rows, ``x @ w.T + bias``: every dense product of a training step.

On a CPU in float32, torch gives ``mm`` to MKL, which on an AMD processor took about twice as long as oneDNN
(``benchmarks/train_step.py``). torch carries oneDNN too and uses it for bfloat16; for float32 it is reached by the
operator that torch.compile puts in the place of a linear layer. It has no ``out=``, so the result is made in blocks of
columns that stay in a cache and are copied to where they belong: less than the page faults of a fresh matrix cost.
"""

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK_COLUMNS = 4096
"""Columns of the result made at a time when it is written into a buffer."""


def use_onednn(x: Tensor) -> bool:
    """Return whether products of ``x`` go to oneDNN: float32 on a CPU, unless ``torch.backends.mkldnn`` is off."""
    backend = torch.backends.mkldnn
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and torch._C._has_mkldnn
        and bool(backend.enabled)
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


@torch.no_grad()
def product(
    x: Float[Tensor, "n d"],
    w: Float[Tensor, "m d"],
    bias: Float[Tensor, " m"] | None = None,
    out: Float[Tensor, "n m"] | None = None,
) -> Float[Tensor, "n m"]:
    """Return ``x @ w.T + bias``, without gradient; views (transposes too) are as good as contiguous matrices.

    ``out`` is where to write it. The last bits may differ from ``torch.mm``'s.
    """
    if not use_onednn(x) or 0 in (*x.shape, *w.shape):
        if bias is None:
            return torch.mm(x, w.T, out=out)
        return torch.addmm(bias, x, w.T, out=out)
    if out is None:
        return _onednn(x, w, bias)
    for start in range(0, w.shape[0], BLOCK_COLUMNS):
        columns = slice(start, start + BLOCK_COLUMNS)
        out[:, columns] = _onednn(x, w[columns], None if bias is None else bias[columns])
    return out


def _onednn(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    made: Tensor = torch.ops.mkldnn._linear_pointwise(x, w, bias, "none", [], "")
    return made
