"""``TextStream``: batches of whole rows of text with their activations, for training with the model in the loop.

Rows are visited in random order within windows of ``window`` rows (of token ids, so a window is cheap), each epoch in
another order. A batch has the fewest rows that may hold ``batch_size`` tokens, so its size varies a little.
"""

from collections.abc import Generator, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saelab.core.batch import Batch, require_same_stream
from saelab.core.errors import ActivationError, TextError
from saelab.training.end_to_end import SpliceableModel, TextBatch


@runtime_checkable
class Texts(Protocol):
    """Rows of token ids (``saelab.models.tokens.TokenRows``)."""

    def batches(self, rows_per_batch: int, start_row: int = 0) -> Iterator[Any]:
        """Yield objects with ``tokens`` and ``keep``, the same rows every time."""

    def describe(self) -> dict[str, Any]:
        """Say what text and which tokenisation this is."""


@runtime_checkable
class TextModel(SpliceableModel, Protocol):
    """A model with sites and a fingerprint."""

    @property
    def fingerprint(self) -> str:
        """Hash of its weights."""

    def width(self, site: str) -> int:
        """Width of a site."""


class TextStream:
    """A ``BatchSource`` of :class:`TextBatch`, endless and exact to resume."""

    whole_texts = True

    def __init__(
        self,
        model: TextModel,
        rows: Texts,
        site: str,
        batch_size: int,
        *,
        target_site: str | None = None,
        later: Sequence[str] = (),
        seed: int = 0,
        window: int = 4096,
    ) -> None:
        """``later`` are sites whose clean activations each batch carries (:attr:`TextBatch.later`)."""
        self._model, self._rows, self._site, self._target = model, rows, site, target_site
        self._batch_size, self._later, self._seed, self._window = batch_size, list(later), seed, window
        self._d_in = model.width(site)
        self._identity = {
            "model": model.fingerprint,
            "text": rows.describe(),
            "sites": [site, target_site],
            "batch_size": batch_size,
            "seed": seed,
            "window": window,
        }
        self._position = {"epoch": 0, "start_row": 0, "taken": 0}

    @property
    def d_in(self) -> int:
        """Width of ``Batch.x``."""
        return self._d_in

    def state_dict(self) -> dict[str, Any]:
        """Return the exact position."""
        return {**self._identity, **self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Return to a position of :meth:`state_dict`; :class:`ResumeError` when it is of another stream."""
        require_same_stream(self._identity, state)
        self._position = {key: int(state[key]) for key in self._position}

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches from the current position on."""
        while True:
            epoch, start, taken = (self._position[key] for key in ("epoch", "start_row", "taken"))
            window = self._window_at(start)
            if window is None or window.tokens.shape[0] == 0:
                if start == 0:
                    raise TextError("the text has no rows; give more text, or check the tokenizer")
                self._position = {"epoch": epoch + 1, "start_row": 0, "taken": 0}
                continue
            count, length = window.tokens.shape
            generator = torch.Generator().manual_seed((self._seed * 1_000_003 + epoch) * 1_000_003 + start)
            order = torch.randperm(count, generator=generator)
            step = max(1, -(-self._batch_size // length))
            for begin in range(taken, count, step):
                chosen = order[begin : begin + step]
                self._position = {"epoch": epoch, "start_row": start, "taken": begin + step}
                if window.keep[chosen].any():
                    yield self._batch(window.tokens[chosen], window.keep[chosen])
            self._position = {"epoch": epoch, "start_row": start + count, "taken": 0}

    def _window_at(self, start_row: int) -> Any:
        batches = self._rows.batches(self._window, start_row=start_row)
        try:
            return next(batches, None)
        finally:
            if isinstance(batches, Generator):  # the rows may be read ahead by a thread: let it end
                batches.close()

    @torch.no_grad()
    def _batch(self, tokens: Int[Tensor, "b t"], keep: Bool[Tensor, "b t"]) -> TextBatch:
        seen: dict[str, Tensor] = {}

        def look(name: str) -> Any:
            def visit(x: Tensor) -> Tensor:
                seen[name] = x
                return x

            return visit

        names = dict.fromkeys([self._site, *([self._target] if self._target else []), *self._later])
        clean = self._model.logits(tokens, {name: look(name) for name in names})
        x = seen[self._site]
        kept = keep.to(x.device)
        if not bool(torch.isfinite(x[kept]).all()):
            raise ActivationError(f"activations at {self._site} hold NaN or infinity; try the model in float32")
        return TextBatch(
            x=x[kept].float(),
            target=None if self._target is None else seen[self._target][kept].float(),
            tokens=tokens,
            keep=keep,
            clean=clean,
            later={name: seen[name] for name in self._later},
        )
