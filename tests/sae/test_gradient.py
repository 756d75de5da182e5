import pytest
import torch

from saelab.core.batch import Batch
from saelab.core.config import parse_config
from saelab.core.errors import ActivationError, ConfigError
from saelab.sae import StepContext, build_sae
from saelab.sae.gradient import GradientConfig
from tests.sae import synthetic
from tests.sae.test_contract import D_IN, D_SAE, N, batch, draw, make


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_gsae_beta0_is_topk(precision):
    """Bit for bit: codes, losses and gradients."""
    gradient, topk = make("gradient", k=5, beta=0.0).float(), make("topk", k=5).float()
    some = Batch(draw().float(), None, draw(seed=1).float())
    context = StepContext(dead=torch.tensor([1, 2]), aux_k=1, aux_coefficient=0.1, precision=precision)
    results = []
    for sae in (gradient, topk):
        passed = sae.training_pass(sae.scale_batch(some), context)
        grads = torch.autograd.grad(sum(passed.losses.values()), list(sae.parameters()))
        results.append([passed.code.indices, passed.code.values, *passed.losses.values(), *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(gradient.encode(some.x).to_dense(), topk.encode(some.x).to_dense())


def dense_choice(sae, some, beta):
    g = some.gradient / some.gradient.norm(dim=1).mean()
    z = (some.x - sae.b_dec) @ sae.W_enc + sae.b_enc
    best = (z * (1 + beta * (g @ sae.W_dec.T).abs())).topk(sae.config.k, dim=1).indices
    return z, torch.zeros_like(z).scatter(1, best, 1.0)


@pytest.mark.parametrize("beta", [0.0, 0.7, 30.0])
def test_gradients_equal_dense_autograd(beta):
    sae = make("gradient", k=5, beta=beta)
    some = batch(sae)
    losses = sae.training_pass(some, StepContext()).losses
    gradients = torch.autograd.grad(losses["mse"], list(sae.parameters()))
    z, mask = dense_choice(sae, some, beta)
    loss = (some.x - ((z.relu() * mask.detach()) @ sae.W_dec + sae.b_dec)).square().sum(1).mean()
    torch.testing.assert_close((losses["mse"], gradients), (loss, torch.autograd.grad(loss, list(sae.parameters()))))


def test_scale_of_gradients_does_not_matter():
    codes = []
    for factor in (1.0, 1e-4, 1e6):
        sae = make("gradient", k=5, beta=3.0)
        scaled = Batch(draw(), None, draw(seed=1) * factor)
        codes.append(sae.encode_training(sae.scale_batch(scaled), StepContext()).code.to_dense())
        torch.testing.assert_close(float(sae.gradient_norm), float(draw(seed=1).norm(dim=1).mean()) * factor)
    torch.testing.assert_close(codes[0], codes[1])
    torch.testing.assert_close(codes[0], codes[2])


def test_both_modes_of_inference():
    sae = make("gradient", k=5, beta=30.0).eval()
    raw = Batch(draw(), None, draw(seed=1))
    by_gradient, by_size = (sae.encode_batch(raw, select).to_dense() for select in ("grad", "magnitude"))
    z, mask = dense_choice(sae, sae.scale_batch(raw), 30.0)
    torch.testing.assert_close(by_gradient, (z.relu() * mask).detach())
    torch.testing.assert_close(by_size, sae.encode(draw()).to_dense())
    assert not torch.equal(by_gradient, by_size)


def test_influence_is_the_mean_over_tokens():
    sae = make("gradient", k=5)
    sae.encode_training(batch(sae), StepContext())
    g = batch(sae).gradient / batch(sae).gradient.norm(dim=1).mean()
    torch.testing.assert_close(sae.influence, (g @ sae.W_dec.T).abs().mean(0).detach())


def test_gsae_rescues_small_important_latent():
    """Latent 0 is small and the read-out looks at it hard: beta trades reconstruction for what matters downstream."""
    planted = synthetic.ortho(1024, magnitudes="exp", p=0.3, seed=1)
    codes = planted.codes.clone()
    codes[:, 0] = 0.1 * (torch.rand(1024, generator=torch.Generator().manual_seed(0)) < 0.05)
    x = codes @ planted.features
    readout = torch.full((128,), 0.001, dtype=torch.float64)
    readout[0] = 20
    # Loss = (readout . codes(x))^2 / 2 has the gradient (readout . codes) (readout @ features).
    error = codes @ readout
    gradient = error.unsqueeze(1) * (readout @ planted.features)
    found = {}
    for beta in (0.0, 1.0, 10.0):
        config = {"d_in": 128, "d_sae": 128, "k": 16, "beta": beta, "input_scale": 1.0}
        sae = build_sae(parse_config(GradientConfig, config)).double().eval()
        synthetic.set_oracle(sae, planted.features)
        code = sae.encode_batch(Batch(x, None, gradient)).to_dense()
        kept = float((code[:, 0] > 0)[codes[:, 0] > 0].double().mean())
        downstream = float(((code - codes) @ readout).square().mean())
        found[beta] = (synthetic.fvu(x, code @ planted.features), downstream, kept)
    fvu, downstream, kept = zip(*(found[beta] for beta in (0.0, 1.0, 10.0)), strict=True)
    assert fvu[0] <= fvu[1] <= fvu[2]  # magnitude is optimal for reconstruction: beta can only cost
    assert fvu[0] < fvu[2]
    assert downstream[0] > 5 * downstream[1]
    assert kept[0] < 0.1
    assert kept[1] > 0.9
    assert kept[2] > 0.95


def test_first_order_meaning():
    """z_i <W_dec[i], g> is the change of the loss without feature i, for small z_i."""
    g = torch.Generator().manual_seed(0)
    w, v = torch.randn(6, generator=g, dtype=torch.float64), torch.randn(6, generator=g, dtype=torch.float64)
    row = torch.nn.functional.normalize(torch.randn(6, generator=g, dtype=torch.float64), dim=0)
    x = w.clone().requires_grad_()
    loss = torch.tanh(x @ v).square()
    (gradient,) = torch.autograd.grad(loss, x)
    z = 1e-5
    change = loss - torch.tanh((x - z * row) @ v).square()
    torch.testing.assert_close(change.detach(), z * (row @ gradient), rtol=1e-3, atol=0)


def test_missing_gradient_is_one_line():
    sae = make("gradient", k=5)
    with pytest.raises(ActivationError, match="harvest with gradients=true"):
        sae.encode_training(Batch(draw()), StepContext())
    with pytest.raises(ConfigError, match="k = 99 is more than d_sae = 32"):
        parse_config(GradientConfig, {"d_in": D_IN, "d_sae": D_SAE, "k": 99})
    assert sae.needs_gradient
    assert sae.encode_training(batch(sae), StepContext(k_factor=2.0)).code.nnz == 10 * N
