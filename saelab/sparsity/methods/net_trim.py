"""Net-Trim: the sparsest weights with the same outputs (Aghasi et al. 2016, arXiv 1611.05162).

For each output unit with weights u, inputs X (n, d) and outputs y on the calibration tokens,

    minimise ||u||_1   subject to   ||X u - y||_2 <= eps ||y||_2

and for a unit behind a ReLU the weaker ``||(X u - y) on y > 0|| <= eps ||y+||`` and ``X u <= 0 where y <= 0`` (the
convex program of the paper, its section 2). Solved for all units at once by ADMM with the splitting z = X u, v = u: the
linear system X^T X + I is the same for all units and all iterations.
"""

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from saelab.sparsity.methods.base import Method, Pruned
from saelab.sparsity.pattern import Pattern
from saelab.sparsity.statistics import InputStatistics


class NetTrim(Method):
    """Sparsify each layer as far as its own outputs stay within ``epsilon``; sparsity is a result, not a setting."""

    name: Literal["net_trim"] = "net_trim"
    need = "inputs"
    patterned = False
    epsilon: float = Field(default=0.1, gt=0, lt=1)
    """Relative error of each output unit over the calibration tokens."""
    relu: bool = False
    """Whether every chosen layer stands before a ReLU (choose the layers with ``include``)."""
    iterations: int = Field(default=150, ge=1)
    """ADMM steps."""

    def prune(
        self, weight: Tensor, inputs: InputStatistics | None, pattern: Pattern | None, generator: torch.Generator
    ) -> Pruned:
        """Prune one layer."""
        assert inputs is not None
        x = inputs.inputs
        if not self.relu and x.shape[0] > x.shape[1]:
            x = torch.linalg.qr(x, mode="r")[1]  # the tokens rotated, which no norm over them sees, and most then zero
        u = net_trim(x, x @ weight.T, self.epsilon, relu=self.relu, iterations=self.iterations)
        new = u.T.contiguous()
        mask = new != 0
        return Pruned(new, mask, {"nonzeros": float(mask.sum())})


def net_trim(
    x: Float[Tensor, "n d"], y: Float[Tensor, "n out"], epsilon: float, *, relu: bool = False, iterations: int = 150
) -> Float[Tensor, "d out"]:
    """Return U of least L1 norm with X U within ``epsilon`` of Y for each output unit (see the module).

    ``y`` is the output before the ReLU. Entries that the L1 step sets to zero are exactly zero.
    """
    scale = x.square().sum(0).mean().sqrt().clamp_min(1e-30)  # so that X^T X and I weigh alike
    x, y = x / scale, y / scale
    on = y > 0 if relu else torch.ones_like(y, dtype=torch.bool)
    target = torch.where(on, y, torch.zeros_like(y))
    radius = epsilon * target.norm(dim=0)
    system = torch.linalg.cholesky(x.T @ x + torch.eye(x.shape[1], dtype=x.dtype))
    u = torch.cholesky_solve(x.T @ y, system)
    z, v = x @ u, u.clone()
    dual_z, dual_v = torch.zeros_like(z), torch.zeros_like(v)
    step = u.abs().mean() / 10  # one over the penalty; it sets the pace, not the solution
    for _ in range(iterations):
        u = torch.cholesky_solve(x.T @ (z - dual_z) + (v - dual_v), system)
        product = x @ u
        z = _project(product + dual_z, target, on, radius)
        moved = u + dual_v
        v = moved.sign() * (moved.abs() - step).clamp_min(0)
        dual_z += product - z
        dual_v += u - v
    return v


def _project(z: Tensor, target: Tensor, on: Tensor, radius: Tensor) -> Tensor:
    """Nearest point with ||z - target|| <= radius on the active entries and z <= 0 on the others."""
    gap = torch.where(on, z - target, torch.zeros_like(z))
    shrink = (radius / gap.norm(dim=0).clamp_min(1e-30)).clamp_max(1.0)
    return torch.where(on, target + gap * shrink, z.clamp_max(0.0))
