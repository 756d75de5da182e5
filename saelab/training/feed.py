"""Batches, checked and brought to the device."""

from collections.abc import Generator, Iterator
from dataclasses import replace

import torch

from saelab.core.batch import Batch, BatchSource
from saelab.core.errors import ActivationError, ConfigError, StoreError


def open_batches(batches: BatchSource) -> Generator[Batch, None, None]:
    """Iterate as a generator, so that closing it closes the source's own iterator with its threads."""
    yield from batches


def rows_to_check(batches: BatchSource, rows: int) -> int | None:
    """Return the tokens each batch must have; None for a source of whole texts, whose batches are about that size."""
    return None if getattr(batches, "whole_texts", False) else rows


def next_batch(source: Iterator[Batch], step: int, rows: int | None) -> Batch:
    """Return the next batch, checked; of ``rows`` tokens unless that is None."""
    batch = next(source, None)
    if batch is None:
        raise StoreError(f"the data ended after {step} batches; use an endless stream or fewer tokens")
    if rows is not None and batch.x.shape[0] != rows:
        raise ConfigError(f"the data come in batches of {batch.x.shape[0]}, but training.batch_size is {rows}")
    for name, tensor in (("x", batch.x), ("target", batch.target), ("gradient", batch.gradient)):
        # A sum is one fast pass; only when it is not finite is it worth looking at every row.
        if tensor is not None and not torch.isfinite(tensor.sum()):
            bad = (~torch.isfinite(tensor).all(dim=1)).nonzero().squeeze(1).tolist()
            if bad:
                more = f" and {len(bad) - 8} more" if len(bad) > 8 else ""
                raise ActivationError(
                    f"step {step}: {name} has NaN or infinity in batch rows {', '.join(map(str, bad[:8]))}{more}; "
                    "harvest again in float32, or exclude outlier rows"
                )
    return batch


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch on ``device``."""
    if device.type == "cpu":
        return batch
    moved = (None if t is None else t.to(device, non_blocking=True) for t in (batch.x, batch.target, batch.gradient))
    x, target, gradient = moved
    assert x is not None
    return replace(batch, x=x, target=target, gradient=gradient)
