import pytest
import torch

from saelab.core.batch import Batch
from saelab.core.config import parse_config
from saelab.core.errors import ConfigError
from saelab.sae import ARCHITECTURES, StepContext, build_sae, load_sae, save_sae
from saelab.sae.mutual_choice import MutualChoiceConfig, MutualChoiceSAE
from saelab.training import FitConfig
from tests.sae import synthetic
from tests.sae.test_contract import D_IN, D_SAE, N, batch, draw, make

MAGNITUDES = ["const", "uniform", "exp"]


def dense_gradients(sae, some, budget):
    """The loss written down densely, for autograd."""
    pre = (some.x - sae.b_dec) @ sae.W_enc + sae.b_enc
    mask = torch.zeros(pre.numel()).index_fill_(0, pre.view(-1).topk(budget).indices, 1.0).view_as(pre)
    loss = (some.x - ((pre.relu() * mask) @ sae.W_dec + sae.b_dec)).square().sum(1).mean()
    return loss, torch.autograd.grad(loss, list(sae.parameters()))


@pytest.mark.parametrize("k", [1, 2.5, 20, D_SAE])
def test_gradients_equal_dense_autograd(k):
    sae = make("mutual_choice", k=k)
    some = batch(sae)
    losses = sae.training_pass(some, StepContext()).losses
    gradients = torch.autograd.grad(losses["mse"], list(sae.parameters()))
    torch.testing.assert_close((losses["mse"], gradients), dense_gradients(sae, some, round(k * N)))


@pytest.mark.parametrize("k", [1, 0.5, 5.25, D_SAE])
def test_the_budget_is_spent_exactly(k):
    sae = make("mutual_choice", k=k)
    code = sae.encode_training(batch(sae), StepContext()).code
    assert code.nnz == round(k * N)
    assert sae.encode_training(batch(sae), StepContext(k_factor=2.0)).code.nnz == min(round(2 * k * N), N * D_SAE)


@pytest.mark.parametrize("magnitudes", MAGNITUDES)
@pytest.mark.parametrize("seed", range(3))
def test_mc_optimal_on_orthonormal(magnitudes, seed):
    """With an orthonormal dictionary and true z the error is what was not selected: no allocation can do better."""
    planted = synthetic.ortho(magnitudes=magnitudes, seed=seed)
    errors = {}
    for name, settings in {
        "mutual_choice": {},
        "topk": {},
        "feature_choice": {"quotas": "uniform"},
    }.items():
        config = {"architecture": name, "d_in": 128, "d_sae": 128, "k": 4, "input_scale": 1.0} | settings
        sae = build_sae(parse_config(ARCHITECTURES[name].config, config)).double()
        synthetic.set_oracle(sae, planted.features)
        errors[name] = float(sae.training_pass(Batch(planted.x), StepContext()).losses["mse"].detach())
    best = planted.codes.square().view(-1).sort().values[: -4 * 512].sum() / 512
    assert errors["mutual_choice"] == pytest.approx(float(best))
    assert errors["mutual_choice"] <= min(errors.values()) + 1e-12


@pytest.mark.parametrize("name", ["mutual_choice", "feature_choice", "matryoshka"])
def test_threshold_mode_l0(name):
    """Thresholds learned on batches give, on new tokens one by one, the L0 of training within 5 %."""
    config = {"architecture": name, "d_in": 64, "d_sae": 256, "k": 6, "input_scale": 1.0}
    sae = build_sae(parse_config(ARCHITECTURES[name].config, config)).train()
    for seed in range(150):
        sae.encode_training(Batch(synthetic.zipf(512, seed=seed).x), StepContext())
    sae.eval()
    x = synthetic.zipf(4096, seed=999).x
    codes = [sae.encode_as_trained(Batch(part)) for part in x.split(512)]
    trained = torch.cat([code.l0() for code in codes]).double().mean()
    assert sae.encode(x).l0().double().mean() == pytest.approx(float(trained), rel=0.05)


def test_threshold_is_the_corrected_mean_of_the_least_chosen():
    sae = make("mutual_choice", k=3, threshold_decay=0.9)
    assert sae.threshold is None
    least, weights = [], []
    for seed in range(5):
        x = draw(seed=seed) * 1.7
        code = sae.encode_training(Batch(x), StepContext()).code
        least.append(code.values.min().detach())
        weights.append(0.9 ** (4 - seed))
        if seed == 0:
            torch.testing.assert_close(sae.theta, least[0])  # not 0.1 of it: corrected from the first step
    weights = torch.tensor(weights, dtype=torch.float64)
    expected = (torch.stack(least) * weights).sum() / weights.sum()
    torch.testing.assert_close(sae.threshold, expected.expand(D_SAE))
    pre = (draw() * 1.7 - sae.b_dec) @ sae.W_enc + sae.b_enc
    torch.testing.assert_close(sae.encode(draw()).to_dense(), torch.where(pre > expected, pre, 0))


def test_evaluation_mode_learns_nothing_and_comparison_with_training_changes_nothing():
    sae = make("mutual_choice", k=3).eval()
    sae.encode_training(batch(sae), StepContext())
    assert int(sae.batches) == 0
    sae.train()
    sae.encode_as_trained(Batch(draw()))
    assert int(sae.batches) == 0
    assert sae.training
    sae.encode_training(batch(sae, 0), StepContext())
    assert int(sae.batches) == 0


def test_untrained_keeps_k_per_token():
    sae = make("mutual_choice", k=2.6)
    assert sae.encode(draw()).offsets.diff().tolist() == [3] * N


def test_threshold_is_saved_and_can_be_given(tmp_path):
    sae = make("mutual_choice", k=3).float()
    sae.set_threshold(0.75)
    save_sae(sae, tmp_path / "sae")
    loaded = load_sae(tmp_path / "sae")
    assert loaded.threshold.tolist() == [0.75] * D_SAE
    assert torch.equal(loaded.encode(draw()).to_dense(), sae.encode(draw()).to_dense())


def test_batchtopk_is_the_same_thing():
    sae = {"architecture": "batchtopk", "d_in": D_IN, "d_sae": D_SAE, "k": 4}
    config = parse_config(FitConfig, {"sae": sae})
    assert type(config.sae) is MutualChoiceConfig
    assert config.sae.architecture == "mutual_choice"
    assert type(build_sae(config.sae)) is MutualChoiceSAE
    assert ARCHITECTURES["batchtopk"] is ARCHITECTURES["mutual_choice"]
    assert "batchtopk" not in list(ARCHITECTURES)


def test_k_above_d_sae_is_one_line():
    with pytest.raises(ConfigError) as error:
        parse_config(MutualChoiceConfig, {"d_in": D_IN, "d_sae": 16, "k": 17})
    assert str(error.value) == "config: k = 17 is more than d_sae = 16; lower k or raise d_sae"


def test_differentiable_in_x_at_inference():
    sae = make("mutual_choice", k=3).requires_grad_(False)
    sae.set_threshold(0.4)
    assert torch.autograd.gradcheck(sae, (draw(3).requires_grad_(),))
