import pytest
import torch

from saelab.core.batch import Batch
from saelab.core.config import parse_config
from saelab.sae import StepContext, build_sae, load_sae, save_sae
from saelab.sae.transcoder import TranscoderConfig


def make(skip: bool, d_target: int | None = 5):
    config = {"d_in": 8, "d_target": d_target, "d_sae": 32, "k": 4, "skip": skip, "input_scale": 1.7}
    sae = build_sae(parse_config(TranscoderConfig, config), seed=2).double()
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in sae.parameters():
            if parameter is not sae.W_dec:
                parameter.add_(torch.randn(parameter.shape, generator=g, dtype=torch.float64) * 0.2)
    return sae


def draw(seed: int, d: int) -> torch.Tensor:
    return torch.randn(12, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("d_target", [5, None])
def test_gradients_equal_dense_autograd(skip, d_target):
    sae = make(skip, d_target)
    raw = Batch(draw(0, 8), draw(1, d_target or 8))
    some = sae.scale_batch(raw)
    losses = sae.training_pass(some, StepContext()).losses
    gradients = torch.autograd.grad(losses["mse"], list(sae.parameters()))
    z = some.x @ sae.W_enc + sae.b_enc
    best = z.topk(4, dim=1)
    f = torch.zeros_like(z).scatter(1, best.indices, best.values.relu())
    y_hat = f @ sae.W_dec + sae.b_dec + (some.x @ sae.W_skip if skip else 0)
    loss = (some.target - y_hat).square().sum(1).mean()
    torch.testing.assert_close((losses["mse"], gradients), (loss, torch.autograd.grad(loss, list(sae.parameters()))))
    torch.testing.assert_close(sae(raw.x), y_hat / 1.7)


@pytest.mark.parametrize("skip", [True, False])
def test_saved_folded_and_differentiable(skip, tmp_path):
    sae = make(skip)
    torch.testing.assert_close(sae.fold_scale()(draw(0, 8)), sae(draw(0, 8)))
    save_sae(sae.float(), tmp_path / "sae")
    loaded = load_sae(tmp_path / "sae")
    assert loaded.config == sae.config
    assert ("W_skip" in loaded.tensors()) == skip
    assert torch.equal(loaded(draw(0, 8)), sae(draw(0, 8)))
    assert loaded(draw(0, 8)).shape == (12, 5)


def test_skip_path_begins_at_nothing():
    config = parse_config(TranscoderConfig, {"d_in": 8, "d_sae": 32, "k": 4, "skip": True})
    assert build_sae(config).W_skip.eq(0).all()
    assert config.d_out == 8
