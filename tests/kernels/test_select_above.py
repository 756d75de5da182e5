import sys

import pytest
import torch

from saelab.kernels import select_above
from saelab.kernels.select_above import positions_from
from tests.kernels.cases import make_case

MODULE = sys.modules[select_above.__module__]


@pytest.mark.parametrize("n", [0, 1, 70])
@pytest.mark.parametrize("d_sae", [1, 11, 64])
@pytest.mark.parametrize("kind", ["scalar", "vector", "none", "all"])
def test_is_the_comparison(n, d_sae, kind, monkeypatch):
    monkeypatch.setattr(MODULE, "tile_rows", lambda n, d_sae: 7)
    case = make_case(n, d_sae=d_sae)
    zero = torch.zeros((), dtype=torch.float64)
    threshold = {"scalar": zero + 3.5, "vector": case.b_enc.abs() * 2, "none": zero + 1e9, "all": zero - 1e9}[kind]
    found = select_above(case.x, case.w_enc_t, case.b_enc, threshold)
    pre = case.x @ case.w_enc_t.T + case.b_enc
    dense = torch.zeros_like(pre)
    rows = torch.repeat_interleave(torch.arange(n), found.offsets.diff())
    dense[rows, found.indices] = found.values
    torch.testing.assert_close(dense, torch.where(pre > threshold, pre, 0))
    assert found.indices.numel() == int((pre > threshold).sum())


@pytest.mark.parametrize("group", [2, 4, 16])
def test_equal_to_the_threshold_is_not_above_it(group):
    tile = torch.tensor([[1.0, 2.0, 3.0, 2.0] * 8])
    least = torch.nextafter(torch.tensor(2.0), torch.tensor(torch.inf))
    assert tile.view(-1)[positions_from(tile, least, group)].tolist() == [3.0] * 8
    assert positions_from(tile, torch.tensor(2.0), group).numel() == 24
