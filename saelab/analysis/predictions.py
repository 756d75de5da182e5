"""Next-token predictions of a model whose site was replaced: summed cross-entropy and divergence, in bounded memory."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.features.protocols import Replace

CHUNK = 1 << 22
"""Numbers of a logit tensor whose log-softmax is taken at once."""


def put(values: Float[Tensor, "n d"], where: Bool[Tensor, "b t"]) -> Replace:
    """Return what replaces an activation by ``values`` at the positions ``where``."""

    def replace(x: Tensor) -> Tensor:
        x = x.clone()
        x[where] = values
        return x

    return replace


def log_softmax(logits: Float[Tensor, "n v"]) -> Float[Tensor, "n v"]:
    """Log-probabilities, float32, chunk by chunk in place of the logits where those are float32."""
    log_p = logits.float()
    step = max(1, CHUNK // log_p.shape[1])
    for i in range(0, log_p.shape[0], step):
        log_p[i : i + step] = log_p[i : i + step].log_softmax(-1)
    return log_p


def summed_cross_entropy(log_p: Float[Tensor, "n v"], targets: Int[Tensor, " n"]) -> float:
    """Summed cross-entropy."""
    return -float(log_p.gather(1, targets[:, None]).double().sum())


def summed_divergence(log_p: Float[Tensor, "n v"], log_q: Float[Tensor, "n v"]) -> float:
    """Summed ``KL(p || q)``."""
    total = 0.0
    step = max(1, CHUNK // log_p.shape[1])
    for i in range(0, log_p.shape[0], step):
        p = log_p[i : i + step]
        # p = 0 where a logit is -inf: 0 * log 0 counts as 0.
        terms = torch.where(p == -torch.inf, 0.0, p.exp() * (p - log_q[i : i + step]))
        total += float(terms.sum(1).double().sum())
    return total
