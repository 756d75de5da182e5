"""``Batch``: what a training step receives, and ``BatchSource``: where batches come from."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from saelab.core.errors import ResumeError


@dataclass(frozen=True, eq=False)
class Batch:
    """Activations of N tokens at one site, and what some architectures need beside them."""

    x: Float[Tensor, "n d_in"]
    """Raw activations, float32."""
    target: Float[Tensor, "n d_out"] | None = None
    """What to reconstruct when it is not ``x`` (transcoders)."""
    gradient: Float[Tensor, "n d_in"] | None = None
    """Gradient of the summed next-token loss with respect to ``x`` (gradient SAEs)."""


@runtime_checkable
class BatchSource(Protocol):
    """An endless, seeded, resumable sequence of batches."""

    @property
    def d_in(self) -> int:
        """Width of ``Batch.x``."""

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches from the current position on."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-able exact position: the next batch after loading it is the next batch of this source."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Return to a position given by :meth:`state_dict`."""


def require_same_stream(identity: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Raise :class:`ResumeError` when a saved ``state`` is a position of another source than ``identity`` says."""
    for key, value in identity.items():
        if state.get(key) != value:
            raise ResumeError(
                f"the saved stream position has {key} {state.get(key)!r}, this stream has {value!r}; "
                "resume with the data and the settings of the interrupted run"
            )
