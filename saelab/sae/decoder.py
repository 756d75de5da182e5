"""Keeping decoder rows at norm 1, in slices that stay in a CPU's cache."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

_SLICE_ELEMENTS = 1 << 18
"""1 MiB in float32."""


def _slices(rows: int, width: int, device: torch.device) -> Iterator[slice]:
    step = rows if device.type != "cpu" else max(1, _SLICE_ELEMENTS // max(width, 1))
    for start in range(0, rows, max(step, 1)):
        yield slice(start, start + step)


@torch.no_grad()
def normalize_rows_(w: Float[Tensor, "d_sae d"]) -> None:
    """Divide each row by its norm, in place; rows of zeros stay zeros."""
    for piece in _slices(w.shape[0], w.shape[1], w.device):
        part = w[piece]
        part.div_(torch.linalg.vector_norm(part, dim=1, keepdim=True).clamp_min_(1e-12))


@torch.no_grad()
def remove_parallel_(gradient: Float[Tensor, "d_sae d"], w: Float[Tensor, "d_sae d"]) -> None:
    """Remove from each row of ``gradient`` its component along the unit row of ``w``, in place."""
    for piece in _slices(w.shape[0], w.shape[1], w.device):
        part, rows = gradient[piece], w[piece]
        part.addcmul_(torch.linalg.vecdot(part, rows).unsqueeze(1), rows, value=-1)
