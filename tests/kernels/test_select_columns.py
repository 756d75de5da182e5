import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab.kernels import select_columns
from tests.kernels.cases import make_case

MODULE = sys.modules[select_columns.__module__]


def dense(found, n, d_sae):
    out = torch.full((n, d_sae), torch.nan, dtype=found.entries.values.dtype)
    rows = torch.repeat_interleave(torch.arange(n), found.entries.offsets.diff())
    out[rows, found.entries.indices] = found.entries.values
    return out


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 40), d_sae=st.integers(1, 30), seed=st.integers(0, 99))
def test_each_feature_takes_its_largest(n, d_sae, seed):
    case = make_case(n, d_sae=d_sae, seed=seed)
    quotas = torch.randint(0, n + 2, (d_sae,), generator=torch.Generator().manual_seed(seed))
    pre = case.x @ case.w_enc_t.T + case.b_enc
    level = pre.median()
    for impl in ("sparse", "reference"):
        found = select_columns(case.x, case.w_enc_t, case.b_enc, quotas, level, impl=impl)
        kept = dense(found, n, d_sae)
        for i, quota in enumerate(quotas.clamp(max=n).tolist()):
            column = pre[:, i].sort(descending=True).values
            mine = kept[:, i][~kept[:, i].isnan()]
            torch.testing.assert_close(mine.sort(descending=True).values, column[:quota])
            if quota:
                torch.testing.assert_close(found.border[i], column[quota - 1 : quota + 1].mean())
            else:
                assert found.border[i] == torch.inf
        assert (found.demand - (pre > level).sum(0)).abs().max() <= 1  # the level is itself an entry


def test_negative_columns_and_ties_are_filled():
    case = make_case(20)
    case.w_enc_t[3] = 0
    case.b_enc[3] = -5
    quotas = torch.full((11,), 4)
    found = select_columns(case.x, case.w_enc_t, case.b_enc, quotas)
    assert torch.bincount(found.entries.indices, minlength=11).tolist() == [4] * 11
    assert (found.entries.values[found.entries.indices == 3] == -5).all()


def test_no_tokens():
    case = make_case(0)
    found = select_columns(case.x, case.w_enc_t, case.b_enc, torch.zeros(11, dtype=torch.int64))
    assert found.entries.indices.numel() == 0
    assert found.entries.offsets.tolist() == [0]


def test_tiles_do_not_show(monkeypatch):
    case = make_case(60, d_sae=50)
    quotas = torch.arange(50) % 13
    whole = dense(select_columns(case.x, case.w_enc_t, case.b_enc, quotas), 60, 50)
    monkeypatch.setattr(MODULE, "tile_rows", lambda n, d_sae: 3)
    tiled = dense(select_columns(case.x, case.w_enc_t, case.b_enc, quotas), 60, 50)
    torch.testing.assert_close(whole, tiled, equal_nan=True)


@pytest.mark.parametrize("quota", [1, 5])
def test_bf16_values_are_exact_and_the_selection_nearly_so(quota):
    g = torch.Generator().manual_seed(0)
    x, w, b = torch.randn(512, 64, generator=g), torch.randn(256, 64, generator=g), torch.randn(256, generator=g)
    quotas = torch.full((256,), quota)
    half, full = (dense(select_columns(x, w, b, quotas, precision=p), 512, 256) for p in ("bf16", "f32"))
    exact = x @ w.T + b
    torch.testing.assert_close(half[~half.isnan()], exact[~half.isnan()], atol=1e-4, rtol=1e-5)
    assert (half.isnan() == full.isnan()).double().mean() > 0.9999
