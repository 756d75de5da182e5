"""Loss of the end of a text after its beginning, many texts in one forward pass: beginnings of their own, or shared."""

from collections.abc import Sequence
from typing import Any

import torch

LOGIT_BYTES = 96 << 20
"""Rows run in batches whose float32 logits stay below this."""


@torch.no_grad()
def mean_losses(model: Any, rows: Sequence[tuple[list[int], list[int]]]) -> list[float]:
    """Mean loss (nats) of the second part of each row after the first, which must not be empty.

    Rows of like length share a forward pass; a row longer than the model's context loses its front.
    """
    losses = [0.0] * len(rows)
    order = sorted(range(len(rows)), key=lambda k: len(rows[k][0]) + len(rows[k][1]))
    start = 0
    while start < len(order):
        # The next rows are the longer ones: the last that fits decides the width.
        part = order[start : start + 1]
        while start + len(part) < len(order):
            more = order[start + len(part)]
            width = min(len(rows[more][0]) + len(rows[more][1]), model.n_ctx)
            if 4 * model.d_vocab * width * (len(part) + 1) > LOGIT_BYTES:
                break
            part.append(more)
        start += len(part)
        cut = [((rows[k][0] + rows[k][1])[-model.n_ctx :], min(len(rows[k][1]), model.n_ctx - 1)) for k in part]
        width = max(len(ids) for ids, _ in cut)
        tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in cut])
        first = min(len(ids) - count for ids, count in cut)
        logits = model.logits(tokens)[:, first - 1 : -1].float()
        targets = tokens[:, first:].to(logits.device)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        table = loss.view(targets.shape).cpu().numpy()
        for k, values, (ids, count) in zip(part, table, cut, strict=True):
            losses[k] = float(values[len(ids) - count - first : len(ids) - first].mean())
    return losses


def mean_losses_after(model: Any, head: list[int], tails: Sequence[list[int]]) -> list[float]:
    """Mean loss (nats) of each text after one head, which runs once for all texts of a forward pass."""
    losses = [0.0] * len(tails)
    order = sorted(range(len(tails)), key=lambda k: len(tails[k]))
    while order:
        width = len(tails[order[-1]])
        count = max(1, LOGIT_BYTES // (4 * model.d_vocab * width))
        part, order = order[-count:], order[:-count]
        tokens = torch.tensor([tails[k] + [0] * (width - len(tails[k])) for k in part])
        table = model.losses_after(torch.tensor(head), tokens).cpu().numpy()
        for k, values in zip(part, table, strict=True):
            losses[k] = float(values[: len(tails[k])].mean())
    return losses
