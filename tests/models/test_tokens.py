"""Rows of tokens: what is in them, which positions count, and that they are the same wherever one starts."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab.core.config import parse_config
from saelab.core.errors import ConfigError, ModelError, TextError
from saelab.models.text import open_text
from saelab.models.tokens import TokenBatch, TokenRows, TokensConfig, tokenizer_hash

WORDS = [f"w{i}" for i in range(50)]


def make_tokenizer(**special: str) -> Any:
    """One token per word: ids 0.. are the special tokens given, then <unk>, then w0, w1 ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = [*dict.fromkeys(special.values()), "<unk>", *WORDS]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **special)


BOS = make_tokenizer(bos_token="<s>")  # <s> 0, <unk> 1, w0 2
BOTH = make_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>")  # <s> 0, </s> 1, <pad> 2, <unk> 3, w0 4
EOS = make_tokenizer(eos_token="</s>")  # </s> 0, <unk> 1, w0 2
NONE = make_tokenizer()  # <unk> 0, w0 1


def rows_of(tokenizer: Any, documents: Any, n_ctx: int = 4, **config: Any) -> TokenRows:
    return TokenRows(tokenizer, open_text(documents), TokensConfig(**config), n_ctx)


def all_of(rows: TokenRows, size: int = 3, start: int = 0) -> TokenBatch:
    batches = list(rows.batches(size, start))
    first = start
    for batch in batches:
        assert batch.first_row == first
        assert batch.tokens.dtype == torch.int64
        assert batch.keep.dtype == torch.bool
        first += len(batch.tokens)
    return TokenBatch(
        torch.cat([b.tokens for b in batches]), torch.cat([b.keep for b in batches]), batches[0].first_row
    )


# Packing --------------------------------------------------------------------------------------------------------------


def test_packed_rows_begin_with_bos_and_separate_documents() -> None:
    batch = all_of(rows_of(BOS, ["w0 w1", "w2 w3 w4 w5", "w6 w7"]))
    # The stream is w0 w1 <s> w2 w3 w4 w5 <s> w6 w7; a row that would begin with <s> twice has it once; w7 is left over.
    assert batch.tokens.tolist() == [[0, 2, 3, 0], [0, 4, 5, 6], [0, 7, 0, 8]]
    assert batch.keep.tolist() == [[False, True, True, False], [False, True, True, True], [False, True, False, True]]


def test_a_row_that_starts_at_a_document_has_one_bos() -> None:
    assert all_of(rows_of(BOS, ["w0 w1 w2", "w3 w4 w5"])).tokens.tolist() == [[0, 2, 3, 4], [0, 5, 6, 7]]


def test_packed_rows_without_bos_still_separate_documents() -> None:
    batch = all_of(rows_of(BOS, ["w0 w1", "w2 w3 w4 w5", "w6"], bos="never"))
    assert batch.tokens.tolist() == [[2, 3, 0, 4], [5, 6, 7, 0]]
    assert batch.keep.tolist() == [[True, True, False, True], [True, True, True, False]]


def test_the_separator_is_eos_where_there_is_no_bos_and_nothing_where_there_is_neither() -> None:
    assert all_of(rows_of(EOS, ["w0 w1", "w2"])).tokens.tolist() == [[2, 3, 0, 4]]
    rows = rows_of(NONE, ["w0 w1", "w2", "w3"])
    assert all_of(rows).tokens.tolist() == [[1, 2, 3, 4]]
    assert rows.describe()["separator_token_id"] is None


def test_one_document_per_row_is_truncated_padded_and_masked() -> None:
    documents = ["w0 w1", "w2", "w3 w4 w5 w6 w7"]
    batch = all_of(rows_of(BOTH, documents, packing="documents", min_tokens=2, context=5, n_ctx=8))
    assert batch.tokens.tolist() == [[0, 4, 5, 2, 2], [0, 7, 8, 9, 10]]
    assert batch.keep.tolist() == [[False, True, True, False, False], [False, True, True, True, True]]
    batch = all_of(rows_of(BOTH, documents, packing="documents", min_tokens=1, bos="never"))
    assert batch.tokens.tolist() == [[4, 5, 2, 2], [6, 2, 2, 2], [7, 8, 9, 10]]


