"""``PairedBatches``: pairs of activations as batches for a contrastive SAE."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.core.batch import Batch, require_same_stream
from saelab.core.errors import ActivationError, ConfigError


class PairedBatches:
    """A ``BatchSource`` over pairs held in memory: row 2i of a batch is a positive side, row 2i + 1 its negative one.

    Each epoch visits the pairs in a new order; what does not fill the last batch is left out until the next epoch.
    """

    def __init__(
        self,
        positive: Float[Tensor, "n d"],
        negative: Float[Tensor, "m d_negative"],
        batch_size: int,
        *,
        context: Float[Tensor, "n d_context"] | None = None,
        seed: int = 0,
        fingerprint: str = "",
    ) -> None:
        """``context`` (what both sides begin with) is put before either side; ``fingerprint`` names the data."""
        if positive.shape != negative.shape or (context is not None and context.shape[0] != positive.shape[0]):
            raise ActivationError(
                f"pairs need as many positive as negative sides of one width, got {tuple(positive.shape)} and "
                f"{tuple(negative.shape)}"
            )
        if batch_size % 2:
            raise ConfigError(f"training.batch_size is {batch_size}, but pairs need an even number")
        if positive.shape[0] < batch_size // 2:
            raise ConfigError(
                f"there are {positive.shape[0]} pairs, fewer than the {batch_size // 2} of one batch; lower "
                "training.batch_size or give more pairs"
            )
        self.positive = _with(context, positive)
        """Positive sides with their context (n, d_in)."""
        self.negative = _with(context, negative)
        """Negative sides."""
        self.batch_size, self.seed = batch_size, seed
        self._identity = {"pairs": positive.shape[0], "batch_size": batch_size, "seed": seed, "data": fingerprint}
        self._position = {"epoch": 0, "batch": 0}

    @property
    def d_in(self) -> int:
        """Width of ``Batch.x``."""
        return self.positive.shape[1]

    def __len__(self) -> int:
        """Return the number of pairs."""
        return self.positive.shape[0]

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches from the current position on, for ever."""
        per_batch = self.batch_size // 2
        n_batches = len(self) // per_batch
        while True:
            epoch, first = self._position["epoch"], self._position["batch"]
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(len(self), generator=generator)
            for number in range(first, n_batches):
                self._position = {"epoch": epoch, "batch": number + 1}
                chosen = order[number * per_batch : (number + 1) * per_batch]
                yield Batch(torch.stack([self.positive[chosen], self.negative[chosen]], 1).flatten(0, 1))
            self._position = {"epoch": epoch + 1, "batch": 0}

    def state_dict(self) -> dict[str, Any]:
        """Return the exact position."""
        return {**self._identity, **self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Return to a position of :meth:`state_dict`; :class:`ResumeError` when it is of other pairs."""
        require_same_stream(self._identity, state)
        self._position = {key: int(state[key]) for key in self._position}


def _with(context: Tensor | None, side: Tensor) -> Float[Tensor, "n d_in"]:
    return side.float() if context is None else torch.cat([context.float(), side.float()], 1)
