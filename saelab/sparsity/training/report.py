"""What a sparse training reports: counts, not intentions."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from saelab.sparsity.training.target import Target


@dataclass(frozen=True)
class LayerCount:
    """One weight at the end."""

    name: str
    outputs: int
    inputs: int
    sparsity: float
    """Share of its weights that are exactly zero, as counted."""
    masked: float
    """Share of its weights that the mask takes away."""


@dataclass(frozen=True)
class TrainingReport:
    """A sparse training, as counted."""

    recipe: dict[str, Any]
    """The recipe, resolved."""
    sparsity: float
    """Share of all sparse layers' weights that are zero."""
    average_density: float
    """Mean over the steps of the share of their weights that took part (Jin et al.: what predicts the loss)."""
    average_parameters: float
    """Mean over the steps of the number of those weights."""
    seconds: float
    """Seconds spent on sparsity: masks, gradients, swaps."""
    layers: tuple[LayerCount, ...]
    history: tuple[dict[str, float], ...]
    """Now and then: step, sparsity of the masks, and SAD, the share of mask entries changed since the line before."""
    facts: dict[str, float]
    """What the method says beside that: share of weights trained (fish), rank left (sora); means over weights."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


def count(targets: Sequence[Target], masks: Mapping[str, Tensor]) -> tuple[LayerCount, ...]:
    """Count zeros of the weights, and of their masks."""
    return tuple(
        LayerCount(
            t.name,
            *t.shape,
            int((t.weight == 0).sum()) / t.weight.numel(),
            int((~masks[t.name]).sum()) / t.weight.numel(),
        )
        for t in targets
    )
