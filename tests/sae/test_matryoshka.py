import pytest
import torch

from saelab.core.config import parse_config
from saelab.core.errors import ConfigError
from saelab.sae import StepContext
from saelab.sae.matryoshka import MatryoshkaConfig
from tests.sae.test_contract import D_IN, D_SAE, N, batch, draw, make


def test_gradients_equal_dense_autograd():
    sae = make("matryoshka", k=6, prefixes=[0.25, 0.5, 1])
    some = batch(sae)
    losses = sae.training_pass(some, StepContext()).losses
    gradients = torch.autograd.grad(sum(losses.values()), list(sae.parameters()))
    z = (some.x - sae.b_dec) @ sae.W_enc + sae.b_enc
    f = (z.relu().view(-1) * torch.zeros(z.numel()).index_fill(0, z.view(-1).topk(6 * N).indices, 1)).view_as(z)
    errors = [(some.x - (f[:, :size] @ sae.W_dec[:size] + sae.b_dec)).square().sum(1).mean() for size in (8, 16, D_SAE)]
    torch.testing.assert_close(losses, {"mse": errors[2], "prefixes": errors[0] + errors[1]})
    torch.testing.assert_close(gradients, torch.autograd.grad(sum(errors), list(sae.parameters())))


def test_one_prefix_is_mutual_choice():
    one, plain = make("matryoshka", k=6, prefixes=[1]), make("mutual_choice", k=6)
    context = StepContext(dead=torch.tensor([1, 5, 7]), aux_k=2, aux_coefficient=0.5)
    a, b = (sae.training_pass(batch(sae), context).losses for sae in (one, plain))
    assert a.pop("prefixes") == 0
    torch.testing.assert_close(a, b)


def test_prefixes_nest():
    sae = make("matryoshka", k=6)
    code = sae.encode(draw())
    dense = code.to_dense()
    assert sae.config.sizes == (2, 4, 8, 16, 32)
    for level, size in enumerate(sae.config.sizes):
        expected = (dense[:, :size] @ sae.W_dec[:size] + sae.b_dec) / sae.input_scale
        torch.testing.assert_close(sae.decode_prefix(code, level), expected)
    torch.testing.assert_close(sae.decode_prefix(code, 4), sae(draw()))
    with pytest.raises(ConfigError, match="levels 0 to 4, got 5"):
        sae.decode_prefix(code, 5)


@pytest.mark.parametrize("prefixes", [[], [0.5], [0.5, 0.4, 1], [0.001, 1], [0.5, 0.5, 1]])
def test_bad_prefixes_are_one_line(prefixes):
    with pytest.raises(ConfigError) as error:
        parse_config(MatryoshkaConfig, {"d_in": D_IN, "d_sae": D_SAE, "prefixes": prefixes})
    assert "prefixes must rise to 1" in str(error.value)
    assert "\n" not in str(error.value)
