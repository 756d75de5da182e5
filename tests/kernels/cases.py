"""Inputs for the kernel tests: small, in float64, and awkward on purpose."""

from typing import NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    x: Tensor
    center: Tensor
    w_enc_t: Tensor
    b_enc: Tensor
    w_dec: Tensor
    b_dec: Tensor

    def leaves(self) -> "Case":
        return Case(*(t.clone().requires_grad_() for t in self))


def make_case(n: int, d_in: int = 4, d_sae: int = 11, seed: int = 0, dtype: torch.dtype = torch.float64) -> Case:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=dtype)

    return Case(draw(n, d_in), draw(d_in), draw(d_sae, d_in), draw(d_sae), draw(d_sae, d_in), draw(d_in))


def ragged(counts: list[int], d_sae: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return (indices, rows, offsets) with ``counts[t]`` distinct features for token t."""
    g = torch.Generator().manual_seed(seed)
    indices = [torch.randperm(d_sae, generator=g)[:count] for count in counts]
    offsets = torch.tensor([0, *counts]).cumsum(0)
    rows = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts, dtype=torch.int64))
    return torch.cat(indices) if indices else torch.zeros(0, dtype=torch.int64), rows, offsets
