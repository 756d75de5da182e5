"""Documents to rows of token ids: fixed length, deterministic, tokenised ahead in the background.

Two ways of packing. ``packed`` writes the documents one after the other with a separator token between them and cuts
the stream into rows; nothing is padded and only the last, incomplete row is lost. ``documents`` gives each document a
row of its own, truncated or padded on the right.
"""

import hashlib
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from pydantic import Field
from torch import Tensor

from saelab.core.config import Config
from saelab.core.errors import ConfigError, ModelError, TextError
from saelab.models.text import TextSource

_GROUP_DOCUMENTS = 64
_GROUP_CHARACTERS = 1 << 16
_FIRST_CHARACTERS = 1 << 14
_AHEAD = 4

Row = Int[np.ndarray, " T"]


class TokensConfig(Config):
    """How documents become rows of tokens."""

    context: int | None = Field(None, ge=2)
    """Tokens per row; the model's context when not given."""
    packing: Literal["packed", "documents"] = "packed"
    """"packed": documents one after the other, cut into rows; "documents": one document per row."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Whether each row begins with the BOS token; "auto": when the tokenizer has one."""
    min_tokens: int = Field(8, ge=1)
    """With packing "documents": shorter documents (in tokens, without BOS) are left out."""
    max_rows: int | None = Field(None, ge=1)
    """Stop after this many rows."""
    max_tokens: int | None = Field(None, ge=1)
    """Stop before exceeding this many positions (rows times context)."""


@dataclass(frozen=True)
class TokenBatch:
    """Some consecutive rows."""

    tokens: Int[Tensor, "B T"]
    """Token ids."""
    keep: Bool[Tensor, "B T"]
    """False at BOS, padding and other special tokens: positions that no statistic and no training should use."""
    first_row: int
    """Number of the first row of this batch, counted from the beginning of the source."""


