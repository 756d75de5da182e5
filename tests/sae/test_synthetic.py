import pytest
import torch

from tests.sae import synthetic


@pytest.mark.parametrize("make", [synthetic.ortho, synthetic.superpos, synthetic.zipf])
def test_fixtures_are_what_they_say(make):
    x, features, codes = make(tokens=4000)
    torch.testing.assert_close(x, codes @ features)
    torch.testing.assert_close(features.norm(dim=1), torch.ones_like(features[:, 0]))
    assert not torch.equal(make(tokens=10, seed=1).x, make(tokens=10, seed=2).x)


def test_zipf_has_its_law():
    density = (synthetic.zipf(tokens=40000).codes > 0).double().mean(0)
    rank = torch.arange(1, 257, dtype=torch.float64)
    slope = torch.linalg.lstsq(torch.stack([rank.log(), torch.ones(256)], 1), density.log().unsqueeze(1)).solution[0]
    assert -1.1 < float(slope) < -0.9
    assert abs(float(density.sum()) - 6) < 0.1
