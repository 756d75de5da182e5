"""Metrics of a run: one number per prompt, from the logits at its readout.

| metric | per prompt | larger means |
|---|---|---|
| ``logit_diff`` | logsumexp(right logits) - logsumexp(wrong logits): with one answer each, a difference | better |
| ``logit_margin`` | largest right logit - largest wrong logit | better |
| ``prob_diff`` | summed probability of the right answers - of the wrong ones | better |
| ``nll`` | -log(summed probability of the right answers) | worse |
| ``kl`` | KL(p of the whole model, p of this run) | worse |
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.analysis.circuits.tasks import MetricName, TaskBatch

WORSE = ("nll", "kl")
"""Metrics that rise as the run gets worse."""


def at_readout(logits: Float[Tensor, "n t v"], readout: Int[Tensor, " n"]) -> Float[Tensor, "n v"]:
    """Logits at each prompt's readout."""
    return logits[torch.arange(logits.shape[0], device=logits.device), readout]


def measure(
    name: MetricName, logits: Float[Tensor, "n v"], batch: TaskBatch, reference: Float[Tensor, "n v"]
) -> Float[Tensor, " n"]:
    """Value of a metric for each prompt; ``reference`` are the whole model's logits, which only ``kl`` needs."""
    logits = logits.float()
    if name == "kl":
        log_p, log_q = reference.float().log_softmax(-1), logits.log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if name in ("prob_diff", "nll"):
        log_p = logits.log_softmax(-1)
        right = _pool(log_p, batch.right, "sum")
        return -right if name == "nll" else right.exp() - _pool(log_p, batch.wrong, "sum").exp()
    how = "sum" if name == "logit_diff" else "max"
    return _pool(logits, batch.right, how) - _pool(logits, batch.wrong, how)


def _pool(logits: Float[Tensor, "n v"], answers: Int[Tensor, "n r"], how: str) -> Float[Tensor, " n"]:
    found = logits.gather(1, answers.clamp_min(0)).masked_fill(answers < 0, -torch.inf)
    return found.logsumexp(1) if how == "sum" else found.max(1).values


def accuracy(logits: Float[Tensor, "n v"], batch: TaskBatch) -> float:
    """Share of prompts whose most likely token is a right answer."""
    best = logits.argmax(1, keepdim=True)
    return float((best == batch.right).any(1).float().mean())
