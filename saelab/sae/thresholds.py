"""Statistics of batches, averaged over training: thresholds for inference without a batch, running densities.

An observation m_t of each batch goes into a bias-corrected exponential mean: after t observations

    mean_t = sum_s d^(t - s) m_s / sum_s d^(t - s) = mean_(t-1) + w_t (m_t - mean_(t-1)),    w_t = (1 - d) / (1 - d^t)

so it begins as the plain mean and is never drawn towards an arbitrary starting value.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


@torch.no_grad()
def average_in_(
    mean: Float[Tensor, "*shape"],
    observed: Float[Tensor, "*shape"],
    count: Int[Tensor, ""] | Int[Tensor, "*shape"],
    decay: float,
) -> None:
    """Take one observation into a bias-corrected mean, in place; ``count`` includes this one."""
    weight = (1 - decay) / (1 - decay ** count.clamp(min=1).to(torch.float64))
    mean.add_((observed - mean) * weight.to(mean.dtype))
