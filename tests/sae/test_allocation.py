"""aux_zipf: AuxK for under-used features."""

import pytest
import torch

from saelab.core.batch import Batch
from saelab.core.config import parse_config
from saelab.sae import StepContext, build_sae
from saelab.sae.allocation import DENSITY_BATCHES
from saelab.sae.mutual_choice import MutualChoiceConfig
from tests.sae import synthetic
from tests.sae.test_contract import D_SAE, N, batch, make


@pytest.mark.parametrize("name", ["mutual_choice", "feature_choice", "matryoshka"])
def test_underused_features_take_the_place_of_the_dead(name):
    sae = make(name, k=4, aux="zipf", zipf_exponent=1.0, zipf_shift=0.0)
    share = 4 / torch.arange(1, D_SAE + 1) / (1 / torch.arange(1, D_SAE + 1)).sum()
    sae.density.copy_(share)
    sae.density[[3, 20]] *= 0.01  # now of the last two ranks, where 4 / 32 / H_32 would be expected
    context = StepContext(aux_k=2, aux_coefficient=0.5)
    assert "aux" not in sae.training_pass(batch(sae), context).losses  # densities are not known yet
    sae.eval()
    sae.batches.fill_(DENSITY_BATCHES)
    sae.density.copy_(share)
    sae.density[[3, 20]] *= 0.01
    assert sae.underused().tolist() == [3, 20]
    losses = sae.training_pass(batch(sae), context).losses
    expected = make(name, k=4)
    expected.load_tensors(sae.tensors())
    expected.eval()
    dead = StepContext(dead=torch.tensor([3, 20]), aux_k=2, aux_coefficient=0.5)
    torch.testing.assert_close(losses, expected.training_pass(batch(sae), dead).losses)


def test_running_density_is_the_corrected_mean():
    sae = make("mutual_choice", k=4)
    counts = []
    for seed in range(3):
        x = torch.randn(N, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        code = sae.encode_training(Batch(x), StepContext()).code
        counts.append((code.to_dense() > 0).double().mean(0))
    weights = torch.tensor([0.98**2, 0.98, 1.0], dtype=torch.float64)
    torch.testing.assert_close(sae.density, (torch.stack(counts) * weights[:, None]).sum(0) / weights.sum())


def test_expected_density_sums_to_k():
    sae = make("mutual_choice", k=4, zipf_shift=3.0)
    assert float(sae.expected_density().sum()) == pytest.approx(4)


@pytest.mark.slow
def test_aux_zipf_uses_more_features_and_reconstructs_better():
    """On the zipf fixture, half of the features held down at the start. (In Feature-Choice it changes little.)"""
    left, error = {}, {}
    for aux in ("dead", "zipf"):
        config = {"d_in": 64, "d_sae": 256, "k": 6, "input_scale": 1.0, "aux": aux}
        sae = build_sae(parse_config(MutualChoiceConfig, config))
        with torch.no_grad():
            sae.b_enc[:128] = -3
        synthetic.train(sae, lambda step: synthetic.zipf(256, seed=step).x, 800, aux_k=32, aux_coefficient=1 / 32)
        x = synthetic.zipf(2048, seed=99999).x
        left[aux], error[aux] = sae.underused().numel(), synthetic.fvu(x, sae(x).detach())
    assert left["zipf"] < 0.95 * left["dead"]
    assert error["zipf"] < 0.96 * error["dead"]
