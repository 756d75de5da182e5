"""``StepHook``: what a training loop calls around each optimiser step, so that something may keep its weights sparse.

The loops (``saelab.models.pretrain``, ``saelab.training.run``) know only this; the hook of weight sparsity is
:class:`saelab.sparsity.training.SparseTraining`.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class StepHook(Protocol):
    """Step t is ``before_forward(t)``, forward, backward, ``after_backward(t)``, clip, optimiser, ``after_step(t)``."""

    def before_forward(self, step: int) -> None:
        """Put into the parameters what the forward pass is to see."""

    def after_backward(self, step: int) -> None:
        """Put back what the optimiser is to change, and make the gradients its."""

    def after_step(self, step: int) -> None:
        """Change parameters after the optimiser's step."""

    def look(self) -> AbstractContextManager[None]:
        """Within it, between steps, parameters hold what a forward pass sees."""

    def finish(self) -> None:
        """After the last step: leave in the parameters, for good, what a forward pass sees."""

    def state(self) -> dict[str, Tensor]:
        """Everything that the next steps depend on."""

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Return to a state of :meth:`state`."""

    def write(self, folder: Path) -> dict[str, Any]:
        """Write what belongs beside the finished weights into their folder; return what its reports say (JSON-able)."""


class NoHook:
    """The hook of a training that nothing is attached to."""

    def before_forward(self, step: int) -> None:
        """Do nothing."""

    def after_backward(self, step: int) -> None:
        """Do nothing."""

    def after_step(self, step: int) -> None:
        """Do nothing."""

    @contextmanager
    def look(self) -> Iterator[None]:
        """Do nothing."""
        yield

    def finish(self) -> None:
        """Do nothing."""

    def state(self) -> dict[str, Tensor]:
        """Return nothing."""
        return {}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Do nothing."""

    def write(self, folder: Path) -> dict[str, Any]:
        """Return nothing."""
        return {}
