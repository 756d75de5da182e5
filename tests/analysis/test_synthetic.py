import itertools

import pytest
import torch

from saelab.analysis import synthetic


@pytest.mark.parametrize("make", [synthetic.ortho, synthetic.superpos, synthetic.zipf, synthetic.hier])
def test_fixtures_are_what_they_say(make):
    x, features, codes = make(tokens=4000)
    torch.testing.assert_close(x, codes @ features)
    torch.testing.assert_close(features.norm(dim=1), torch.ones_like(features[:, 0]))
    assert float(codes.min()) == 0
    assert not torch.equal(make(tokens=10, seed=1).x, make(tokens=10, seed=2).x)
    assert torch.equal(make(tokens=10, seed=1).x, make(tokens=10, seed=1).x)


def test_zipf_has_its_law():
    density = (synthetic.zipf(tokens=40000).codes > 0).double().mean(0)
    rank = torch.arange(1, 257, dtype=torch.float64)
    slope = torch.linalg.lstsq(torch.stack([rank.log(), torch.ones(256)], 1), density.log().unsqueeze(1)).solution[0]
    assert -1.1 < float(slope) < -0.9
    assert abs(float(density.sum()) - 6) < 0.1


def test_children_imply_their_parent_and_one_comes_at_a_time():
    codes = synthetic.hier(tokens=20000, parents=4, children=3, p=0.2).codes
    active = codes > 0
    parents, children = active[:, :4], active[:, 4:].unflatten(1, (4, 3))
    assert not bool((children.any(2) & ~parents).any())
    assert int(children.sum(2).max()) == 1
    share = children.sum((0, 2)) / parents.sum(0)
    torch.testing.assert_close(share, torch.full((4,), 0.5), atol=0.03, rtol=0)


def test_recovery_of_the_truth_and_of_nothing():
    features = synthetic.superpos(tokens=1).features
    shuffled = 3 * features[torch.randperm(256, generator=torch.Generator().manual_seed(0))]
    found = synthetic.recovery(shuffled, features)
    assert found.recovered == 1
    assert found.mmcs == pytest.approx(1, abs=1e-5)
    assert found.matched == pytest.approx(1, abs=1e-5)
    random = synthetic.recovery(torch.randn(256, 64, generator=torch.Generator().manual_seed(1)), features)
    assert random.recovered == 0
    assert 0.25 < random.mmcs < 0.45


def test_recovery_counts_missing_and_doubled_features():
    features = synthetic.ortho(tokens=1, d=8).features
    decoder = features[[0, 0, 1, 2]]  # feature 0 twice, five features missing
    found = synthetic.recovery(decoder, features)
    assert found.recovered == 3 / 8
    assert found.mmcs == pytest.approx(3 / 8, abs=0.01)
    assert found.mmcs_back == pytest.approx(1)
    assert found.n_rows == 4


def test_stream_goes_on_where_it_was_and_reshuffles():
    stream = synthetic.PlantedStream(synthetic.superpos(tokens=64), 16, seed=3, gradients=True)
    first = list(itertools.islice(stream, 5))
    assert not torch.equal(first[0].x, first[4].x)
    torch.testing.assert_close(torch.cat([b.x for b in first[:4]]).sum(0), stream.x.sum(0), atol=1e-4, rtol=1e-4)
    state = stream.state_dict()
    after = next(iter(stream))
    again = synthetic.PlantedStream(synthetic.superpos(tokens=64), 16, seed=3, gradients=True)
    again.load_state_dict(state)
    assert torch.equal(next(iter(again)).x, after.x)
    assert after.gradient is not None


def test_made_up_loss_weighs_the_first_features_most():
    planted = synthetic.ortho(tokens=4, d=8)
    gradient = synthetic.PlantedStream(planted, 4, gradients=True).gradient
    expected = (planted.codes > 0).float() / torch.arange(1, 9).sqrt()
    torch.testing.assert_close(gradient @ planted.features.float().T, expected, atol=1e-5, rtol=1e-5)
