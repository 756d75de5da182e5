"""What a pruning method wants to know about a layer's inputs, collected over the calibration text."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from saelab.core.errors import ActivationError
from saelab.sparsity.layers import Layer

Need = Literal["moments", "gram", "inputs"]
"""First two moments of every input; also X^T X; also the inputs themselves."""


class InputStatistics:
    """Sums over the calibration tokens of one layer's inputs x (d,), in float64.

    ``gram`` and ``inputs`` are there when they were asked for. Layers that read the same activation have equal
    statistics, each its own copy.
    """

    def __init__(self, width: int, need: Need) -> None:
        self.n = 0
        """Tokens seen."""
        self._need: Need = need
        self._sum = torch.zeros(width, dtype=torch.float64)
        self._squares = torch.zeros(width, dtype=torch.float64)
        self._gram = torch.zeros(width, width, dtype=torch.float64) if need != "moments" else None
        self._inputs: list[Tensor] = []

    def update(self, x: Float[Tensor, "n d"]) -> None:
        """Add some tokens' inputs."""
        x = x.detach().float().cpu()
        self.n += x.shape[0]
        self._sum += x.sum(0, dtype=torch.float64)
        self._squares += x.square().sum(0, dtype=torch.float64)
        if self._gram is not None:
            self._gram += (x.T @ x).double()
        if self._need == "inputs":
            self._inputs.append(x)

    @property
    def mean(self) -> Float[Tensor, " d"]:
        """Mean of each input."""
        return self._sum / max(self.n, 1)

    @property
    def variance(self) -> Float[Tensor, " d"]:
        """Variance of each input (population)."""
        return (self._squares / max(self.n, 1) - self.mean.square()).clamp_min(0)

    @property
    def norm(self) -> Float[Tensor, " d"]:
        """Euclidean norm of each input over all tokens: the ||X_j||_2 of Wanda."""
        return self._squares.sqrt()

    @property
    def gram(self) -> Float[Tensor, "d d"]:
        """X^T X."""
        assert self._gram is not None, "the Gram matrix was not asked for"
        return self._gram

    @property
    def inputs(self) -> Float[Tensor, "n d"]:
        """All inputs, in order."""
        assert self._need == "inputs", "the inputs were not asked for"
        return torch.cat(self._inputs)

    def require_finite(self, name: str) -> None:
        """Raise :class:`ActivationError` when an input was NaN or infinite."""
        if not bool(self._squares.isfinite().all()):
            raise ActivationError(f"the inputs of {name} hold NaN or infinity on the calibration text; try float32")


@contextmanager
def watched(layers: Sequence[Layer], need: Need) -> Iterator[dict[str, InputStatistics]]:
    """Collect the inputs of some layers of a model while it runs within the block."""
    found = {layer.name: InputStatistics(layer.shape[1], need) for layer in layers}
    handles = [layer.module.register_forward_pre_hook(_collect(found[layer.name])) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _collect(statistics: InputStatistics) -> Any:
    def hook(module: Any, given: tuple[Tensor, ...]) -> None:
        statistics.update(rearrange(given[0], "... d -> (...) d"))

    return hook
