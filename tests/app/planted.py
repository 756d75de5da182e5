"""A store whose every number is known, with tokens that would do harm if they were taken for markup."""

from types import SimpleNamespace

import torch

from saelab.core.code import SparseCode
from saelab.features.build import build_features
from tests.features.fakes import SITE, FakeModel, FakeRows

SMILE = "😀".encode()
TOKENS = [
    b"<bos>",
    b"<script>alert(1)</script>",
    b"**bold** [link](http://x) $x$ :red[y]",
    b"\n",
    "a\u202eb".encode(),
    SMILE[:2],
    SMILE[2:],
    b"seven",
    b"\xff",
    b" &amp; \"quoted\" 'single'",
    b"\t\x1b[31m",
]
"""Tokens 0 .. 10; 0 is BOS. 5 and 6 are the halves of an emoji, 8 is no UTF-8 at all."""


class Tokenizer:
    """Says what the tokens are; as much of a Hugging Face tokenizer as the feature store asks for."""

    all_special_ids = (0,)
    bos_token_id = eos_token_id = 0
    backend_tokenizer = SimpleNamespace(decoder="ByteLevel", pre_tokenizer="")

    def __len__(self):
        return len(TOKENS)

    def convert_ids_to_tokens(self, i):
        from saelab.features.vocabulary import _byte_letters

        letters = {byte: letter for letter, byte in _byte_letters().items()}
        return TOKENS[i].decode() if i == 0 else "".join(letters[byte] for byte in TOKENS[i])


class Planted:
    """Feature 1 fires on token 7 with the number that stands in dimension 1; feature 2 on every kept token with 1."""

    def __init__(self, d_in=6, d_sae=4):
        self.d_in, self.d_sae = d_in, d_sae
        self.W_enc, self.W_dec = torch.eye(d_in, d_sae), torch.eye(d_sae, d_in)
        self.b_enc, self.b_dec = torch.zeros(d_sae), torch.zeros(d_in)

    def encode(self, x):
        dense = torch.zeros(len(x), self.d_sae)
        dense[:, 1] = x[:, 1] * (x[:, 0] == 7)
        dense[:, 2] = 1
        return SparseCode.from_dense(dense)

    def decode(self, code):
        return code.to_dense() @ self.W_dec


class PositionModel(FakeModel):
    """The activation at a position is (token id, position, 0, ...)."""

    def read(self, tokens, sites):
        x = torch.zeros(*tokens.shape, self.d_in)
        x[..., 0] = tokens
        x[..., 1] = torch.arange(tokens.shape[1])
        return dict.fromkeys(sites, x)


def rows():
    """Ten rows of twelve: token 7 at position 1 + r of row r, all other tokens around it."""
    others = [1, 2, 3, 4, 5, 6, 8, 9, 10, 5, 6]
    table = []
    for r in range(10):
        row = [0, *others]
        row[1 + r] = 7
        table.append(row)
    return FakeRows(torch.tensor(table))


def plant(folder):
    """Write the store."""
    model = PositionModel(d_vocab=len(TOKENS), tokenizer=Tokenizer())
    return build_features(model, Planted(), rows(), SITE, folder)
