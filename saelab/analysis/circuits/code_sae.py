"""The integers of :mod:`saelab.analysis.circuits.codes`: heads' outputs, the small SAE, the strongest latent.

A head's output is linear in what its values average to, z (d_head numbers), so outputs of width d_model are only made
for the few prompts that the SAE is trained on. Everywhere else z is pooled, and the head's output matrix times the
encoder gives the latents: the same integers for a sixth of the work when d_model / d_head is 6.
"""

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from saelab.analysis.circuits.tasks import TaskBatch
from saelab.core.config import Config
from saelab.models.components import Components

Pooling = Literal["last", "mean", "max", "each"]
Score = Literal["difference", "unique"]
ROWS_PER_EXAMPLE = 4
"""Outputs of a head on one prompt that the SAE is trained on at most (pooling ``each`` has one for every position)."""
CHECK_EVERY = 10
"""Steps between two looks at the loss."""


class CodesConfig(Config):
    """Settings of discrete-code circuit identification."""

    pooling: Pooling
    """How a head's outputs on a prompt become integers; there is no default, the result depends on it."""
    latents: int = Field(default=200, gt=0)
    """Latents of the SAE."""
    l1: float = Field(default=0.02, ge=0)
    """Weight of the L1 penalty, on outputs scaled to mean square 1."""
    examples: int = Field(default=10, gt=0)
    """Prompts the SAE is trained on, positives and negatives mixed."""
    epochs: int = Field(default=100, gt=0)
    """Most full-batch steps; training ends earlier on a plateau."""
    lr: float = Field(default=1e-2, gt=0)
    """Adam's learning rate."""
    plateau: float = Field(default=0.02, ge=0, lt=1)
    """Training ends when ten steps take less than this share off the loss; 0 trains for all epochs."""
    score: Score = "difference"
    """What is counted: ``difference`` (chi-squared statistic) or ``unique`` (the paper's count)."""
    shuffles: int = Field(default=100, ge=20)
    """Relabellings for the null."""
    seed: int = 0
    """Of the SAE, its prompts and the relabellings."""


@torch.no_grad()
def head_values(parts: Components, tokens: Int[Tensor, "b t"]) -> Float[Tensor, "heads b t e"]:
    """What every head's values average to by its pattern (z), in the order of ``EdgeGraph.heads``."""
    residual = sum(parts.embed(tokens).values(), torch.zeros(()))
    found: list[Tensor] = []
    for layer in parts.layers:
        x = layer.norm1(residual)
        z = parts.mixed(layer, parts.pattern(layer, x, x), parts.values(layer, x))
        middle = residual + torch.einsum("hbte,hed->btd", z, layer.W_O) + layer.b_O
        residual = middle + layer.mlp(layer.norm2(residual if parts.parallel else middle))
        found.append(z)
    return torch.cat(found)


def output_matrices(parts: Components) -> Float[Tensor, "heads e d"]:
    """Every head's output matrix, in the order of ``EdgeGraph.heads``."""
    return torch.cat([layer.W_O for layer in parts.layers]).detach().float()


@torch.no_grad()
def pooled(
    parts: Components, batch: TaskBatch, pooling: Pooling
) -> tuple[Float[Tensor, "m h e"], Int[np.ndarray, " m"]]:
    """Heads' z, one row per prompt (or per prompt and position), and the prompt of each row; positives come first."""
    found, owners = [], []
    out = output_matrices(parts)
    for side, tokens in enumerate((batch.clean, batch.corrupted)):
        z = head_values(parts, tokens).float()
        valid = batch.valid.to(z.device)
        rows = torch.arange(len(batch))
        if pooling == "last":
            chosen = z[:, rows, batch.readout]
        elif pooling == "mean":
            chosen = (z * valid[None, ..., None]).sum(2) / valid.sum(1)[None, :, None]
        elif pooling == "max":
            size = ((z.flatten(1, 2) @ (out @ out.mT)).view_as(z) * z).sum(-1)
            best = size.masked_fill(~valid, -1).argmax(-1)
            chosen = z.gather(2, best[..., None, None].expand(-1, -1, 1, z.shape[-1])).squeeze(2)
        else:
            chosen = z[:, valid]
            rows = valid.nonzero()[:, 0].cpu()
        found.append(chosen.transpose(0, 1))
        owners.append(rows.numpy() + side * len(batch))
    return torch.cat(found), np.concatenate(owners)


def encode(
    z: Float[Tensor, "m h e"],
    out: Float[Tensor, "h e d"],
    owner: Int[np.ndarray, " m"],
    n_prompts: int,
    config: CodesConfig,
) -> Int[np.ndarray, "m h"]:
    """Train the SAE and return the strongest latent of each output; ``config.latents`` where none is active."""
    generator = torch.Generator().manual_seed(config.seed)
    chosen = torch.randperm(n_prompts, generator=generator)[: config.examples]
    some = z[torch.isin(torch.as_tensor(owner), chosen)]
    rows = torch.einsum("mhe,hed->mhd", some, out).flatten(0, 1)
    most = ROWS_PER_EXAMPLE * config.examples * z.shape[1]
    rows = rows[torch.randperm(len(rows), generator=generator)[:most]]
    scale = rows.square().mean().sqrt().clamp_min(1e-12)
    encoder, b_enc, bias = train(rows / scale, config, generator)
    codes = np.empty(z.shape[:2], np.int64)
    with torch.no_grad():
        constant = b_enc - encoder @ bias
        for head, read in enumerate(out @ encoder.T / scale):
            best = (z[:, head] @ read + constant).max(1)
            codes[:, head] = best.indices.masked_fill(best.values <= 0, config.latents).cpu().numpy()
    return codes


def train(
    rows: Float[Tensor, "n d"], config: CodesConfig, generator: torch.Generator
) -> tuple[Float[Tensor, "f d"], Float[Tensor, " f"], Float[Tensor, " d"]]:
    """ReLU SAE with unit rows in encoder and decoder and one bias before and after; MSE + l1 * mean L1 norm.

    Returns encoder, encoder bias and the other bias: nothing else is needed to read codes off.
    """
    width = rows.shape[1]
    start = torch.randn(config.latents, width, generator=generator)
    encoder, decoder = (start.clone().to(rows).requires_grad_() for _ in range(2))
    b_enc = torch.zeros(config.latents).to(rows).requires_grad_()
    bias = torch.zeros(width).to(rows).requires_grad_()
    optimiser = torch.optim.Adam([encoder, decoder, b_enc, bias], lr=config.lr, fused=True)
    before = float("inf")
    with torch.enable_grad():
        for step in range(1, config.epochs + 1):
            unit_e, unit_d = (torch.nn.functional.normalize(w, dim=1) for w in (encoder, decoder))
            latents = torch.relu((rows - bias) @ unit_e.T + b_enc)
            error = (latents @ unit_d + bias - rows).square().mean()
            loss = error + config.l1 * latents.sum(1).mean()
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            if step % CHECK_EVERY == 0:
                now = float(loss.detach())
                if now > (1 - config.plateau) * before:
                    break
                before = now
    return torch.nn.functional.normalize(encoder.detach(), dim=1), b_enc.detach(), bias.detach()
