import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saelab.core.errors import ConfigError
from saelab.kernels.n_of_m import fits, pack, packed_linear, semi_structured
from saelab.sparsity.pattern import NofM


@given(st.sampled_from([(1, 2), (2, 4), (1, 8), (7, 8)]), st.integers(1, 5), st.integers(1, 6), st.integers(0, 99))
def test_packed_is_exact_and_multiplies_as_dense(nm, rows, groups, seed):
    n, m = nm
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, groups * m, generator=g)
    weight *= NofM(n, m).mask(weight.abs())
    weight[0, :m] = 0  # a group may hold fewer
    packed = pack(weight, n, m)
    assert torch.equal(packed.to_dense(), weight)
    assert packed.values.shape == (rows, groups, n)
    assert (packed.places[:, :, 1:] > packed.places[:, :, :-1]).all()
    x, bias = torch.randn(3, groups * m, generator=g), torch.randn(rows, generator=g)
    assert torch.allclose(packed_linear(x, packed, bias), x @ weight.T + bias, atol=1e-5)


def test_another_weight_is_refused():
    assert not fits(torch.ones(2, 8), 2, 4)
    assert not fits(torch.zeros(2, 6), 2, 4)
    with pytest.raises(ConfigError, match="not 2:4"):
        pack(torch.ones(2, 8), 2, 4)
    with pytest.raises(ConfigError, match="2:4 runs on CUDA devices only"):
        semi_structured(torch.zeros(64, 64, dtype=torch.float16))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_sparse_tensor_cores_give_the_dense_product():
    weight = torch.randn(128, 256, device="cuda", dtype=torch.float16)
    weight *= NofM(2, 4).mask(weight.float().abs())
    x = torch.randn(64, 256, device="cuda", dtype=torch.float16)
    found = torch.nn.functional.linear(x, semi_structured(weight))
    assert torch.allclose(found, torch.nn.functional.linear(x, weight), atol=0.1)
