from types import SimpleNamespace

import pytest
import torch

from saelab.core.errors import ConfigError, TextError
from saelab.features.rows import describe_rows, dictionary_name, encode_in_parts, pieces, source_name
from tests.features.fakes import FakeRows, Oracle, identity, random_rows


@pytest.mark.parametrize("batch", [1, 2, 3, 50])
def test_the_same_rows_whatever_the_batch(batch):
    rows = random_rows(n_rows=10, length=5)
    taken = list(pieces(rows, batch, 9))
    tokens = torch.cat([piece.tokens for piece in taken])
    assert torch.equal(tokens, rows.tokens[:3])  # 4 kept tokens each
    assert [piece.first_row for piece in taken] == list(range(0, 3, batch))


def test_all_rows_without_a_limit():
    assert sum(piece.n_kept for piece in pieces(random_rows(10, 5), 4, None)) == 40


def test_the_reader_of_rows_is_closed_when_enough_is_read():
    closed = []

    class Reader(FakeRows):
        def batches(self, rows_per_batch, start_row=0):
            try:
                yield from super().batches(rows_per_batch, start_row)
            finally:
                closed.append(True)

    list(pieces(Reader(random_rows().tokens), 1, 3))
    assert closed == [True]


def test_nothing_to_look_at():
    with pytest.raises(TextError, match="fake-text holds no tokens"):
        list(pieces(FakeRows(torch.zeros(3, 3, dtype=torch.int64)), 2, None))
    with pytest.raises(ConfigError, match="rows_per_batch"):
        list(pieces(random_rows(), 0, None))


def test_names():
    assert source_name(random_rows()) == "fake-text"
    assert source_name(SimpleNamespace(batches=len)) == "rows"
    assert describe_rows(random_rows()) == {}
    assert describe_rows(SimpleNamespace(batches=len, describe=lambda: {"context": 8})) == {"context": 8}
    assert dictionary_name(identity()) == "Oracle"


def test_encoding_in_parts_is_encoding(monkeypatch):
    sae = Oracle(torch.randn(6, 9, generator=torch.Generator().manual_seed(0)), torch.zeros(9, 6))
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    whole = sae.encode(x)
    monkeypatch.setattr("saelab.features.rows.ENCODE_BYTES", 4 * 9 * 7)
    torch.testing.assert_close(encode_in_parts(sae, x, "site").to_dense(), whole.to_dense())
    assert encode_in_parts(sae, x[:0], "site").n_tokens == 0
    assert encode_in_parts(sae, x.bfloat16(), "site").values.dtype == torch.float32
