"""Planted truth in tests: the library's fixtures, and small trainings on them."""

from collections.abc import Callable

import torch
from torch import Tensor

from saelab.analysis.synthetic import Planted, hier, ortho, superpos, zipf
from saelab.core.batch import Batch
from saelab.sae import SAE, StepContext

__all__ = ["Planted", "fvu", "hier", "ortho", "recovered", "set_oracle", "superpos", "train", "zipf"]


def set_oracle(sae: SAE, features: Tensor) -> None:
    """Give an SAE the planted features as encoder and decoder, and no biases: with orthonormal ones z is the truth."""
    with torch.no_grad():
        sae.w_enc_t.copy_(features)
        sae.W_dec.copy_(features)
        sae.b_enc.zero_()
        sae.b_dec.zero_()


def train(sae: SAE, make: Callable[[int], Tensor], steps: int, lr: float = 3e-3, **context: object) -> None:
    """Train on ``make(step)`` with Adam."""
    optimizer = torch.optim.Adam(sae.parameters(), lr=lr)
    sae.train()
    for step in range(steps):
        losses = sae.training_pass(sae.scale_batch(Batch(make(step))), StepContext(**context)).losses
        optimizer.zero_grad()
        sum(losses.values()).backward()
        sae.before_step()
        optimizer.step()
        sae.after_step()
    sae.eval()


def fvu(x: Tensor, x_hat: Tensor) -> float:
    return float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum())


def recovered(sae: SAE, features: Tensor) -> float:
    """Mean over true features of the largest cosine with a decoder row (MMCS)."""
    rows = sae.W_dec.detach().to(features)
    return float((features @ (rows / rows.norm(dim=1, keepdim=True)).T).max(dim=1).values.mean())