def test_padding_with_an_ordinary_token_is_masked_by_position() -> None:
    batch = all_of(rows_of(NONE, ["w0 w1"], packing="documents", min_tokens=1))
    assert batch.keep.tolist() == [[True, True, False, False]]


def test_special_tokens_within_the_text_do_not_count() -> None:
    batch = all_of(rows_of(BOS, ["w0 nonsense w1"]))
    assert batch.tokens.tolist() == [[0, 2, 1, 3]]
    assert batch.keep.tolist() == [[False, True, False, True]]


def test_a_tokenizer_set_to_truncate_and_pad_is_not_obeyed_and_not_changed() -> None:
    tokenizer = make_tokenizer(bos_token="<s>", pad_token="<pad>")
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    rows = rows_of(tokenizer, ["w0 w1 w2 w3"], bos="never")
    assert rows.count() == 1
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 2
    assert tokenizer_hash(tokenizer) == tokenizer_hash(make_tokenizer(bos_token="<s>", pad_token="<pad>"))
    assert tokenizer_hash(tokenizer) != tokenizer_hash(BOS)


# Restart and determinism ----------------------------------------------------------------------------------------------

documents_ = st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map(" ".join), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(
    documents=documents_,
    packing=st.sampled_from(["packed", "documents"]),
    bos=st.sampled_from(["auto", "never"]),
    size=st.integers(1, 5),
    start=st.integers(0, 40),
    limit=st.none() | st.integers(1, 10),
)
def test_rows_are_the_same_wherever_one_starts(
    documents: list[str], packing: str, bos: str, size: int, start: int, limit: int | None
) -> None:
    documents.append("w1 w2 w3 w4")
    rows = rows_of(BOTH, documents, packing=packing, bos=bos, min_tokens=2, max_rows=limit)
    whole = all_of(rows, 7)
    assert len(whole.tokens) == rows.count() <= (limit or 10**9)
    batches = list(rows.batches(size, start))
    if start >= len(whole.tokens):
        assert batches == []
        return
    assert batches[0].first_row == start
    assert torch.equal(torch.cat([b.tokens for b in batches]), whole.tokens[start:])
    assert torch.equal(torch.cat([b.keep for b in batches]), whole.keep[start:])


@settings(deadline=None, max_examples=60)
@given(documents=documents_)
def test_packed_rows_hold_every_word_once_in_order(documents: list[str]) -> None:
    documents.append("w1 w2 w3")
    batch = all_of(rows_of(BOS, documents))
    words = [int(w[1:]) + 2 for document in documents for w in document.split()]
    kept = batch.tokens[batch.keep].tolist()
    assert kept == words[: len(kept)]
    assert len(words) - len(kept) < 4


def test_limits() -> None:
    documents = ["w0 w1 w2"] * 10
    assert rows_of(BOS, documents).count() == 10
    assert rows_of(BOS, documents, max_rows=3).count() == 3
    assert rows_of(BOS, documents, max_tokens=11).count() == 2
    assert rows_of(BOS, documents, max_tokens=11, max_rows=1).limit == 1
    assert [len(b.tokens) for b in rows_of(BOS, documents, max_rows=5).batches(2)] == [2, 2, 1]


def test_description_decides_the_rows() -> None:
    rows = rows_of(BOS, ["w0 w1 w2"], max_tokens=9)
    description = rows.describe()
    assert description == {
        "source": "python:list",
        "source_fingerprint": rows.source.fingerprint,
        "tokenizer_hash": tokenizer_hash(BOS),
        "context": 4,
        "packing": "packed",
        "bos": "always",
        "bos_token_id": 0,
        "separator_token_id": 0,
        "min_tokens": None,
        "max_rows": 2,
    }
    assert rows_of(EOS, ["w0 w1 w2"]).describe()["bos"] == "never"


