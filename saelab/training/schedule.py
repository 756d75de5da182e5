"""Schedules: pure functions of the step."""

from saelab.training.config import TrainingConfig


def learning_rate(config: TrainingConfig, d_sae: int, step: int) -> float:
    """Return the learning rate of step ``step`` (from 0): linear warm-up, flat, linear decay to 0.

    The first step is not 0 and the last is not wasted: step s counts as the middle of its interval.
    """
    total, at = config.steps, step + 0.5
    rise = at / (config.lr_warmup * total) if config.lr_warmup else 1.0
    fall = (total - at) / (config.lr_decay * total) if config.lr_decay else 1.0
    return config.peak_lr(d_sae) * min(1.0, rise, fall)


def k_factor(config: TrainingConfig, step: int) -> float:
    """Return what the sparsity target is multiplied by: from ``k_warmup_factor`` linearly down to 1."""
    if config.k_warmup == 0:
        return 1.0
    left = max(0.0, 1 - step / (config.k_warmup * config.steps))
    return 1 + (config.k_warmup_factor - 1) * left


def sparsity_factor(config: TrainingConfig, step: int) -> float:
    """Return what sparsity penalties are multiplied by: from 0 linearly up to 1."""
    return min(1.0, (step + 1) / (config.sparsity_warmup * config.steps)) if config.sparsity_warmup else 1.0
