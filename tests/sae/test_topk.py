import pytest
import torch

from saelab.core.config import parse_config
from saelab.core.errors import ConfigError
from saelab.sae import StepContext, TopKConfig
from tests.sae.test_contract import D_IN, D_SAE, N, batch, draw, make


def test_is_the_equation():
    sae = make("topk", k=5)
    pre = (draw() * 1.7 - sae.b_dec) @ sae.W_enc + sae.b_enc
    kept = pre.topk(5, dim=1)
    expected = torch.zeros_like(pre).scatter(1, kept.indices, kept.values.relu())
    torch.testing.assert_close(sae.encode(draw()).to_dense(), expected)


@pytest.mark.parametrize("k", [1, 5, D_SAE])
def test_sparsity_is_k(k):
    sae = make("topk", k=k)
    code = sae.encode(draw())
    assert code.offsets.tolist() == list(range(0, N * k + 1, k))
    assert code.l0().max() <= k


def test_k_warmup_keeps_more():
    sae = make("topk", k=5)
    for factor, expected in ((1.0, 5), (2.0, 10), (100.0, D_SAE)):
        assert sae.encode_training(batch(sae), StepContext(k_factor=factor)).code.nnz == N * expected


def test_k_above_d_sae_is_one_line():
    with pytest.raises(ConfigError) as error:
        parse_config(TopKConfig, {"d_in": D_IN, "d_sae": 16, "k": 17})
    assert str(error.value) == "config: k = 17 is more than d_sae = 16; lower k or raise d_sae"


def test_encode_is_differentiable_in_x():
    sae = make("topk", k=3).requires_grad_(False)
    x = draw().requires_grad_()
    assert torch.autograd.gradcheck(sae, (x,))
