import pytest
import torch

from saelab.kernels import info
from saelab.kernels.product import BLOCK_COLUMNS, product, use_onednn


def close(made, x, w, bias=None):
    expected = x.double() @ w.double().T + (0 if bias is None else bias.double())
    torch.testing.assert_close(made.double(), expected, rtol=1e-5, atol=1e-5 * max(x.shape[1], 1) ** 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("n", "d", "m"),
    [(1, 1, 1), (7, 3, 5), (33, 65, 129), (2, 4, 2 * BLOCK_COLUMNS + 3), (0, 4, 5), (3, 4, 0), (3, 0, 4)],
)
def test_product_is_the_matrix_product(n, d, m, dtype):
    g = torch.Generator().manual_seed(0)
    x, w, bias = (torch.randn(*shape, generator=g, dtype=dtype) for shape in ((n, d), (m, d), (m,)))
    close(product(x, w), x, w)
    close(product(x, w, bias), x, w, bias)
    out = torch.full((n, m), torch.nan, dtype=dtype)
    for b in (None, bias):
        assert product(x, w, b, out=out) is out
        close(out, x, w, b)


def test_product_takes_views():
    g = torch.Generator().manual_seed(0)
    big = torch.randn(40, 70, generator=g)
    close(product(big[::2, 3:33], big[1::3, 40:70]), big[::2, 3:33], big[1::3, 40:70])
    close(product(big[:30].T, big[10:].T), big[:30].T, big[10:].T)
    held = torch.zeros(50, 2 * BLOCK_COLUMNS)
    x, w = big[:, :9], torch.randn(2 * BLOCK_COLUMNS, 9, generator=g)
    product(x, w, out=held[:40])
    close(held[:40], x, w)
    assert not held[40:].any()


def test_product_keeps_nan_and_infinity_in_their_rows():
    x = torch.ones(5, 8)
    x[1, 2], x[3, 0] = torch.nan, torch.inf
    made = product(x, torch.ones(6, 8))
    assert made.isnan().all(1).tolist() == [False, True, False, False, False]
    assert made.isfinite().all(1).tolist() == [True, False, True, False, True]


def test_product_is_reproducible_and_has_a_fallback(monkeypatch):
    g = torch.Generator().manual_seed(0)
    x, w, bias = torch.randn(64, 32, generator=g), torch.randn(500, 32, generator=g), torch.randn(500, generator=g)
    assert torch.equal(product(x, w, bias), product(x, w, bias))
    assert info()["machine"]["f32_product"] == ("oneDNN" if use_onednn(x) else "torch.mm")
    assert not use_onednn(x.double())
    assert product(x.bfloat16(), w.bfloat16()).dtype == torch.bfloat16
    monkeypatch.setattr(torch._C, "_has_mkldnn", False)
    assert not use_onednn(x)
    assert info()["machine"]["f32_product"] == "torch.mm"
    close(product(x, w, bias), x, w, bias)
