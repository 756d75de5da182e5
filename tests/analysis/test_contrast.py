"""The checks of a contrastive SAE, on hand-set dictionaries whose halves are known."""

import pytest
import torch

from saelab.analysis.contrast import contrast
from saelab.core.errors import ActivationError
from tests.features.fakes import Oracle

WIDTH = 12


class Halves(Oracle):
    """Feature i reads coordinate i; the first half of the features is called common."""

    common_features = torch.arange(WIDTH // 2)
    differing_features = torch.arange(WIDTH // 2, WIDTH)

    def __init__(self):
        super().__init__(torch.eye(WIDTH), torch.eye(WIDTH))


def pairs(n=400, seed=0, told_by=slice(WIDTH // 2, WIDTH)):
    """Coordinates shared by both sides, but for those that say which side it is."""
    g = torch.Generator().manual_seed(seed)
    plus = torch.rand(n, WIDTH, generator=g) * (torch.rand(n, WIDTH, generator=g) < 0.3)
    minus = plus.clone()
    minus[:, told_by] = 0
    return plus, minus


def test_sides_are_read_from_the_half_that_holds_them():
    report = contrast(Halves(), *pairs())
    common, differing, whole = report.halves
    assert (common.name, differing.name, whole.name) == ("common", "differing", "all")
    assert common.side_auc == pytest.approx(0.5, abs=1e-9)  # both sides are the same there
    assert differing.side_auc > 0.9
    assert whole.side_auc > 0.9
    assert common.agreement == 0
    assert differing.agreement == 1
    assert abs(differing.control_auc - 0.5) < 0.1
    assert [half.n_features for half in report.halves] == [6, 6, 12]
    assert report.cosines == {"common-common": 0, "differing-differing": 0, "common-differing": 0}


def test_the_other_way_round():
    report = contrast(Halves(), *pairs(told_by=slice(0, WIDTH // 2)))
    assert report.halves[0].side_auc > 0.9
    assert report.halves[1].side_auc == pytest.approx(0.5, abs=1e-9)


def test_dead_and_dense_features():
    plus, minus = pairs()
    plus[:, 0] = minus[:, 0] = 0
    plus[:, 1] = minus[:, 1] = 1
    common = contrast(Halves(), plus, minus).halves[0]
    assert common.dead_fraction == pytest.approx(1 / 6)
    assert common.dense_fraction == pytest.approx(5 / 6)


def test_frame_and_plot_and_bad_pairs():
    report = contrast(Halves(), *pairs())
    assert list(report.to_frame().index) == ["common", "differing", "all"]
    assert len(report.plot().data) == 2
    assert report.to_dict()["n_pairs"] == 400
    with pytest.raises(ActivationError, match="at least 20 pairs"):
        contrast(Halves(), *pairs(n=5))
