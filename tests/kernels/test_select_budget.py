import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab.kernels import select_budget
from tests.kernels.cases import make_case

MODULE = sys.modules[select_budget.__module__]


def places(found, d_sae):
    rows = torch.repeat_interleave(torch.arange(found.offsets.numel() - 1), found.offsets.diff())
    return rows * d_sae + found.indices


def integers(n, d_sae, levels, seed):
    """Pre-activations with few distinct values, as (x, w_enc_t): x is the identity."""
    g = torch.Generator().manual_seed(seed)
    return torch.eye(n, dtype=torch.float64), torch.randint(levels, (d_sae, n), generator=g).double() - 1


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 9),
    d_sae=st.integers(1, 70),
    seed=st.integers(0, 99),
    levels=st.sampled_from([1, 2, 5, 1000]),
    data=st.data(),
)
def test_exact_whatever_the_ties(n, d_sae, seed, levels, data):
    x, w = integers(n, d_sae, levels, seed)
    budget = data.draw(st.integers(0, n * d_sae + 3))
    found = select_budget(x, w, torch.zeros(d_sae, dtype=torch.float64), budget)
    pre = (x @ w.T).view(-1)
    place, wanted = places(found, d_sae), min(budget, n * d_sae)
    assert place.numel() == place.unique().numel() == wanted
    assert torch.equal(found.values, pre[place])
    assert torch.equal(found.values.sort(descending=True).values, pre.topk(wanted).values)
    assert found.offsets.numel() == n + 1
    assert found.offsets[-1] == wanted


@pytest.mark.parametrize("large", [slice(0, 0), slice(0, 10), slice(190, 200), slice(77, 78)])
@pytest.mark.parametrize("per_row", [2, 9, 60])
def test_tiles_and_unlucky_samples_do_not_show(large, per_row, monkeypatch):
    """The first rows misjudge the rest: far too high a bound (a second pass), or far too low (the pool is cut)."""
    monkeypatch.setattr(MODULE, "tile_rows", lambda n, d_sae: 16)
    monkeypatch.setattr(MODULE, "SAMPLE_ROWS", 4)
    case = make_case(200, d_in=8, d_sae=64)
    case.x[large] *= 1000
    sparse, reference = (
        select_budget(case.x, case.w_enc_t, case.b_enc, per_row * 200, impl=impl) for impl in ("sparse", "reference")
    )
    assert torch.equal(sparse.offsets, reference.offsets)
    order = places(sparse, 64).sort()
    assert torch.equal(order.values, places(reference, 64))
    torch.testing.assert_close(sparse.values[order.indices], reference.values)


def test_all_negative_still_gives_the_budget():
    case = make_case(6)
    found = select_budget(case.x, case.w_enc_t, case.b_enc - 1000, 20)
    assert found.indices.numel() == 20
    assert (found.values < 0).all()


def test_bf16_values_are_exact_and_the_selection_nearly_so():
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(256, 64, generator=g), torch.randn(2048, 64, generator=g)
    w /= w.norm(dim=1, keepdim=True)
    half, full = (select_budget(x, w, torch.zeros(2048), 32 * 256, precision=p) for p in ("bf16", "f32"))
    exact = (x @ w.T).view(-1)[places(half, 2048)]
    torch.testing.assert_close(half.values, exact, atol=1e-5, rtol=1e-5)
    assert torch.isin(places(half, 2048), places(full, 2048)).double().mean() > 0.995
    assert half.values.numel() == 32 * 256


def test_same_bits_twice():
    case = make_case(300, d_in=16, d_sae=256, dtype=torch.float32)
    a, b = (select_budget(case.x, case.w_enc_t, case.b_enc, 3000) for _ in range(2))
    assert all(torch.equal(left, right) for left, right in zip(a, b, strict=True))
