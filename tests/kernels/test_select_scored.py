import sys

import pytest
import torch

from saelab.kernels import select_scored, select_topk
from tests.kernels.cases import make_case

MODULE = sys.modules[select_scored.__module__]


def as_dense(found, d_sae):
    out = torch.full((found.indices.shape[0], d_sae), torch.nan, dtype=found.values.dtype)
    return out.scatter_(1, found.indices, found.values)


@pytest.mark.parametrize(("n", "k"), [(0, 2), (1, 1), (30, 3), (30, 11)])
@pytest.mark.parametrize("impl", ["sparse", "reference"])
def test_is_the_formula(n, k, impl, monkeypatch):
    monkeypatch.setattr(MODULE, "tile_rows", lambda n, d_sae: 7)
    case, gradient = make_case(n), make_case(n, seed=5).x
    found = select_scored(case.x, case.w_enc_t, case.b_enc, gradient, case.w_dec, k, 2.0, impl=impl)
    z = case.x @ case.w_enc_t.T + case.b_enc
    a = (gradient @ case.w_dec.T).abs()
    best = (z * (1 + 2 * a)).topk(k, dim=1).indices
    expected = torch.full_like(z, torch.nan).scatter(1, best, z.gather(1, best))
    torch.testing.assert_close(as_dense(found.chosen, 11), expected, equal_nan=True)
    torch.testing.assert_close(found.influence, a.mean(0) if n else torch.zeros(11, dtype=torch.float64))


def test_bf16_values_are_exact_and_the_selection_nearly_so():
    g = torch.Generator().manual_seed(0)
    x, w, gradient = (torch.randn(shape, 64, generator=g) for shape in (128, 1024, 128))
    w /= w.norm(dim=1, keepdim=True)
    gradient /= gradient.norm(dim=1, keepdim=True)
    half, full = (
        select_scored(x, w, torch.zeros(1024), gradient, w, 16, 1.0, precision=p).chosen for p in ("bf16", "f32")
    )
    exact = (x @ w.T).gather(1, half.indices)
    torch.testing.assert_close(half.values, exact, atol=1e-5, rtol=1e-5)
    same = [torch.isin(a, b).double().mean() for a, b in zip(half.indices, full.indices, strict=True)]
    assert torch.stack(same).mean() > 0.99


def test_without_weight_it_is_topk():
    case = make_case(20)
    scored = select_scored(case.x, case.w_enc_t, case.b_enc, case.x, case.w_dec, 3, 0.0).chosen
    plain = select_topk(case.x, case.w_enc_t, case.b_enc, 3)
    assert torch.equal(as_dense(scored, 11).nan_to_num(), as_dense(plain, 11).nan_to_num())