def test_unicode_and_lone_surrogates_reach_the_tokenizer() -> None:
    batch = all_of(rows_of(BOS, ["w0 \ud800 日本 w1", "w2"]))
    assert batch.tokens[0, :3].tolist() == [0, 2, 1]


# Errors ---------------------------------------------------------------------------------------------------------------


def test_text_shorter_than_a_row_says_how_much_there_is() -> None:
    with pytest.raises(TextError) as error:
        list(rows_of(BOS, ["w0", "w1"], n_ctx=16).batches(2))
    assert str(error.value) == "python:list has 2 tokens, one row needs 15; give more text or a shorter context"
    with pytest.raises(TextError, match="the longest document has 2 tokens, fewer than min_tokens 8"):
        rows_of(BOS, ["w0", "w1 w2"], packing="documents", n_ctx=16).count()
    with pytest.raises(TextError, match="holds no text"):
        list(rows_of(BOS, []).batches(2))


def test_bad_settings_are_one_line() -> None:
    for config, message in (
        ({"context": 5}, "context 5 is longer than the model's 4; give at most 4"),
        ({"max_tokens": 3}, "max_tokens 3 is less than one row of 4; give more tokens or a shorter context"),
    ):
        with pytest.raises(ConfigError) as error:
            rows_of(BOS, ["w0"], **config)
        assert str(error.value) == message
    with pytest.raises(ConfigError, match="the tokenizer has no BOS token"):
        rows_of(EOS, ["w0"], bos="always")
    with pytest.raises(ConfigError, match="0 rows per batch"):
        rows_of(BOS, ["w0"]).batches(0)
    with pytest.raises(ConfigError, match="unknown key 'contxt'; did you mean context"):
        parse_config(TokensConfig, {"contxt": 3})
    with pytest.raises(ModelError, match="is not a fast tokenizer"):
        TokenRows(SlowTokenizer(), open_text(["a"]), TokensConfig(), 4)


class SlowTokenizer:
    bos_token_id = eos_token_id = pad_token_id = None
    all_special_ids: list[int] = []


# The thread -----------------------------------------------------------------------------------------------------------


def tokens_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "saelab-tokens"]


def test_errors_of_the_source_are_raised_where_the_rows_are_read() -> None:
    def broken() -> Iterator[str]:
        for _ in range(2000):
            yield "w0 w1 w2"
        raise RuntimeError("the disk is gone")

    batches = rows_of(BOS, broken).batches(100)
    assert len(next(batches).tokens) == 100
    with pytest.raises(RuntimeError, match="the disk is gone"):
        list(batches)
    assert tokens_threads() == []


def test_closing_early_ends_the_thread_and_an_endless_source_is_read_no_further_than_needed() -> None:
    given_out = 0

    def endless() -> Iterator[str]:
        nonlocal given_out
        while True:
            given_out += 1
            yield "w0 w1 w2"

    rows = rows_of(BOS, endless)
    batches = rows.batches(8)
    next(batches)
    assert len(tokens_threads()) == 1
    time.sleep(0.2)  # the thread fills its queue, then waits
    assert given_out < 2000
    batches.close()  # type: ignore[attr-defined]
    assert tokens_threads() == []
    for batch in rows.batches(8):
        assert batch.first_row == 0
        break
    assert tokens_threads() == []


def test_tokenising_runs_ahead_of_a_slow_reader() -> None:
    started = threading.Event()

    def source() -> Iterator[str]:
        for number in range(1024):
            if number == 300:
                started.set()
            yield "w0 w1 w2"

    batches = rows_of(BOS, source).batches(64)
    next(batches)
    assert started.wait(5)  # in the second group, of which nothing has been asked for
    batches.close()  # type: ignore[attr-defined]
