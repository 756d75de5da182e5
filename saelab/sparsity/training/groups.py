"""Groups of weights and the penalties on them: the sparse group envelope (WGSEF) and the marked group lasso.

Functions of the groups' Euclidean norms; a group is an output row of a layer (a neuron). All are pure.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.core.errors import ConfigError


def envelope(norms: Float[Tensor, " groups"], k: int, weights: Float[Tensor, " groups"] | None = None) -> float:
    """Half the squared k-support norm of the weighted group norms n_j w_j.

    It is the convex envelope of 1/2 ||.||^2 + {0 if at most k groups are nonzero, else infinity} for weights of 1
    (WGSEF: Refael et al. 2024, after Beck & Refael 2022; the k-support norm: Argyriou et al. 2012). As a minimum:
    1/2 sum_j (n_j w_j)^2 / u_j over 0 <= u_j <= 1, sum_j u_j <= k, whose solution has u_j = min(1, eta n_j w_j).
    """
    z = _weighted(norms, weights).double().sort(descending=True).values
    _require_k(k, z.numel())
    if k == z.numel():
        return float(0.5 * z.square().sum())
    tail = z.flip(0).cumsum(0).flip(0)  # tail[r] = sum of z from r on
    for r in range(k):  # the first r groups have u = 1, the rest share k - r in proportion to z
        share = float(tail[r]) / (k - r)
        if float(z[r]) <= share:
            return float(0.5 * z[:r].square().sum() + 0.5 * tail[r].square() / (k - r))
    return float(0.5 * z[: k - 1].square().sum() + 0.5 * tail[k - 1].square())


def envelope_factors(
    norms: Float[Tensor, " groups"], k: int, strength: float, weights: Float[Tensor, " groups"] | None = None
) -> Float[Tensor, " groups"]:
    """Factors by which the proximal operator of ``strength * envelope`` shrinks each group, exactly.

    The prox of x is x_j u_j / (u_j + lambda w_j^2) with u_j = clip(eta w_j n_j - lambda w_j^2, 0, 1) and eta such that
    sum_j u_j = k. That sum is piecewise linear and nondecreasing in eta with two breakpoints for each group, so a sort
    and a search find the piece that holds k: O(m log m) for m groups. With lambda to infinity the k largest stay
    in proportion; groups with u_j = 0 are exactly zero.
    """
    _require_k(k, norms.numel())
    if strength < 0:
        raise ConfigError(f"the strength of a penalty is at least 0, got {strength:g}")
    n = norms.double()
    w = torch.ones_like(n) if weights is None else weights.double()
    slope, offset = w * n, strength * w.square()
    alive = slope > 0
    if strength == 0 or int(alive.sum()) <= k:  # u = 1 for every group that is there
        return (1 / (1 + offset) * alive).to(norms.dtype)
    a, b = slope[alive], offset[alive]
    points = torch.cat([b / a, (1 + b) / a]).sort().values
    # sums at all breakpoints: each group contributes clip(a eta - b, 0, 1); a running slope does it in one pass
    starts, ends = (b / a).sort(), ((1 + b) / a).sort()
    active = torch.cat([a[starts.indices], -a[ends.indices]])[
        torch.cat([starts.values, ends.values]).argsort(stable=True)
    ]
    gradient = active.cumsum(0)
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), (gradient[:-1] * points.diff()).cumsum(0)])
    at = int(torch.searchsorted(sums, float(k))) - 1
    at = max(min(at, points.numel() - 2), 0)
    eta = points[at] + (k - sums[at]) / gradient[at].clamp_min(torch.finfo(torch.float64).tiny)
    u = torch.zeros_like(n)
    u[alive] = (a * eta - b).clamp(0, 1)
    return (u / (u + offset).clamp_min(torch.finfo(torch.float64).tiny)).to(norms.dtype)


def marked_lasso_factors(
    norms: Float[Tensor, " groups"], marked: Bool[Tensor, " groups"], strength: float
) -> Float[Tensor, " groups"]:
    """Factors of the proximal operator of ``strength * sum of the marked groups' norms`` (MaskSparsity).

    Group soft-thresholding on the groups that a mask marks for removal; the others are left alone, which is the point
    of MaskSparsity (Jiang et al. 2022) against a group lasso on everything.
    """
    shrunk = (1 - strength / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_min(0)
    return torch.where(marked, shrunk, torch.ones_like(norms))


def _weighted(norms: Tensor, weights: Tensor | None) -> Tensor:
    return norms if weights is None else norms * weights


def _require_k(k: int, groups: int) -> None:
    if not 1 <= k <= groups:
        raise ConfigError(f"k groups are to stay, 1 <= k <= {groups}; got {k}")
