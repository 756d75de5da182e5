"""The two evaluations that train: absorption on the planted hierarchy, and the meta-SAE."""

import pytest
import torch

from saelab.analysis.saebench.hierarchy import planted_absorption, sample, small_config
from saelab.analysis.saebench.meta_structure import meta_structure
from saelab.sae import ARCHITECTURES
from saelab.sae.topk import TopKConfig


def test_children_come_with_their_parents():
    data = sample(4000, seed=1)
    basis = torch.linalg.qr(torch.randn(128, 128, generator=torch.Generator().manual_seed(0)))[0].T
    codes = data.x @ basis.T
    on = codes[:, :84] > 0.5
    assert torch.equal(on[:, :4], data.parents)
    children = on[:, 4:].view(-1, 4, 20)
    assert not (children.any(-1) & ~data.parents).any()
    assert (children.sum(-1) <= 1).all()
    assert 0.45 < float(children.any(-1)[data.parents].float().mean()) < 0.55
    assert not torch.equal(sample(10, seed=2).x, sample(10, seed=3).x)


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_every_architecture_has_a_small_one(name):
    entry = ARCHITECTURES[name]
    extra = {"d_target": 7} if "d_target" in entry.config.model_fields else {}
    large = entry.config(d_in=192, d_sae=2048, **extra)
    small = small_config(large, d_in=64, d_sae=32, k=2)
    assert (small.d_in, small.d_out, small.d_sae, small.input_scale) == (64, 64, 32, None)
    assert getattr(small, "k", 2) == 2


def test_a_dictionary_sparser_than_the_truth_absorbs():
    found = planted_absorption(TopKConfig(d_in=192, d_sae=1024, k=32), steps=500, n=8000)
    assert found.config["classes_scored"] >= 3
    assert found.value("probe_f1") > 0.95
    assert found.value("mean_absorption_fraction_score") > 0.1
    assert found.value("mean_absorption_fraction_score") > found.value("mean_absorption_fraction_score", "untrained")
    assert "mean_absorption_fraction_score" in {flag.metric for flag in found.flags()}


def test_rows_made_of_few_directions_are_explained_better_than_random_ones():
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(24, 64, generator=generator)
    pick = torch.rand(192, 24, generator=generator).argsort(1)[:, :3]
    rows = common[pick].sum(1)
    found = meta_structure(rows, steps=400)
    assert found.config["meta_width"] == 48
    assert found.value("decoder_fraction_variance_explained") > 0.8
    assert found.value("decoder_fraction_variance_explained", "untrained") < 0.6
    assert found.flags() == []
