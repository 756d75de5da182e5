from types import SimpleNamespace

import pytest

from saelab.core.errors import ModelError
from saelab.features.vocabulary import Vocabulary, piece_bytes, token_bytes, write_vocabulary


def byte_level_tokenizer():
    """A byte-level BPE without merges: one token per byte, and one special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|end of text|>")


def test_every_byte_of_a_byte_level_vocabulary_comes_back(tmp_path):
    tokenizer = byte_level_tokenizer()
    model = SimpleNamespace(d_vocab=len(tokenizer) + 2, tokenizer=tokenizer)
    pieces = token_bytes(model)
    assert sorted(pieces[:256]) == [bytes([i]) for i in range(256)]
    assert pieces[256:] == [b"<|end of text|>", b"<257>", b"<258>"]
    write_vocabulary(tmp_path, pieces)
    vocabulary = Vocabulary(tmp_path)
    text = "naïve [bold] ▁ € 🙂\n\t\x1b[31m"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text.encode())
    assert vocabulary.text(ids) == text
    assert len(vocabulary) == model.d_vocab


def test_parts_of_characters_are_shown_as_bytes(tmp_path):
    write_vocabulary(tmp_path, [b"\xe2\x82", b"\xac", "é".encode(), b""])
    vocabulary = Vocabulary(tmp_path)
    assert vocabulary.strings([0, 1, 2, 3]) == ["\\xe2\\x82", "\\xac", "é", ""]
    assert vocabulary.text([0, 1, 2]) == "€é"


@pytest.mark.parametrize(
    ("piece", "expected"),
    [("▁once", b" once"), ("<0x0A>", b"\n"), ("<0xZZ>", b"<0xZZ>"), ("Ġ", "Ġ".encode()), ("é", "é".encode())],
)
def test_sentencepiece_pieces(piece, expected):
    assert piece_bytes(piece, byte_level=False) == expected


def test_a_model_without_tokenizer_shows_numbers():
    class Bare:
        d_vocab = 2

        @property
        def tokenizer(self):
            raise ModelError("no tokenizer")

    assert token_bytes(Bare()) == [b"<0>", b"<1>"]
    assert token_bytes(SimpleNamespace(d_vocab=1, tokenizer=None)) == [b"<0>"]


def test_real_llama_vocabulary(shared):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "stories260K")
    pieces = token_bytes(SimpleNamespace(d_vocab=512, tokenizer=tokenizer))
    text = "Once upon a time,\nthere was a naïve 🙂 dog."
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(pieces[i] for i in ids).decode().strip() == text
