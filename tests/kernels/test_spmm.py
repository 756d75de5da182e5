import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saelab.core.errors import ConfigError
from saelab.kernels.spmm import SparseWeight, spmm


def case(n, out, into, sparsity, seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, into, generator=g) * (torch.rand(out, into, generator=g) >= sparsity)
    return (torch.randn(n, into, generator=g).to(dtype), weight.to(dtype), torch.randn(out, generator=g).to(dtype))


@given(
    st.integers(0, 40),
    st.integers(1, 12),
    st.integers(1, 12),
    st.sampled_from([0.0, 0.5, 0.95, 1.1]),
    st.integers(0, 9),
)
def test_equal_to_the_dense_layer_ragged_and_empty_too(n, out, into, sparsity, seed):
    x, weight, bias = case(n, out, into, sparsity, seed)
    sparse = SparseWeight.from_dense(weight)
    assert torch.equal(sparse.to_dense(), weight)
    for b in (None, bias):
        expected = torch.nn.functional.linear(x, weight, b)
        for impl in ("reference", "sparse"):
            assert torch.allclose(spmm(x, sparse, b, impl=impl), expected, atol=1e-5)
        assert torch.allclose(spmm(x, sparse, b, transposed=True), expected, atol=1e-5)


def test_tiles_and_strides_do_not_matter(monkeypatch):
    x, weight, bias = case(50, 7, 9, 0.5, 1)
    sparse = SparseWeight.from_dense(weight)
    whole = spmm(x, sparse, bias)
    monkeypatch.setattr("saelab.kernels.spmm.TILE", 16)
    assert torch.equal(spmm(x, sparse, bias), whole)
    assert torch.equal(spmm(x, sparse, bias, transposed=True), whole)
    assert torch.equal(spmm(x.T.contiguous().T, sparse, bias), whole)


def test_bf16_is_added_up_in_float32():
    x, weight, bias = case(30, 5, 400, 0.2, 2, torch.bfloat16)
    found = spmm(x, SparseWeight.from_dense(weight), bias)
    assert found.dtype == torch.bfloat16
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    assert torch.allclose(found.double(), exact, rtol=2**-8, atol=1e-6)


def test_widths_that_do_not_fit_are_named():
    x, weight, _ = case(3, 4, 5, 0.5, 0)
    with pytest.raises(ConfigError, match="x has 4 columns, the sparse weight takes 5"):
        spmm(x[:, :4], SparseWeight.from_dense(weight))
