import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab.analysis.pursuit import gradient_pursuit, orthogonal_pursuit, pursue
from saelab.core.errors import ConfigError
from saelab.sae import ARCHITECTURES
from tests.sae.synthetic import ortho, set_oracle, superpos


def planted(k, n=1500, d=64, features=256, seed=0):
    """Tokens of exactly k of 256 random unit features in 64 dimensions, values 0.5 to 1.5."""
    g = torch.Generator().manual_seed(seed)
    atoms = torch.randn(features, d, generator=g)
    atoms /= atoms.norm(dim=1, keepdim=True)
    support = torch.rand(n, features, generator=g).topk(k, dim=1).indices
    codes = torch.zeros(n, features).scatter_(1, support, 0.5 + torch.rand(n, k, generator=g))
    return codes @ atoms, atoms, codes


def fvu(x, x_hat):
    return float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum())


@pytest.mark.parametrize("run", [gradient_pursuit, orthogonal_pursuit])
def test_pursuit_exact_orthonormal(run):
    data = ortho(tokens=300)
    codes, x, atoms = data.codes.float(), data.x.float(), data.features.float()
    budget = (codes > 0).sum(1)
    found = run(x, atoms, budget)
    assert bool((found.code.l0() <= budget).all())
    torch.testing.assert_close(found.code.to_dense(), codes, atol=1e-5, rtol=1e-5)
    assert float(found.residual.abs().max()) < 1e-4


@pytest.mark.parametrize(("k", "recall", "unexplained"), [(3, 1.0, 0.008), (6, 0.998, 0.011), (10, 0.964, 0.027)])
def test_pursuit_beats_a_linear_encoder_in_superposition(k, recall, unexplained):
    x, atoms, codes = planted(k)
    found = gradient_pursuit(x, atoms, k).code.to_dense()
    assert float(((found > 0) & (codes > 0)).sum() / (codes > 0).sum()) >= recall - 0.01
    assert fvu(x, found @ atoms) <= unexplained + 0.005
    linear = x @ atoms.T
    top = linear.topk(k, dim=1)
    encoder = torch.zeros_like(linear).scatter_(1, top.indices, top.values.clamp_min(0))
    assert fvu(x, found @ atoms) < fvu(x, encoder @ atoms) / 5


@given(st.integers(0, 10_000), st.integers(1, 12))
@settings(max_examples=25, deadline=None)
def test_residual_never_grows_support_within_budget_weights_not_negative(seed, k):
    g = torch.Generator().manual_seed(seed)
    atoms = torch.randn(24, 8, generator=g) * (0.2 + torch.rand(24, 1, generator=g))
    x = torch.randn(20, 8, generator=g)
    before = x.norm(dim=1)
    for budget in range(1, k + 1):
        found = gradient_pursuit(x, atoms, budget)
        assert int(found.code.l0().max()) <= budget
        assert bool((found.code.values > 0).all())
        assert bool((found.residual.norm(dim=1) <= before * (1 + 1e-5)).all())
        torch.testing.assert_close(found.residual, x - found.code.to_dense() @ atoms, atol=1e-4, rtol=1e-4)
        before = found.residual.norm(dim=1)


def test_every_token_has_its_own_budget():
    x, atoms, _ = planted(6, n=40)
    budget = torch.arange(40) % 7
    mixed = gradient_pursuit(x, atoms, budget).code.to_dense()
    for b in range(7):
        alone = gradient_pursuit(x[budget == b], atoms, b).code.to_dense()
        torch.testing.assert_close(mixed[budget == b], alone)


def test_orthogonal_pursuit_is_scikit_learns():
    from sklearn.linear_model import orthogonal_mp

    x, atoms, _ = planted(5, n=60)
    found = orthogonal_pursuit(x, atoms, 5).code.to_dense()
    expected = orthogonal_mp(atoms.T.double().numpy(), x.T.double().numpy(), n_nonzero_coefs=5).T
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-3)


def test_zero_signal_zero_budget_and_no_tokens():
    atoms = torch.eye(4)
    assert gradient_pursuit(torch.zeros(3, 4), atoms, 2).code.nnz == 0
    assert orthogonal_pursuit(torch.zeros(3, 4), atoms, 2).code.nnz == 0
    assert gradient_pursuit(torch.ones(3, 4), atoms, 0).code.nnz == 0
    assert gradient_pursuit(torch.ones(0, 4), atoms, 2).code.n_tokens == 0
    with pytest.raises(ConfigError, match="below 0"):
        gradient_pursuit(torch.ones(2, 4), atoms, torch.tensor([1, -1]))


def test_pursue_uses_the_saes_units():
    data = superpos(tokens=400)
    config = ARCHITECTURES["topk"].config(architecture="topk", d_in=64, d_sae=256, k=6, input_scale=0.25)
    sae = ARCHITECTURES["topk"].sae(config)
    set_oracle(sae, data.features)
    with torch.no_grad():
        sae.b_dec.fill_(0.5)
    sae.requires_grad_(False)
    x = (data.x + 0.5) / 0.25
    code = sae.encode(x)
    better = pursue(sae, x, code.l0())
    assert bool((better.l0() <= code.l0()).all())
    assert fvu(x, sae.decode(better)) < fvu(x, sae.decode(code)) / 2
    with pytest.raises(ConfigError, match="unknown pursuit 'matching'"):
        pursue(sae, x, 3, "matching")
