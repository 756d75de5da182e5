"""What a pretraining is made of, and its learning-rate schedule."""

import math
from typing import Literal

from pydantic import Field, model_validator

from saelab.core.config import Config


class PretrainConfig(Config):
    """Everything that decides what a pretrained model becomes."""

    train: str = "stdlib:train"
    """Text to train on, as for ``open_text``."""
    heldout: str = "stdlib:heldout"
    """Text to measure on."""
    column: str = "text"
    """Text column, where the text is .jsonl, .parquet or a dataset."""
    start: str | None = None
    """Model folder (or "embedded") to go on from: its tokenizer and weights, which must have the sizes below. Null:
    from scratch."""
    vocab_size: int = Field(4096, ge=257)
    """Tokens in the byte-level BPE vocabulary: 256 bytes, <|endoftext|>, merges."""
    n_layers: int = Field(4, ge=1)
    """Transformer blocks."""
    d_model: int = Field(192, ge=1)
    """Width of the residual stream."""
    n_heads: int = Field(6, ge=1)
    """Attention heads per block; must divide d_model."""
    context: int = Field(256, ge=8)
    """Longest row the model can read, and the length it is trained on."""
    steps: int = Field(4000, ge=1)
    """Optimiser steps."""
    batch_rows: int = Field(16, ge=1)
    """Rows per step; a step sees batch_rows * context tokens."""
    micro_rows: int = Field(8, ge=1)
    """Rows per forward and backward pass; smaller needs less memory and changes nothing else."""
    lr: float = Field(2.5e-3, gt=0)
    """Peak learning rate."""
    lr_final: float = Field(0.05, ge=0, le=1)
    """Learning rate at the end, as a share of the peak (cosine in between)."""
    warmup_steps: int = Field(150, ge=0)
    """Steps of linear warm-up."""
    weight_decay: float = Field(0.1, ge=0)
    """AdamW's decay of matrices; vectors (biases, norms) have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's moment decays."""
    clip: float = Field(1.0, gt=0)
    """Largest gradient norm."""
    bos_share: float = Field(0.8, ge=0, le=1)
    """Share of the training rows that begin with <|endoftext|>."""
    repeat_share: float = Field(0.0, ge=0, le=1)
    """Share of the training rows that are one piece of the text over and over (see CropSampler): teaches induction."""
    repeat_after: int = Field(0, ge=0)
    """Steps before the first such row."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Of matrix products in training (bfloat16: autocast; weights and moments stay in float32)."""
    save_dtype: Literal["float32", "float16"] = "float16"
    """Of the weights on disk; they are loaded as float32 either way."""
    eval_every: int = Field(250, ge=1)
    """Steps between looks at the held-out text."""
    eval_bytes: int = Field(100_000, ge=1)
    """Held-out text for those looks; the final figure is from all of it."""
    checkpoint_every: int = Field(100, ge=1)
    """Steps between checkpoints, from which an interrupted run resumes."""
    seed: int = Field(0, ge=0)
    """Of initial weights and training rows."""

    @model_validator(mode="after")
    def _check(self) -> "PretrainConfig":
        if self.d_model % self.n_heads:
            raise ValueError(f"n_heads {self.n_heads} does not divide d_model {self.d_model}; choose a divisor")
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be below steps {self.steps}")
        return self


def lr_at(step: int, config: PretrainConfig) -> float:
    """Learning rate of step ``step`` (from 0): linear warm-up, then a cosine from ``lr`` to ``lr * lr_final``."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps)
    return config.lr * (config.lr_final + (1 - config.lr_final) * 0.5 * (1 + math.cos(math.pi * done)))
