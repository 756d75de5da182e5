"""Controls are what they say they are."""

import numpy as np
import pytest
import torch

from saelab.analysis.autointerp.controls import (
    ControlDictionary,
    StoreRows,
    neuron_site,
    neurons,
    random_directions,
    shuffled,
    site_sample,
    untrained,
)
from saelab.analysis.autointerp.report import report
from saelab.features.build import build_features
from saelab.features.explanations import Explanation, Score
from saelab.features.protocols import Dictionary, Rows
from tests.analysis.autointerp.planted import WORDS, Planted, PositionModel
from tests.features.fakes import SITE


def test_shuffled_gives_everybody_another_text():
    own = [Explanation(i, "a", f"text {i}") for i in range(50)]
    mixed = shuffled(own, 0)
    assert [e.feature for e in mixed] == list(range(50))
    assert sorted(e.text for e in mixed) == sorted(e.text for e in own)
    assert all(a.text != b.text for a, b in zip(own, mixed, strict=True))
    assert {e.control for e in mixed} == {"shuffled"}
    assert [e.text for e in mixed] != [e.text for e in shuffled(own, 1)]


def test_shuffled_swaps_equal_texts_away():
    own = [Explanation(i, "a", "same" if i < 10 else f"text {i}") for i in range(30)]
    assert all(a.text != b.text for a, b in zip(own, shuffled(own, 0), strict=True))
    assert len(shuffled(own[:5], 0)) == 5  # all the same: nothing to be done, and no endless loop
    assert shuffled(own[:1], 0) == []


def test_store_rows_are_the_text_of_the_store(store, tmp_path):
    rows = StoreRows(store)
    assert isinstance(rows, Rows)
    model = PositionModel(d_vocab=WORDS)
    again = build_features(model, Planted(), rows, SITE, tmp_path / "again")
    for name in ("tokens/ids.npy", "tokens/keep.npy", "tokens/row_offsets.npy", "by_feature/values.npy"):
        assert np.array_equal(again.array(name), store.array(name))


def test_random_directions_fire_as_often_as_asked():
    sample = torch.randn(5000, 12, generator=torch.Generator().manual_seed(0)) + 3
    density = np.array([0.001, 0.01, 0.1, 0.5])
    found = random_directions(sample, density, 0)
    assert isinstance(found, Dictionary)
    fired = (found.encode(sample).to_dense() > 0).float().mean(0).numpy()
    assert fired == pytest.approx(density, abs=3e-4)
    assert torch.allclose(found.W_enc.norm(dim=0), torch.ones(4))


def test_untrained_and_neurons_have_the_l0():
    sample = torch.randn(200, 12, generator=torch.Generator().manual_seed(0))
    sae = Planted(12, 30)
    assert set(untrained(sae, sample, 4.0, 0).encode(sample).l0().tolist()) == {4}
    assert neurons(12, 3.2).encode(sample.abs()).l0().tolist() == [3] * 200
    code = neurons(12, 2.0).encode(torch.tensor([[0.0, -5, 3, 1, 2, 0, 0, 0, 0, 0, 0, 0]]))
    assert sorted(code.indices.tolist()) == [2, 4]
    assert neurons(12, 2.0).encode(-torch.ones(1, 12)).nnz == 0


def test_decode_undoes_encode_for_orthogonal_directions():
    dictionary = ControlDictionary("x", torch.eye(3), torch.ones(3))
    x = torch.tensor([[2.0, 1.5, 1.0]])
    assert torch.allclose(dictionary.decode(dictionary.encode(x)), x)


def test_neuron_site_is_of_the_same_layer():
    class Model:
        def sites(self):
            return ["blocks.0.mlp.hook_post", "blocks.1.mlp.hook_post", "blocks.1.hook_resid_post"]

    assert neuron_site(Model(), "blocks.1.hook_resid_post") == "blocks.1.mlp.hook_post"
    assert neuron_site(Model(), "blocks.2.hook_resid_post") is None
    assert neuron_site(PositionModel(), SITE) is None


def test_site_sample_is_of_kept_tokens(store):
    sample = site_sample(PositionModel(d_vocab=WORDS), store, SITE, 100)
    assert sample.shape == (100, 6)
    assert (sample[:, 0] > 0).all()  # token 0, BOS, is not kept


def test_report_by_hand():
    def score(feature, value, control="", **more):
        return Score(feature, "detection", value, 0, 1, 10, author="a", control=control, **more)

    scores = [score(0, 0.9), score(1, 0.7), score(2, float("nan")), score(0, 0.5, "shuffled", failures=3)]
    found = report(scores, np.array([0.3, 0.1, 0.5]))
    own, control = found.rows
    assert (own.control, own.mean, own.features, own.undefined) == ("", pytest.approx(0.8), 3, 1)
    assert own.weighted == pytest.approx((0.9 * 0.3 + 0.7 * 0.1) / 0.4)
    assert (control.mean, control.failures, control.difference) == (0.5, 3, pytest.approx(0.4))
    frame = found.side_by_side()
    assert frame.loc[0, "SAE"].startswith("0.800")
    assert frame.loc[0, "shuffled"] == "0.500"
    assert len(found.to_frame()) == 2
    assert len(found.plot().data) == 5
