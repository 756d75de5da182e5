"""Planted truth: sparse sums of known unit features. Every fixture returns data, dictionary and codes."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from saelab.core.batch import Batch
from saelab.sae import SAE, StepContext


class Planted(NamedTuple):
    x: Tensor  # (tokens, d) = codes @ features
    features: Tensor  # (n, d), unit rows
    codes: Tensor  # (tokens, n), at least 0


def ortho(tokens: int = 512, d: int = 128, p: float = 0.05, magnitudes: str = "exp", seed: int = 0) -> Planted:
    """Orthonormal features, each active with probability p; magnitudes const, uniform(0, 1) or exp(1)."""
    g = torch.Generator().manual_seed(seed)
    features = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64)).Q
    uniform = torch.rand(tokens, d, generator=g, dtype=torch.float64)
    size = {"const": torch.ones_like(uniform), "uniform": uniform, "exp": -(1 - uniform).log()}[magnitudes]
    codes = size * (torch.rand(tokens, d, generator=g) < p)
    return Planted(codes @ features, features, codes)


def superpos(tokens: int = 512, d: int = 64, n: int = 256, p: float = 0.02, seed: int = 0) -> Planted:
    """More random unit features than dimensions."""
    return _random(tokens, d, torch.full((n,), p), seed)


def zipf(tokens: int = 512, d: int = 64, n: int = 256, mean_active: float = 6.0, seed: int = 0) -> Planted:
    """As ``superpos``, with feature i active with probability ~ 1 / i, ``mean_active`` per token in all."""
    weights = 1 / torch.arange(1, n + 1)
    return _random(tokens, d, (mean_active * weights / weights.sum()).clamp(max=1), seed)


def _random(tokens: int, d: int, p: Tensor, seed: int) -> Planted:
    g = torch.Generator().manual_seed(12345)  # the features are the same for every seed: seeds give new tokens
    features = torch.randn(p.numel(), d, generator=g)
    features /= features.norm(dim=1, keepdim=True)
    g.manual_seed(seed)
    shape = (tokens, p.numel())
    codes = (torch.rand(shape, generator=g) < p) * (0.5 + torch.rand(shape, generator=g))
    return Planted(codes @ features, features, codes)


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
