"""Contrastive SAE on planted pairs: concepts that both sides have, concepts that one side has."""

import pytest
import torch

from saelab.core.batch import Batch
from saelab.core.config import parse_config
from saelab.core.errors import ConfigError
from saelab.sae import StepContext, build_sae
from saelab.sae.contrastive import ContrastiveConfig
from tests.sae.synthetic import fvu, train
from tests.sae.test_contract import draw, make

COMMON, DIFFERING, WIDTH = 24, 24, 32


def paired(pairs: int, seed: int, p: float = 0.08):
    """x = codes @ concepts: a pair shares its common codes; a differing concept is on one side at most."""
    g = torch.Generator().manual_seed(777)
    concepts = torch.randn(COMMON + DIFFERING, WIDTH, generator=g)
    concepts /= concepts.norm(dim=1, keepdim=True)
    g.manual_seed(seed)

    def codes(n, width):
        return (torch.rand(n, width, generator=g) < p) * (0.5 + torch.rand(n, width, generator=g))

    both = codes(pairs, COMMON).unsqueeze(1).expand(-1, 2, -1)
    side = torch.nn.functional.one_hot(torch.randint(2, (pairs, DIFFERING), generator=g), 2).transpose(1, 2)
    truth = torch.cat([both, codes(pairs, DIFFERING).unsqueeze(1) * side], 2).flatten(0, 1)
    return truth @ concepts, truth


def trained(contrast: float, steps: int):
    sae = build_sae(
        parse_config(
            ContrastiveConfig,
            {"d_in": WIDTH, "d_sae": 128, "contrast": contrast, "sparsity": 1.0, "initial_bias": -0.5}
            | {"input_scale": 4.0},
        )
    )
    train(sae, lambda step: paired(256, step)[0], steps)
    return sae


def correlations(sae, seed: int = 10**6):
    """For common and for differing concepts: mean over concepts of the best |correlation| in either half."""
    x, truth = paired(4000, seed)
    f = sae.encode(x).to_dense().detach()
    f, truth = (a - a.mean(0) for a in (f, truth))
    c = (truth.T @ f) / (truth.norm(dim=0)[:, None] * f.norm(dim=0).clamp(min=1e-9))
    n = sae.config.n_common
    best = torch.stack([c[:, :n].abs().amax(1), c[:, n:].abs().amax(1)], 1)
    return best[:COMMON].mean(0).tolist(), best[COMMON:].mean(0).tolist()


def density(sae, seed: int = 10**6):
    return (sae.encode(paired(4000, seed)[0]).to_dense() > 0).float().mean(0)


@pytest.mark.slow
def test_csae_halves():
    """With the contrast each kind of concept has its half; without it either half has some of both."""
    plain, contrasted = trained(0.0, 1000), trained(1.0, 1000)
    (cc, cd), (dc, dd) = correlations(plain)
    assert min(cc, cd, dc, dd) > 0.5
    (cc, cd), (dc, dd) = correlations(contrasted)
    assert cc > 0.9
    assert dd > 0.9
    assert cd < 0.3
    assert dc < 0.2
    x, _ = paired(2000, 10**6)
    assert fvu(x, contrasted(x).detach()) < 0.12
    differing = density(contrasted)[contrasted.differing_features]
    assert (differing > 1e-3).sum() >= DIFFERING  # the second term is not met by dying


def contrast_of(sae, x: torch.Tensor) -> float:
    losses = sae.training_pass(sae.scale_batch(Batch(x)), StepContext()).losses
    return float(losses["contrast"].detach())


def test_csae_swap_invariance():
    sae, x = make("contrastive", initial_bias=0.0), draw(12)
    swapped = x.view(6, 2, -1).flip(1).reshape(12, -1)
    a, b = (sae.training_pass(sae.scale_batch(Batch(v)), StepContext()).losses for v in (x, swapped))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name])
    assert contrast_of(sae, x) > 0


def test_contrast_by_hand():
    sae, x = make("contrastive", contrast=0.7, common=0.25), draw(11)  # an odd row is left out
    f = sae.encode(x).to_dense().detach()[:10].view(5, 2, -1)
    n = sae.config.n_common
    expected = (f[:, 0, :n] - f[:, 1, :n]).abs().sum() + (f[:, 0, n:] * f[:, 1, n:]).sum()
    assert n == 8
    assert contrast_of(sae, x) == pytest.approx(0.7 * float(expected) / 5)
    assert len(sae.common_features) == 8
    assert sae.differing_features.tolist() == list(range(8, 32))


def test_constant_pairs_pay_for_every_differing_feature():
    """With both sides equal, agreement is free and each differing feature costs its square: they go dark."""
    sae, x = make("contrastive"), draw(6).repeat_interleave(2, 0)
    f = sae.encode(x).to_dense().detach()[::2, sae.config.n_common :]
    assert contrast_of(sae, x) == pytest.approx(float(f.square().sum()) / 6)
    sae = build_sae(parse_config(ContrastiveConfig, {"d_in": WIDTH, "d_sae": 128, "sparsity": 1.0}))
    train(sae, lambda step: paired(128, step)[0][::2].repeat_interleave(2, 0), 300)
    x = paired(500, 10**6)[0]
    total = sae.encode(x).to_dense().detach().sum(0)
    assert float(total[sae.differing_features].sum()) < 0.15 * float(total.sum())


def test_settings_that_leave_a_half_empty():
    with pytest.raises(ConfigError, match="leaves one half empty"):
        parse_config(ContrastiveConfig, {"d_in": 4, "d_sae": 8, "common": 1.0})
    assert parse_config(ContrastiveConfig, {"d_in": 4, "d_sae": 8, "common": 1.0, "contrast": 0}).n_common == 8
