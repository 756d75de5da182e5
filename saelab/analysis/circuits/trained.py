"""A small attention-only transformer trained to repeat: previous-token and induction heads that nobody set.

GPT-2 with 2 layers of 4 heads, width 96, 20 tokens (0 is BOS), context 32; its MLPs are zero. In its rows the next
token is, half the time, what followed the present one the last time, and otherwise any token: the model has to look
back, and to know when there is nothing to find. Strong weight decay starves heads that it does not need. The checkpoint
in ``data/tasks/induction-trained`` is what :func:`train_induction` writes with its defaults. Which head does what is
measured (:func:`head_roles`), not assumed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.core.assets import asset
from saelab.core.progress import progress
from saelab.models.components import Components

VOCAB, CONTEXT, BATCH, WIDTH = 20, 32, 64, 96


def trained_induction_folder() -> Path:
    """Folder of the checkpoint that ships with saelab."""
    return asset("data", "tasks", "induction-trained")


def train_induction(folder: str | Path, steps: int = 1500, seed: int = 0) -> Path:
    """Train the model and write its folder."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from saelab.models.loading import quiet

    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=CONTEXT,
        n_embd=WIDTH,
        n_layer=2,
        n_head=4,
        n_inner=1,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(seed)
        model: Any = GPT2LMHeadModel(config)
    for block in model.transformer.h:
        for parameter in block.mlp.parameters():
            parameter.requires_grad_(False).zero_()
    learned = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learned, lr=2e-3, weight_decay=0.5)
    with progress("training", steps, unit="steps") as bar:
        for step in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = 2e-3 * min(1.0, (step + 1) / 100, (steps - step) / (0.2 * steps))
            tokens = _rows(generator)
            logits = model(tokens, use_cache=False).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            bar.advance(1)
            bar.note(f"loss {float(loss.detach()):.3f}")
    with quiet():
        model.save_pretrained(folder)
    return Path(folder)


def _rows(generator: torch.Generator) -> Int[Tensor, "b t"]:
    """Rows ``0 t1 t2 ...``: where the present token has come before, its old successor follows every other time."""
    fresh = torch.randint(1, VOCAB, (BATCH, CONTEXT), generator=generator)
    again = torch.rand(BATCH, CONTEXT, generator=generator) < 0.5
    successor = torch.zeros(BATCH, VOCAB, dtype=torch.int64)
    tokens = torch.zeros(BATCH, CONTEXT, dtype=torch.int64)
    rows = torch.arange(BATCH)
    for t in range(1, CONTEXT):
        before = tokens[:, t - 1]
        known = successor[rows, before]
        tokens[:, t] = torch.where(again[:, t] & (known > 0), known, fresh[:, t])
        successor[rows, before] = tokens[:, t]
    return tokens


@dataclass(frozen=True, eq=False)
class HeadRoles:
    """What every head of a model does on repeated random tokens."""

    previous: Float[np.ndarray, "layers heads"]
    """Mean attention to the token before."""
    induction: Float[np.ndarray, "layers heads"]
    """Mean attention, in the repetition, to the token after the same one's first occurrence."""


@torch.no_grad()
def head_roles(parts: Components, period: int = 12, rows: int = 32, seed: int = 0) -> HeadRoles:
    """Measure the roles of every head on ``rows`` rows of a block of ``period`` tokens, twice."""
    generator = torch.Generator().manual_seed(seed)
    block = torch.stack(
        [torch.randperm(parts.model.d_vocab - 1, generator=generator)[:period] + 1 for _ in range(rows)]
    )
    tokens = torch.cat([torch.zeros(rows, 1, dtype=torch.int64), block, block], 1).to(parts.model.device)
    residual = sum(parts.embed(tokens).values(), torch.zeros(()))
    previous, induction = [], []
    for layer in parts.layers:
        x = layer.norm1(residual)
        pattern = parts.pattern(layer, x, x)
        previous.append(pattern.diagonal(-1, 2, 3)[..., 1:].mean((1, 2)))
        # Position t of the second copy (t > period) looks at t - period + 1.
        induction.append(pattern.diagonal(-(period - 1), 2, 3)[..., 2:].mean((1, 2)))
        middle = residual + parts.heads(layer, pattern, parts.values(layer, x)).sum(0) + layer.b_O
        residual = middle + layer.mlp(layer.norm2(residual if parts.parallel else middle))
    found = (torch.stack(scores).double().cpu().numpy() for scores in (previous, induction))
    return HeadRoles(*found)
