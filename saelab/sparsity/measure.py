"""What sparsity costs: the loss of the sparse model and its distance from the dense one, on the same text."""

import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saelab.core.errors import TextError
from saelab.core.progress import progress


@dataclass(frozen=True)
class Cost:
    """Next-token prediction of two models on the same text; predictions of kept tokens count."""

    tokens: int
    """Predictions."""
    loss_dense: float
    """Mean cross-entropy of the dense model, nats."""
    loss_sparse: float
    """Mean cross-entropy of the sparse model, nats."""
    kl: float
    """Mean KL(dense || sparse) of the predicted distributions, nats."""

    @property
    def perplexity_dense(self) -> float:
        """Exp of the dense loss."""
        return math.exp(self.loss_dense)

    @property
    def perplexity_sparse(self) -> float:
        """Exp of the sparse loss."""
        return math.exp(min(self.loss_sparse, 700.0))

    def to_dict(self) -> dict[str, Any]:
        """The fields and both perplexities."""
        return {
            **asdict(self),
            "perplexity_dense": self.perplexity_dense,
            "perplexity_sparse": self.perplexity_sparse,
        }


@torch.no_grad()
def measure(dense: Any, sparse: Any, batches: Iterable[Any], total: int | None = None, *, bar: bool = True) -> Cost:
    """Run two subject models over token batches; ``bar``: show progress, in tokens of ``total``.

    Raises :class:`TextError` when there is nothing to predict.
    """
    sums, n = torch.zeros(3, dtype=torch.float64), 0
    with progress("measure", total, "tokens") if bar else nullcontext() as shown:
        for batch in batches:
            keep = batch.keep[:, 1:].reshape(-1)
            targets = batch.tokens[:, 1:].reshape(-1)[keep]
            logs = [_log_probabilities(model, batch.tokens, keep) for model in (dense, sparse)]
            losses = [F.nll_loss(log, targets.to(log.device), reduction="sum") for log in logs]
            kl = F.kl_div(logs[1], logs[0], log_target=True, reduction="sum")
            sums += torch.stack([*losses, kl]).double().cpu()
            n += len(targets)
            if shown is not None:
                shown.advance(int(batch.tokens.numel()))
    if n == 0:
        raise TextError("the text has no token to predict; give more text")
    return Cost(n, *(float(value) / n for value in sums))


@torch.no_grad()
def loss(model: Any, batches: Iterable[Any]) -> float:
    """Mean cross-entropy of one model over kept tokens, nats."""
    total, n = 0.0, 0
    for batch in batches:
        keep = batch.keep[:, 1:].reshape(-1)
        targets = batch.tokens[:, 1:].reshape(-1)[keep]
        log = _log_probabilities(model, batch.tokens, keep)
        total += float(F.nll_loss(log, targets.to(log.device), reduction="sum").double())
        n += len(targets)
    return total / max(n, 1)


def _log_probabilities(model: Any, tokens: Tensor, keep: Tensor) -> Tensor:
    logits = model.logits(tokens)[:, :-1]
    return F.log_softmax(logits.reshape(-1, logits.shape[-1])[keep.to(logits.device)].float(), dim=-1)
