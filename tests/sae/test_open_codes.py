"""ReLU, JumpReLU and Gated: equations and gradients against the same thing written densely."""

import pytest
import torch

from saelab.core.batch import Batch
from saelab.core.config import parse_config
from saelab.sae import ARCHITECTURES, StepContext, build_sae
from saelab.sae.activations import jump_relu, step_above
from tests.sae import synthetic
from tests.sae.test_contract import D_SAE, N, batch, draw, make

CONTEXT = StepContext(sparsity_factor=0.5, impl="sparse")


def parts(sae, some):
    z = (some.x - sae.b_dec) @ sae.W_enc + sae.b_enc
    return z, lambda f: (some.x - (f @ sae.W_dec + sae.b_dec)).square().sum(1).mean()


def check(sae, some, expected):
    losses = sae.training_pass(some, CONTEXT).losses
    torch.testing.assert_close(losses, expected)
    results = [
        torch.autograd.grad(sum(terms.values()), list(sae.parameters()), retain_graph=True)
        for terms in (losses, expected)
    ]
    torch.testing.assert_close(*results)


def test_relu():
    sae = make("relu", sparsity=3.0)
    with torch.no_grad():
        sae.W_dec *= 1.5
    some = batch(sae)
    z, mse = parts(sae, some)
    l1 = (z.relu() * sae.W_dec.norm(dim=1)).sum(1).mean()
    check(sae, some, {"mse": mse(z.relu()), "l1": 1.5 * l1})
    torch.testing.assert_close(sae.encode(draw()).to_dense(), z.relu())


def test_gated():
    sae = make("gated", sparsity=3.0)
    with torch.no_grad():
        sae.r_mag.copy_(torch.linspace(-1, 1, D_SAE))
        sae.b_mag.copy_(torch.linspace(0.5, -0.5, D_SAE))
    some = batch(sae)
    gate, mse = parts(sae, some)
    f = (gate > 0) * (((some.x - sae.b_dec) @ sae.W_enc) * sae.r_mag.exp() + sae.b_mag).relu()
    frozen = gate.relu() @ sae.W_dec.detach() + sae.b_dec.detach()
    expected = {
        "mse": mse(f),
        "l1": 1.5 * gate.relu().sum(1).mean(),
        "gate_mse": (some.x - frozen).square().sum(1).mean(),
    }
    check(sae, some, expected)
    torch.testing.assert_close(sae.encode(draw()).to_dense(), f)


class DenseStep(torch.autograd.Function):
    """[z > theta] with the rectangle's gradient, over whole matrices."""

    @staticmethod
    def forward(ctx, z, theta, bandwidth):
        ctx.save_for_backward(z, theta)
        ctx.bandwidth = bandwidth
        return (z > theta).to(z.dtype)

    @staticmethod
    def backward(ctx, g):
        z, theta = ctx.saved_tensors
        near = ((z - theta) / ctx.bandwidth).abs() < 0.5
        return None, -(near * g / ctx.bandwidth).sum(0), None


@pytest.mark.parametrize("penalty", ["target_l0", "l0", "tanh"])
def test_jumprelu(penalty):
    sae = make("jumprelu", penalty=penalty, sparsity=2.0, target_l0=4, bandwidth=0.6, tanh_scale=1.5)
    with torch.no_grad():
        sae.theta.copy_(torch.linspace(0, 1.2, D_SAE))
    some = batch(sae)
    z, mse = parts(sae, some)
    step = DenseStep.apply(z, sae.theta, 0.6)
    # z H(z - theta): d/dz = H; d/dtheta = z dH/dtheta, where the paper takes theta for z within the rectangle.
    f = z * step.detach() + sae.theta.detach() * (step - step.detach())
    l0 = step.sum(1).mean()
    expected = {
        "target_l0": {"l0_penalty": 8 * (l0 / 4 - 1).square()},
        "l0": {"l0_penalty": l0},
        "tanh": {"tanh": torch.tanh(1.5 * f).sum(1).mean()},
    }[penalty]
    check(sae, some, {"mse": mse(f), **expected})
    torch.testing.assert_close(sae.encode(draw()).to_dense(), (z * (z > sae.theta)).detach())
    assert sae.threshold.equal(sae.theta)


def test_estimated_gradients_by_hand():
    z = torch.tensor([0.9, 1.04, 1.06, 3.0], requires_grad=True)
    theta = torch.tensor([1.0], requires_grad=True)
    at = torch.zeros(4, dtype=torch.int64)
    ones = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    out = jump_relu(z, theta, at, 0.1)
    assert out.tolist() == pytest.approx([0, 1.04, 1.06, 3])
    dz, dtheta = torch.autograd.grad(out, (z, theta), ones)
    assert dz.tolist() == [0, 10, 100, 1000]
    assert dtheta.tolist() == pytest.approx([-1.0 / 0.1 * 10])
    (dtheta,) = torch.autograd.grad(step_above(z, theta, at, 0.1), theta, ones)
    assert dtheta.tolist() == pytest.approx([-10 / 0.1])


def test_thresholds_stay_positive_and_travel_under_their_name():
    sae = make("jumprelu")
    with torch.no_grad():
        sae.theta[3] = -1
    sae.after_step()
    assert sae.threshold[3] == 0
    assert "threshold" in sae.tensors()
    assert "theta" not in sae.tensors()


@pytest.mark.parametrize("name", ["relu", "jumprelu", "gated"])
def test_crowded_codes_are_computed_densely_with_the_same_result(name):
    sae = make(name)
    some = batch(sae)
    assert sae.context_for(N * D_SAE // 2, N, StepContext()).impl == "reference"
    assert sae.context_for(N * D_SAE // 16, N, StepContext()).impl == "auto"
    results = []
    for impl in ("auto", "sparse"):
        losses = sae.training_pass(some, StepContext(impl=impl)).losses
        results.append((losses, torch.autograd.grad(sum(losses.values()), list(sae.parameters()))))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("relu", {"sparsity": 2.0}), ("gated", {"sparsity": 4.0}), ("jumprelu", {"target_l0": 6})],
)
def test_training_makes_codes_sparse_and_good(name, settings):
    config = {"architecture": name, "d_in": 64, "d_sae": 256, "input_scale": 4.0} | settings
    sae = build_sae(parse_config(ARCHITECTURES[name].config, config))
    x = synthetic.superpos(1024, seed=999).x
    synthetic.train(sae, lambda step: synthetic.superpos(256, seed=step).x, 250)
    code = sae.encode(x)
    assert float(code.l0().double().mean()) < 40
    assert synthetic.fvu(x, sae(x).detach()) < 0.6
    passed = sae.training_pass(sae.scale_batch(Batch(x)), StepContext())
    assert (passed.code.values > 0).all()
