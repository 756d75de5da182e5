r"""The exact bytes of every token, so that text is shown faithfully and without the model.

A byte-level BPE token may hold a part of a character; ``tokenizer.decode`` would show it as a replacement sign. Here a
token is its bytes, and what is not valid UTF-8 is shown as ``\xe2``.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from saelab.core.errors import SaelabError
from saelab.features.arrays import map_npy, write_npy

OFFSETS, BYTES = "vocabulary/offsets.npy", "vocabulary/bytes.npy"


def token_bytes(model: Any) -> list[bytes]:
    """Bytes of the token ids 0 .. d_vocab - 1 of a model; ``<17>`` for an id without a text of its own."""
    pieces = [f"<{i}>".encode() for i in range(model.d_vocab)]
    try:
        tokenizer = getattr(model, "tokenizer", None)
    except SaelabError:  # the model is usable without a tokenizer, its tokens just have no text
        return pieces
    if tokenizer is None:
        return pieces
    special = set(getattr(tokenizer, "all_special_ids", ()))
    byte_level = _is_byte_level(tokenizer)
    for i in range(min(model.d_vocab, len(tokenizer))):
        piece = tokenizer.convert_ids_to_tokens(i)
        if piece is not None:
            pieces[i] = piece.encode() if i in special else piece_bytes(piece, byte_level)
    return pieces


def piece_bytes(piece: str, byte_level: bool) -> bytes:
    """Bytes that a vocabulary entry stands for: GPT-2's byte letters, or SentencePiece's ``▁`` and ``<0x0A>``."""
    if byte_level:
        letters = _byte_letters()
        if all(letter in letters for letter in piece):
            return bytes(letters[letter] for letter in piece)
        return piece.encode()  # an added token, kept as it is
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return bytes([int(piece[3:5], 16)])
        except ValueError:
            return piece.encode()
    return piece.replace("▁", " ").encode()


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return "ByteLevel" in f"{backend.decoder!r} {backend.pre_tokenizer!r}"
    return any("Ġ" in piece for piece in tokenizer.get_vocab())


@lru_cache(maxsize=1)
def _byte_letters() -> dict[str, int]:
    """GPT-2's letters for the 256 bytes: printable Latin-1 stands for itself, the others follow from U+0100 on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def write_vocabulary(folder: Path, pieces: Sequence[bytes]) -> None:
    """Write the bytes of all tokens."""
    write_npy(folder / OFFSETS, np.cumsum([0, *map(len, pieces)], dtype=np.int64))
    write_npy(folder / BYTES, np.frombuffer(b"".join(pieces), np.uint8))


class Vocabulary:
    """The bytes of all tokens of a feature store."""

    def __init__(self, folder: Path) -> None:
        self._offsets: list[int] = map_npy(folder / OFFSETS).tolist()
        self._bytes = map_npy(folder / BYTES).tobytes()

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def bytes_of(self, token_id: int) -> bytes:
        """Bytes of one token."""
        return self._bytes[self._offsets[token_id] : self._offsets[token_id + 1]]

    def strings(self, token_ids: Sequence[int] | np.ndarray) -> list[str]:
        r"""Each token as text, its parts of characters as ``\xe2``."""
        return [self.bytes_of(int(i)).decode("utf-8", "backslashreplace") for i in token_ids]

    def text(self, token_ids: Sequence[int] | np.ndarray) -> str:
        """Tokens joined to text; characters that lie across tokens are whole."""
        return b"".join(self.bytes_of(int(i)) for i in token_ids).decode("utf-8", "backslashreplace")
