import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab.core.errors import ConfigError
from saelab.kernels import select, select_topk
from tests.kernels.cases import make_case


def as_dense(found, d_sae):
    dense = torch.full((found.indices.shape[0], d_sae), float("nan"), dtype=found.values.dtype)
    return dense.scatter_(1, found.indices, found.values)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 9), d_sae=st.integers(1, 40), seed=st.integers(0, 99), data=st.data())
def test_sparse_equals_reference(n, d_sae, seed, data):
    k = data.draw(st.integers(1, d_sae))
    case = make_case(n, d_sae=d_sae, seed=seed)
    a, b = (select_topk(case.x, case.w_enc_t, case.b_enc, k, impl=impl) for impl in ("sparse", "reference"))
    torch.testing.assert_close(as_dense(a, d_sae), as_dense(b, d_sae), equal_nan=True)


def test_tiles_do_not_show(monkeypatch):
    case = make_case(300, d_sae=50)
    whole = select_topk(case.x, case.w_enc_t, case.b_enc, 5)
    monkeypatch.setattr(select, "tile_rows", lambda n, d_sae: 7)
    tiled = select_topk(case.x, case.w_enc_t, case.b_enc, 5)
    torch.testing.assert_close(as_dense(whole, 50), as_dense(tiled, 50), equal_nan=True)


@pytest.mark.parametrize("d_sae", [10, 8192, 131072, 10_000_000])
def test_a_tile_is_never_the_whole_matrix(d_sae):
    rows = select.tile_rows(100_000, d_sae)
    assert 1 <= rows <= max(128, select.TILE_ELEMENTS // d_sae)


def test_ties_give_distinct_features_and_the_same_values():
    case = make_case(6)
    w = case.w_enc_t[:1].expand(11, -1).contiguous()
    for impl in ("sparse", "reference"):
        found = select_topk(case.x, w, torch.zeros(11, dtype=torch.float64), 4, impl=impl)
        assert all(len(set(row)) == 4 for row in found.indices.tolist())
        torch.testing.assert_close(found.values, (case.x @ w[0]).unsqueeze(1).expand(6, 4))


def test_all_negative_still_gives_k_entries():
    case = make_case(5)
    found = select_topk(case.x, case.w_enc_t, case.b_enc - 100, 3)
    assert found.indices.shape == (5, 3)
    assert (found.values < 0).all()


def test_bf16_values_are_exact_and_the_selection_nearly_so():
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(256, 64, generator=g), torch.randn(2048, 64, generator=g)
    w /= w.norm(dim=1, keepdim=True)
    b, k = torch.zeros(2048), 32
    half, full = (select_topk(x, w, b, k, precision=p) for p in ("bf16", "f32"))
    exact = (x @ w.T).gather(1, half.indices)
    torch.testing.assert_close(half.values, exact, atol=1e-5, rtol=1e-5)
    overlap = torch.stack([torch.isin(a, b).double().mean() for a, b in zip(half.indices, full.indices, strict=True)])
    assert overlap.mean() > 0.995
    assert half.values.sum() >= 0.9999 * full.values.sum()


def test_bf16_with_k_of_d_sae():
    case = make_case(3, dtype=torch.float32)
    found = select_topk(case.x, case.w_enc_t, case.b_enc, 11, precision="bf16")
    assert all(sorted(row) == list(range(11)) for row in found.indices.tolist())


def test_unknown_impl():
    case = make_case(1)
    with pytest.raises((ConfigError, TypeError), match="impl"):  # TypeError: from the shape checks of the tests
        select_topk(case.x, case.w_enc_t, case.b_enc, 1, impl="fast")


@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 5), d_sae=st.integers(1, 3000), seed=st.integers(0, 99), levels=st.sampled_from([0, 3, 40]))
def test_row_topk_is_topk(n, d_sae, seed, levels):
    """Few levels: rows full of ties."""
    g = torch.Generator().manual_seed(seed)
    tile = torch.randint(levels, (n, d_sae), generator=g).float() if levels else torch.randn(n, d_sae, generator=g)
    k = int(torch.randint(1, min(d_sae, 64) + 1, (1,), generator=g))
    values, columns = select.row_topk(tile, k)
    assert torch.equal(values.sort(1, descending=True).values, tile.topk(k, dim=1).values)
    assert torch.equal(tile.gather(1, columns), values)
    assert all(len(set(row)) == k for row in columns.tolist())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_row_topk_takes_the_large_way(dtype):
    tile = torch.randn(3, 4099, generator=torch.Generator().manual_seed(0)).to(dtype)
    values, columns = select.row_topk(tile, 7)
    assert torch.equal(values.sort(1, descending=True).values, tile.topk(7, dim=1).values)
    assert torch.equal(tile.gather(1, columns), values)
