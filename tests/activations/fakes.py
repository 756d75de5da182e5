"""A model and a text that need no weights and no tokenizer, with activations whose origin can be read off."""

import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saelab.core.errors import SiteError

SITES = {"a": 4, "b": 6}


@dataclass(frozen=True)
class FakeBatch:
    tokens: Tensor
    keep: Tensor


class FakeRows:
    """Text rows with BOS (id 0) at the front; the other ids are random."""

    def __init__(self, n_rows: int, length: int, seed: int = 0, delay: float = 0.0, packing: str = "packed") -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(1, 50, (n_rows, length), generator=generator)
        self.tokens[:, 0] = 0
        self.keep = self.tokens != 0
        self.delay = delay
        self.packing = packing

    def batches(self, rows_per_batch: int, start_row: int = 0) -> Iterator[FakeBatch]:
        for start in range(start_row, len(self.tokens), rows_per_batch):
            time.sleep(self.delay)
            stop = start + rows_per_batch
            yield FakeBatch(self.tokens[start:stop], self.keep[start:stop])

    def describe(self) -> dict[str, Any]:
        checksum = zlib.crc32(self.tokens.numpy().tobytes())
        return {"source": "fake", "fingerprint": f"{checksum:08x}", "packing": self.packing}


class FakeModel:
    """Activations are noise by token and place; their last bits depend on the batch, as in real models."""

    name = "fake"

    def __init__(self, dtype: torch.dtype = torch.float32, fingerprint: str = "crc32:00000000") -> None:
        self.dtype = dtype
        self.fingerprint = fingerprint
        self.tables = {
            site: torch.randn(50, width, generator=torch.Generator().manual_seed(width))
            for site, width in SITES.items()
        }

    def width(self, site: str) -> int:
        if site not in SITES:
            raise SiteError(f"the model has no site '{site}'; did you mean a?")
        return SITES[site]

    def read(self, tokens: Tensor, sites: Sequence[str]) -> dict[str, Tensor]:
        context = tokens.float().cumsum(1)[..., None] * 1e-3 + tokens.float().mean() * 1e-4
        return {site: (self.tables[site][tokens] + context).to(self.dtype) for site in sites}

    def read_with_gradient(
        self, tokens: Tensor, keep: Tensor, sites: Sequence[str]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        values = self.read(tokens, sites)
        return values, {site: value.float() * 2 for site, value in values.items()}


class NumberedRows(FakeRows):
    """Each token's id is its place in the text, so that a stream's order can be read off its batches."""

    def __init__(self, n_rows: int, length: int) -> None:
        super().__init__(1, 1)
        self.tokens = torch.arange(n_rows * length).view(n_rows, length)
        self.keep = torch.ones_like(self.tokens, dtype=torch.bool)


class EchoModel(FakeModel):
    """The activation at site "a" holds the token id (exact in float32 below 2^24)."""

    def read(self, tokens: Tensor, sites: Sequence[str]) -> dict[str, Tensor]:
        return {site: tokens[..., None].expand(-1, -1, SITES[site]).to(self.dtype) for site in sites}
