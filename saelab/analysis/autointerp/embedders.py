"""Texts to vectors: a model of sentence-transformers by name, or character n-grams, which need nothing."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from saelab.core.errors import ConfigError

CHARACTERS = "characters"
"""Name of the built-in embedder."""
INSTRUCTION = "Instruct: Retrieve sentences that could be related to the explanation.\nQuery:"
"""What stands before a query for embedding models that are told what to look for."""


@runtime_checkable
class Embedder(Protocol):
    """Turns texts into vectors of norm 1 (or 0)."""

    name: str
    """What it is called in results."""

    def documents(self, texts: Sequence[str]) -> Float32[np.ndarray, "n d"]:
        """Vectors of texts that are searched."""

    def queries(self, texts: Sequence[str]) -> Float32[np.ndarray, "n d"]:
        """Vectors of texts that are searched for."""


class CharacterEmbedder:
    """Hashed character n-grams with inverse document frequencies: knows spelling, knows no meaning.

    ``corpus`` gives the frequencies. A text's vector counts, for each of ``width`` buckets, the n-grams (of bytes)
    hashed into it with a random sign, times log(1 + N / (1 + documents with the bucket)), at norm 1.
    """

    name = CHARACTERS

    def __init__(self, corpus: Sequence[str] = (), width: int = 1024, lengths: Sequence[int] = (2, 3, 4)) -> None:
        self.width, self.lengths = width, tuple(lengths)
        self._weight = np.ones(width, np.float32)
        if corpus:
            seen = np.zeros(width, np.int64)
            for k in range(0, len(corpus), 4096):
                seen += (self._counts(corpus[k : k + 4096]) != 0).sum(0)
            self._weight = np.log1p(len(corpus) / (1 + seen)).astype(np.float32)

    def documents(self, texts: Sequence[str]) -> Float32[np.ndarray, "n d"]:
        """Vectors of texts."""
        made = np.zeros((len(texts), self.width), np.float32)
        for k in range(0, len(texts), 4096):
            part = self._counts(texts[k : k + 4096]) * self._weight
            made[k : k + 4096] = part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-30)
        return made

    queries = documents

    def _counts(self, texts: Sequence[str]) -> Float32[np.ndarray, "n width"]:
        pieces = [b" " + text.encode("utf-8", "replace") + b" " for text in texts]
        lengths = np.array([len(piece) for piece in pieces], np.int64)
        data = np.frombuffer(b"".join(pieces), np.uint8).astype(np.uint64)
        text_of = np.repeat(np.arange(len(pieces)), lengths)
        counts = np.zeros(len(pieces) * self.width)
        for n in self.lengths:
            if len(data) < n:
                continue
            inside = np.flatnonzero(text_of[: len(data) - n + 1] == text_of[n - 1 :])
            code = np.full(len(inside), n, np.uint64)
            for place in range(n):
                code = _mixed(code * np.uint64(257) + data[inside + place])
            bucket = (code % np.uint64(self.width)).astype(np.int64)
            sign = np.where(code >> np.uint64(63), 1.0, -1.0)
            counts += np.bincount(text_of[inside] * self.width + bucket, sign, minlength=len(counts))
        return counts.reshape(len(pieces), self.width).astype(np.float32)


def _mixed(code: np.ndarray) -> np.ndarray:
    """Spread the bits of integers (the finaliser of splitmix64); wraps around by intention."""
    code = (code ^ (code >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    code = (code ^ (code >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    spread: np.ndarray = code ^ (code >> np.uint64(31))
    return spread


class SentenceEmbedder:
    """A model of sentence-transformers, by hub name or folder."""

    def __init__(self, name: str, device: str = "cpu") -> None:
        try:
            from sentence_transformers import (  # type: ignore[import-not-found, unused-ignore]
                SentenceTransformer,
            )
        except ImportError:
            raise ConfigError(
                f"embedder '{name}' needs sentence-transformers; pip install sentence-transformers, or give --embedder "
                f"{CHARACTERS}"
            ) from None
        self.name = name
        try:
            self._model: Any = SentenceTransformer(name, device=device)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"cannot load embedder '{name}': {reason}") from None

    def documents(self, texts: Sequence[str]) -> Float32[np.ndarray, "n d"]:
        """Vectors of texts."""
        found = self._model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(found, np.float32)

    def queries(self, texts: Sequence[str]) -> Float32[np.ndarray, "n d"]:
        """Vectors of explanations, with the instruction to look for what they describe."""
        return self.documents([INSTRUCTION + text for text in texts])


def open_embedder(name: str, corpus: Sequence[str], device: str = "cpu") -> Embedder:
    """Return an embedder: ``characters``, or the name or folder of a sentence-transformers model."""
    return CharacterEmbedder(corpus) if name == CHARACTERS else SentenceEmbedder(name, device)
