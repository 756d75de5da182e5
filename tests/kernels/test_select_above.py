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


@pytest.mark.parametrize("per_feature", [False, True])
def test_bf16_values_are_exact_and_only_the_border_may_be_missed(per_feature):
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(256, 64, generator=g), torch.randn(2048, 64, generator=g)
    w /= w.norm(dim=1, keepdim=True)
    b = 0.1 * torch.randn(2048, generator=g)
    threshold = torch.rand(2048, generator=g) + 1 if per_feature else torch.tensor(1.5)
    half, full = (select_above(x, w, b, threshold, precision=p) for p in ("bf16", "f32"))
    a, c = half.code(2048).to_dense(), full.code(2048).to_dense()
    assert (c[a != 0] != 0).all()
    torch.testing.assert_close(a[a != 0], c[a != 0])
    missed = (a == 0) & (c != 0)
    assert missed.sum() <= 1e-5 * full.values.numel()
    assert (c - threshold)[missed].lt(0.02).all()


def test_bf16_of_nothing():
    empty = torch.zeros(0, 4)
    found = select_above(empty, torch.zeros(5, 4), torch.zeros(5), torch.zeros(()), precision="bf16")
    assert found.offsets.tolist() == [0]
