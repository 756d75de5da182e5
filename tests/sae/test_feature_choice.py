import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab.core.batch import Batch
from saelab.core.config import parse_config
from saelab.sae import StepContext, build_sae
from saelab.sae.activations import raised_relu
from saelab.sae.feature_choice import FeatureChoiceConfig
from saelab.sae.zipf import ranks_of, whole_quotas, zipf_shares
from tests.sae import synthetic
from tests.sae.test_contract import D_SAE, N, batch, make


@settings(max_examples=80, deadline=None)
@given(
    d_sae=st.integers(1, 300),
    n=st.integers(1, 400),
    exponent=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    shift=st.sampled_from([0.0, 3.0, 50.0]),
    phase=st.floats(0, 0.999),
    data=st.data(),
)
def test_fc_quota_sum(d_sae, n, exponent, shift, phase, data):
    total = data.draw(st.integers(0, d_sae * n))
    quotas = whole_quotas(zipf_shares(d_sae, exponent, shift), total, n, phase)
    assert int(quotas.sum()) == total
    assert int(quotas.max()) <= n
    assert int(quotas.min()) >= (1 if total >= d_sae else 0)
    if total >= d_sae:
        assert (quotas.diff() <= 0).all()  # by rank, they never rise


def test_quotas_by_hand():
    """Shares 12/25, 6/25, 4/25, 3/25 of 10 are 4.8, 2.4, 1.6, 1.2: floors 4, 2, 1, 1, then the largest remainders."""
    assert whole_quotas(zipf_shares(4, 1.0, 0.0), 10, 100).tolist() == [5, 2, 2, 1]
    assert whole_quotas(zipf_shares(4, 1.0, 0.0), 10, 3).tolist() == [3, 3, 2, 2]
    assert whole_quotas(zipf_shares(4, 0.0, 0.0), 6, 100).tolist() == [2, 2, 1, 1]


def test_scarce_quotas_go_round():
    shares = zipf_shares(50, 0.0, 0.0)
    given_out = sum(whole_quotas(shares, 20, 10, phase / 10) for phase in range(10))
    assert (given_out >= 3).all()
    assert (given_out <= 5).all()


@pytest.mark.parametrize("kind", ["uniform", "zipf"])
@pytest.mark.parametrize("k", [3, 7.5])
def test_each_feature_takes_its_quota(kind, k):
    sae = make("feature_choice", k=k, quotas=kind, zipf_shift=2.0)
    sae.rank.copy_(torch.randperm(D_SAE, generator=torch.Generator().manual_seed(0)))
    quotas = sae.quotas(N)
    code = sae.encode_training(batch(sae), StepContext()).code
    assert int(quotas.sum()) == round(k * N) == code.nnz
    assert torch.equal(torch.bincount(code.indices, minlength=D_SAE), quotas)
    if kind == "zipf":
        assert quotas[sae.rank.argsort()].tolist() == sorted(quotas.tolist(), reverse=True)
        assert quotas.max() > quotas.min() + 1


@pytest.mark.parametrize("below_zero", ["raise", "none"])
def test_gradients_equal_dense_autograd(below_zero):
    sae = make("feature_choice", k=10, quotas="uniform", below_zero=below_zero)
    with torch.no_grad():
        sae.b_enc[:6] -= 100
    some = batch(sae)
    losses = sae.training_pass(some, StepContext()).losses
    gradients = torch.autograd.grad(losses["mse"], list(sae.parameters()))
    pre = (some.x - sae.b_dec) @ sae.W_enc + sae.b_enc
    mask = torch.zeros_like(pre)
    for i, quota in enumerate(sae.quotas(N).tolist()):
        mask[pre[:, i].topk(quota).indices, i] = 1
    f = pre.relu() * mask
    if below_zero == "raise":  # value 0, derivative 1 ...
        f = torch.where(pre > 0, f, (pre - pre.detach()) * mask)
        f.register_hook(lambda g: torch.where(pre > 0, g, g.clamp(max=0)))  # ... upwards only
    loss = (some.x - (f @ sae.W_dec + sae.b_dec)).square().sum(1).mean()
    torch.testing.assert_close((losses["mse"], gradients), (loss, torch.autograd.grad(loss, list(sae.parameters()))))
    assert (gradients[1][:6].abs().sum() > 0) == (below_zero == "raise")


def test_raised_relu_moves_up_only():
    z = torch.tensor([2.0, 2.0, -1.0, -1.0], requires_grad=True)
    out = raised_relu(z)
    assert out.tolist() == [2, 2, 0, 0]
    (gradient,) = torch.autograd.grad(out, z, torch.tensor([1.0, -1.0, 1.0, -1.0]))
    assert gradient.tolist() == [1, -1, 0, -1]


def test_features_that_are_negative_everywhere_come_alive():
    """Half of the features begin with a bias of -3. ReLU's own gradient leaves them dead."""
    alive = {}
    for below_zero in ("raise", "none"):
        config = {"d_in": 64, "d_sae": 256, "k": 6, "input_scale": 1.0, "below_zero": below_zero, "quotas": "uniform"}
        sae = build_sae(parse_config(FeatureChoiceConfig, config))
        with torch.no_grad():
            sae.b_enc[:128] = -3
        synthetic.train(sae, lambda step: synthetic.zipf(256, seed=step).x, 150)
        code = sae.encode_as_trained(Batch(synthetic.zipf(256, seed=1000).x))
        fired = torch.zeros(256).index_add_(0, code.indices, (code.values > 0).float())
        alive[below_zero] = float((fired[:128] > 0).float().mean())
    assert alive["none"] == 0
    assert alive["raise"] > 0.9


def test_ranks_follow_demand_and_are_not_frozen():
    """With oracle weights, features must be ranked by how often they are truly active, whatever their index."""
    planted = synthetic.ortho(1)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(3))
    p = (0.3 / torch.arange(1, 129))[order.argsort()]
    config = {"d_in": 128, "d_sae": 128, "k": 2, "input_scale": 1.0, "rank_every": 40, "zipf_shift": 0.0}
    sae = build_sae(parse_config(FeatureChoiceConfig, config)).double()
    synthetic.set_oracle(sae, planted.features)
    g = torch.Generator().manual_seed(0)
    for _ in range(120):
        codes = (torch.rand(256, 128, generator=g) < p) * (0.5 + torch.rand(256, 128, generator=g)).double()
        sae.encode_training(Batch(codes @ planted.features), StepContext())
    assert set(sae.rank[order[:4]].tolist()) == {0, 1, 2, 3}
    found = torch.corrcoef(torch.stack([sae.rank.double(), order.argsort().double()]))[0, 1]
    assert found > 0.8


def test_ranks_break_ties_by_index():
    assert ranks_of(torch.tensor([0.5, 0.9, 0.5, 0.1])).tolist() == [1, 0, 2, 3]


def test_thresholds_are_midpoints_and_infinite_before_a_quota():
    sae = make("feature_choice", k=1, quotas="uniform")  # 12 entries for 32 features
    code = sae.encode_training(batch(sae), StepContext()).code
    assert sae.threshold.isinf().sum() == D_SAE - code.nnz
    sae = make("feature_choice", k=8, quotas="uniform")
    sae.encode_training(batch(sae), StepContext())
    pre = ((batch(sae).x - sae.b_dec) @ sae.W_enc + sae.b_enc).sort(dim=0, descending=True).values
    torch.testing.assert_close(sae.threshold, ((pre[2] + pre[3]) / 2).clamp(min=0))