class TokenRows:
    """Rows of tokens of a source: restartable at any row, equal on every pass.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        source: the documents.
        config: how to cut them.
        n_ctx: the model's context; no row is longer.

    Raises:
        ConfigError: ``context`` exceeds ``n_ctx``, ``max_tokens`` is below one row, or bos is "always" and the
            tokenizer has no BOS token.
        ModelError: the tokenizer is not a fast one.

    """

    def __init__(self, tokenizer: Any, source: TextSource, config: TokensConfig, n_ctx: int) -> None:
        self.source = source
        self.config = config
        self.context = config.context or n_ctx
        if self.context > n_ctx:
            raise ConfigError(f"context {self.context} is longer than the model's {n_ctx}; give at most {n_ctx}")
        if config.max_tokens is not None and config.max_tokens < self.context:
            raise ConfigError(
                f"max_tokens {config.max_tokens} is less than one row of {self.context}; "
                "give more tokens or a shorter context"
            )
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int | None = tokenizer.eos_token_id
        if config.bos == "always" and self.bos_id is None:
            raise ConfigError("bos is 'always' but the tokenizer has no BOS token; use bos auto or never")
        self.starts_with_bos = config.bos != "never" and self.bos_id is not None
        self.separator_id = self.bos_id if self.bos_id is not None else self.eos_id
        candidates = (tokenizer.pad_token_id, self.eos_id, self.bos_id, 0)
        self.pad_id: int = next(i for i in candidates if i is not None)
        self.tokenizer_hash = tokenizer_hash(tokenizer)
        self._special = np.array(sorted(tokenizer.all_special_ids), dtype=np.int64)
        self._backend = _plain_backend(tokenizer)
        self._count: int | None = None

    @property
    def limit(self) -> int | None:
        """Rows after which to stop, from ``max_rows`` and ``max_tokens``; ``None`` is the whole source."""
        limits = [] if self.config.max_rows is None else [self.config.max_rows]
        if self.config.max_tokens is not None:
            limits.append(self.config.max_tokens // self.context)
        return min(limits, default=None)

    def describe(self) -> dict[str, Any]:
        """What a manifest records: with an equal description the rows are equal."""
        return {
            "source": self.source.name,
            "source_fingerprint": self.source.fingerprint,
            "tokenizer_hash": self.tokenizer_hash,
            "context": self.context,
            "packing": self.config.packing,
            "bos": "always" if self.starts_with_bos else "never",
            "bos_token_id": self.bos_id,
            "separator_token_id": self.separator_id if self.config.packing == "packed" else None,
            "min_tokens": self.config.min_tokens if self.config.packing == "documents" else None,
            "max_rows": self.limit,
        }

    def count(self) -> int:
        """Number of rows; tokenises the source once (up to the limit), then remembers."""
        if self._count is None:
            self._count = sum(1 for _ in self._rows(threading.Event()))
        return self._count

    def batches(self, rows_per_batch: int, start_row: int = 0) -> Iterator[TokenBatch]:
        """Yield the rows from ``start_row`` on, ``rows_per_batch`` at a time (the last batch may be smaller).

        Rows do not depend on where one starts: rows before ``start_row`` are tokenised again and skipped. Tokenising
        runs in a thread of its own, a few batches ahead; it ends when the iterator is exhausted or closed, and its
        errors are raised here.

        Raises:
            TextError: the text is empty, or too short for a single row.

        """
        if rows_per_batch < 1 or start_row < 0:
            raise ConfigError(
                f"cannot read {rows_per_batch} rows per batch from row {start_row}; give 1 or more from 0 on"
            )
        return self._ahead(rows_per_batch, start_row)

    def _ahead(self, rows_per_batch: int, start_row: int) -> Iterator[TokenBatch]:
        ready: queue.Queue[TokenBatch | BaseException | None] = queue.Queue(maxsize=_AHEAD)
        stop = threading.Event()

        def put(item: TokenBatch | BaseException | None) -> None:
            while not stop.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue

        def work() -> None:
            try:
                for batch in self._batches(rows_per_batch, start_row, stop):
                    put(batch)
                put(None)
            except BaseException as error:
                put(error)

        thread = threading.Thread(target=work, name="saelab-tokens", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join(timeout=10)

    def _batches(self, rows_per_batch: int, start_row: int, stop: threading.Event) -> Iterator[TokenBatch]:
        rows: list[Row] = []
        lengths: list[int] = []
        first = start_row
        for number, (row, length) in enumerate(self._rows(stop)):
            if number < start_row:
                continue
            rows.append(row)
            lengths.append(length)
            if len(rows) == rows_per_batch:
                yield self._batch(rows, lengths, first)
                first += len(rows)
                rows, lengths = [], []
        if rows:
            yield self._batch(rows, lengths, first)

    def _batch(self, rows: list[Row], lengths: list[int], first: int) -> TokenBatch:
        tokens = np.stack(rows)
        real = np.arange(self.context) < np.array(lengths)[:, None]
        keep = real & ~np.isin(tokens, self._special)
        if self.starts_with_bos:
            keep[:, 0] = False
        return TokenBatch(torch.from_numpy(tokens), torch.from_numpy(keep), first)

    def _rows(self, stop: threading.Event) -> Iterator[tuple[Row, int]]:
        """Yield every row and its length without padding, up to the limit; raise when there is none."""
        rows = self._packed(stop) if self.config.packing == "packed" else self._one_per_document(stop)
        limit = self.limit
        for number, row in enumerate(rows, start=1):
            yield row
            if number == limit:
                return

    def _packed(self, stop: threading.Event) -> Iterator[tuple[Row, int]]:
        head = np.array([self.bos_id] if self.starts_with_bos else [], dtype=np.int64)
        between = np.array([] if self.separator_id is None else [self.separator_id], dtype=np.int64)
        body = self.context - len(head)
        stream = np.array([], dtype=np.int64)
        found = rows = 0
        for group in self._encoded(stop):
            pieces = [stream]
            for ids in group:
                if found:
                    pieces.append(between)
                pieces.append(ids)
                found += len(ids)
            stream, at = np.concatenate(pieces), 0
            while True:
                if len(head) and at < len(stream) and stream[at] == self.separator_id:
                    at += 1  # the row's own BOS already separates it from the document before
                if at + body > len(stream):
                    break
                yield np.concatenate([head, stream[at : at + body]]), self.context
                rows += 1
                at += body
            stream = stream[at:]
        if not rows and not stop.is_set():
            raise TextError(
                f"{self.source.name} has {found} tokens, one row needs {body}; give more text or a shorter context"
            )

    def _one_per_document(self, stop: threading.Event) -> Iterator[tuple[Row, int]]:
        head = np.array([self.bos_id] if self.starts_with_bos else [], dtype=np.int64)
        longest = rows = 0
        for group in self._encoded(stop):
            for ids in group:
                longest = max(longest, len(ids))
                if len(ids) < self.config.min_tokens:
                    continue
                row = np.full(self.context, self.pad_id, dtype=np.int64)
                used = np.concatenate([head, ids])[: self.context]
                row[: len(used)] = used
                yield row, len(used)
                rows += 1
        if not rows and not stop.is_set():
            raise TextError(
                f"{self.source.name}: the longest document has {longest} tokens, fewer than min_tokens "
                f"{self.config.min_tokens}; give longer documents or a smaller min_tokens"
            )

    def _encoded(self, stop: threading.Event) -> Iterator[list[Int[np.ndarray, " n"]]]:
        """Yield the token ids of groups of documents; a group is encoded at once, on all cores."""
        group: list[str] = []
        characters = 0
        enough = _FIRST_CHARACTERS  # whoever asked for rows waits for the first group, so it is small
        for document in self.source:
            if stop.is_set():
                return
            group.append(document)
            characters += len(document)
            if len(group) == _GROUP_DOCUMENTS or characters >= enough:
                yield self._encode(group)
                group, characters = [], 0
                enough = _GROUP_CHARACTERS
        if group:
            yield self._encode(group)

    def _encode(self, documents: list[str]) -> list[Int[np.ndarray, " n"]]:
        # A lone surrogate (possible in JSON) is no Unicode text and no tokenizer takes it.
        clean = [document.encode("utf-8", "replace").decode("utf-8") for document in documents]
        encoded = self._backend.encode_batch_fast(clean, add_special_tokens=False)
        return [np.array(item.ids, dtype=np.int64) for item in encoded]


def tokenizer_hash(tokenizer: Any) -> str:
    """Identity of a fast tokenizer as 16 hex digits: vocabulary, rules and special tokens."""
    digest = hashlib.sha256(_plain_backend(tokenizer).to_str().encode())
    digest.update(repr((tokenizer.bos_token_id, tokenizer.eos_token_id, sorted(tokenizer.all_special_ids))).encode())
    return digest.hexdigest()[:16]


def _plain_backend(tokenizer: Any) -> Any:
    """A copy of the tokenizer's backend that neither truncates nor pads, and that no one else changes."""
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"{type(tokenizer).__name__} is not a fast tokenizer; "
            "saelab needs one with a tokenizer.json (use_fast=True)"
        )
    plain = Tokenizer.from_str(backend.to_str())
    plain.no_truncation()
    plain.no_padding()
    return plain
