"""Zipf-Mandelbrot laws of feature densities: shares by rank, whole quotas from them, and who falls short.

Sorted by rank r = 1, 2, ..., the densities of an SAE's features roughly follow ``(r + q)^-s`` (Ayonrinde 2024, arXiv
2411.02124, reports a curve of that type). Exponent, shift and all rounding rules here are choices of this library.
"""

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor


def zipf_shares(d_sae: int, exponent: float, shift: float) -> Float64[Tensor, " d_sae"]:
    """Return ``(r + shift)^-exponent`` for ranks r = 1 .. d_sae, divided by its sum."""
    weights = (torch.arange(1, d_sae + 1, dtype=torch.float64) + shift).pow(-exponent)
    return weights / weights.sum()


def whole_quotas(
    shares: Float64[Tensor, " d_sae"], total: int, largest: int, phase: float = 0.0
) -> Int[Tensor, " d_sae"]:
    """Return whole quotas in proportion to ``shares`` whose sum is exactly ``total``, each at most ``largest``.

    With ``total >= d_sae``, every quota is at least 1: shares are clamped to [1, largest], what clamping took or gave
    is settled among the others, and the units left by rounding down go to the largest remainders, ties to the lower
    index. With fewer units than features they are dealt by systematic sampling: over phases spread evenly in [0, 1),
    each feature receives its share on average. ``total`` must not exceed ``d_sae * largest``.
    """
    d_sae = shares.numel()
    assert 0 <= total <= d_sae * largest
    smallest = 1 if total >= d_sae else 0
    exact = _clamped(shares, total, smallest, largest)
    if not smallest:
        steps = torch.floor(exact.cumsum(0) + phase)
        steps[-1] = total  # and not one less by rounding
        return steps.diff(prepend=steps.new_zeros(1)).to(torch.int64)
    floor = exact.floor().clamp(smallest, largest)
    spare = total - int(floor.sum())
    remainder = torch.where(floor < largest, exact - floor, -1.0)
    floor[remainder.sort(descending=True, stable=True).indices[:spare]] += 1
    return floor.to(torch.int64)


def _clamped(shares: Float64[Tensor, " d_sae"], total: int, smallest: int, largest: int) -> Float64[Tensor, " d_sae"]:
    """Return ``(factor * shares)`` clamped to [smallest, largest], with the factor for which the sum is ``total``.

    The sum grows with the factor, so bisection finds it: 100 halvings are more than a float64 can tell apart.
    """
    low, high = 0.0, float(largest / shares[shares > 0].min())
    for _ in range(100):
        factor = (low + high) / 2
        if float((factor * shares).clamp(smallest, largest).sum()) < total:
            low = factor
        else:
            high = factor
    return (high * shares).clamp(smallest, largest)


def ranks_of(density: Float[Tensor, " d_sae"]) -> Int[Tensor, " d_sae"]:
    """Return each feature's rank, 0 for the densest; ties are broken by index."""
    order = density.sort(descending=True, stable=True).indices
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
