import math

import pytest
import torch
from quality_measure import HeldOut, measure, measure_as_trained, usage

from saelab.activations.harvest import HarvestConfig, harvest
from saelab.analysis.evaluate import evaluate
from saelab.core.progress import set_progress
from saelab.models.subject import load_model
from saelab.models.text import open_text
from saelab.models.tokens import TokenRows, TokensConfig
from saelab.sae.mutual_choice import MutualChoiceConfig, MutualChoiceSAE
from saelab.sae.topk import TopKConfig, TopKSAE

SITE = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def heldout(tmp_path_factory):
    set_progress(False)
    model = load_model("embedded")
    text = [f"def f{i}(self, value):\n    return self.x{i} + [value, {i}]\n" for i in range(60)]
    rows = TokenRows(model.tokenizer, open_text(text), TokensConfig(context=32, max_rows=16), model.n_ctx)
    store = harvest(model, rows, [SITE], tmp_path_factory.mktemp("store") / "s", HarvestConfig())
    return HeldOut(model, store, rows, SITE, ce_rows=12)


def test_the_numbers_are_those_of_evaluate(heldout):
    sae = TopKSAE(TopKConfig(d_in=192, d_sae=64, k=8, input_scale=0.1), seed=0)
    ours = measure(sae, heldout)
    n = int(heldout.test.sum())
    config = TokensConfig(context=32, max_rows=12)
    text = [f"def f{i}(self, value):\n    return self.x{i} + [value, {i}]\n" for i in range(60)]
    rows = TokenRows(heldout.model.tokenizer, open_text(text), config, heldout.model.n_ctx)
    theirs = evaluate(heldout.model, sae, rows, SITE)
    assert theirs.n_tokens == n
    assert heldout.about()["ce_rows"] == 12
    for ours_key, their_value in {
        "fvu": theirs.fvu,
        "l0": theirs.l0,
        "dead": theirs.dead_fraction,
        "shrinkage": theirs.shrinkage,
        "ce": theirs.ce_sae,
        "ce_recovered": theirs.ce_recovered,
    }.items():
        assert ours[ours_key] == pytest.approx(their_value, rel=1e-4), ours_key
    assert heldout.ce_clean == pytest.approx(theirs.ce_clean, rel=1e-5)
    assert heldout.ce_zero == pytest.approx(theirs.ce_zero, rel=1e-5)
    assert heldout.ce_mean == pytest.approx(theirs.ce_mean, rel=1e-4)


def test_validation_tokens_are_other_tokens(heldout):
    sae = TopKSAE(TopKConfig(d_in=192, d_sae=64, k=8, input_scale=0.1), seed=0)
    assert measure(sae, heldout, test=False, ce=False)["fvu"] != measure(sae, heldout, ce=False)["fvu"]
    assert int(heldout.row[heldout.test].max()) < int(heldout.row[~heldout.test].min())


def test_the_choice_of_training_spends_the_budget(heldout):
    sae = MutualChoiceSAE(MutualChoiceConfig(d_in=192, d_sae=64, k=6, input_scale=0.1), seed=0)
    assert measure_as_trained(sae, heldout, 64)["l0_as_trained"] == pytest.approx(6, abs=0.2)


def test_usage_of_a_law_and_of_one_feature():
    density = (torch.arange(1, 101, dtype=torch.float64) + 20) ** -1.0
    assert usage(density) == {"dead": 0, "underused": 0}
    one = torch.zeros(100, dtype=torch.float64)
    one[7] = 1.0
    assert usage(one) == {"dead": pytest.approx(0.99), "underused": pytest.approx(0.99)}
    assert not math.isnan(usage(torch.zeros(4, dtype=torch.float64))["dead"])
