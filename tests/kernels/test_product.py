import pytest
import torch

from saelab.core.code import SparseCode
from saelab.kernels import (
    TopK,
    decode_and_block,
    info,
    pre_activations_and_block,
    select_above,
    select_budget,
    select_columns,
    select_scored,
    select_topk,
)
from saelab.kernels.product import BLOCK_COLUMNS, product, use_onednn
from tests.kernels.cases import make_case, ragged


def close(made, x, w, bias=None):
    expected = x.double() @ w.double().T + (0 if bias is None else bias.double())
    torch.testing.assert_close(made.double(), expected, rtol=1e-5, atol=1e-5 * max(x.shape[1], 1) ** 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("n", "d", "m"),
    [(1, 1, 1), (7, 3, 5), (33, 65, 129), (2, 4, 2 * BLOCK_COLUMNS + 3), (0, 4, 5), (3, 4, 0), (3, 0, 4)],
)
def test_product_is_the_matrix_product(n, d, m, dtype):
    g = torch.Generator().manual_seed(0)
    x, w, bias = (torch.randn(*shape, generator=g, dtype=dtype) for shape in ((n, d), (m, d), (m,)))
    close(product(x, w), x, w)
    close(product(x, w, bias), x, w, bias)
    out = torch.full((n, m), torch.nan, dtype=dtype)
    for b in (None, bias):
        assert product(x, w, b, out=out) is out
        close(out, x, w, b)


def test_product_takes_views():
    g = torch.Generator().manual_seed(0)
    big = torch.randn(40, 70, generator=g)
    close(product(big[::2, 3:33], big[1::3, 40:70]), big[::2, 3:33], big[1::3, 40:70])
    close(product(big[:30].T, big[10:].T), big[:30].T, big[10:].T)
    held = torch.zeros(50, 2 * BLOCK_COLUMNS)
    x, w = big[:, :9], torch.randn(2 * BLOCK_COLUMNS, 9, generator=g)
    product(x, w, out=held[:40])
    close(held[:40], x, w)
    assert not held[40:].any()


def test_product_keeps_nan_and_infinity_in_their_rows():
    x = torch.ones(5, 8)
    x[1, 2], x[3, 0] = torch.nan, torch.inf
    made = product(x, torch.ones(6, 8))
    assert made.isnan().all(1).tolist() == [False, True, False, False, False]
    assert made.isfinite().all(1).tolist() == [True, False, True, False, True]


def test_product_is_reproducible_and_has_a_fallback(monkeypatch):
    g = torch.Generator().manual_seed(0)
    x, w, bias = torch.randn(64, 32, generator=g), torch.randn(500, 32, generator=g), torch.randn(500, generator=g)
    assert torch.equal(product(x, w, bias), product(x, w, bias))
    assert info()["machine"]["f32_product"] == ("oneDNN" if use_onednn(x) else "torch.mm")
    assert not use_onednn(x.double())
    assert product(x.bfloat16(), w.bfloat16()).dtype == torch.bfloat16
    monkeypatch.setattr(torch._C, "_has_mkldnn", False)
    assert not use_onednn(x)
    assert info()["machine"]["f32_product"] == "torch.mm"
    close(product(x, w, bias), x, w, bias)


def test_blocks_and_their_gradients_agree_with_the_reference_in_float32():
    """The other kernel tests are in float64, which does not go through oneDNN."""
    case = make_case(37, d_in=24, d_sae=90, dtype=torch.float32)
    indices, rows, offsets = ragged([3, 0, 5] + [2] * 34, 90)
    block = torch.tensor([4, 80, 17, 33])
    found = {}
    for impl in ("reference", "sparse"):
        leaves = case.leaves()
        pre, dense = pre_activations_and_block(
            leaves.x, leaves.w_enc_t, leaves.b_enc, indices, rows, block, center=leaves.center, impl=impl
        )
        code = SparseCode(indices, pre.relu(), offsets, 90)
        x_hat, e_hat = decode_and_block(code, leaves.w_dec, leaves.b_dec, block, dense.relu(), impl=impl)
        (x_hat.square().sum() + (e_hat - 1).square().sum()).backward()
        found[impl] = [pre, dense, x_hat, e_hat, *(leaf.grad for leaf in leaves)]
    for reference, sparse in zip(*found.values(), strict=True):
        torch.testing.assert_close(sparse, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_selections_agree_with_the_reference_in_float32(seed):
    case = make_case(70, d_in=24, d_sae=300, seed=seed, dtype=torch.float32)
    given = (case.x, case.w_enc_t, case.b_enc)
    quotas = torch.arange(300) % 4
    gradient = torch.randn(70, 24, generator=torch.Generator().manual_seed(seed))
    selections = {
        "topk": lambda impl: select_topk(*given, 5, impl=impl),
        "budget": lambda impl: select_budget(*given, 350, impl=impl),
        "above": lambda impl: select_above(*given, torch.tensor(8.0), impl=impl),
        "columns": lambda impl: select_columns(*given, quotas, impl=impl).entries,
        "scored": lambda impl: select_scored(*given, gradient, case.w_dec, 5, 1.0, impl=impl).chosen,
    }
    for name, select in selections.items():
        dense = []
        for impl in ("reference", "sparse"):
            chosen = select(impl)
            code = (
                SparseCode.from_topk(chosen.indices, chosen.values, 300)
                if isinstance(chosen, TopK)
                else chosen.code(300)
            )
            dense.append(code.to_dense())
        torch.testing.assert_close(dense[1], dense[0], rtol=1e-4, atol=1e-4, msg=name)
