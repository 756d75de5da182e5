"""The Triton twins against the references; under Triton's interpreter where there is no GPU."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from saelab.core.code import SparseCode
from saelab.core.errors import ConfigError
from saelab.kernels import (
    decode,
    decode_and_block,
    dispatch,
    encode_topk,
    info,
    pre_activations_and_block,
    select_above,
    select_budget,
    select_columns,
    select_scored,
    select_topk,
)
from saelab.kernels.segments import bag_sum, entry_dots, group_by
from saelab.kernels.select_budget import keep_largest
from tests.kernels.cases import make_case, ragged
from tests.kernels.test_encode import BLOCK, NO_BLOCK

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if dispatch.triton_problem(DEVICE):
    pytest.skip(dispatch.triton_problem(DEVICE), allow_module_level=True)

SMALL = {"ragged": [2, 0, 1], "empty code": [0, 0], "no tokens": []}
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def on(*tensors):
    return tuple(t.to(DEVICE) for t in tensors)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


# The three products --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("counts", "d"), [([3, 0, 11, 1, 2], 7), ([0, 0], 7), ([], 7), ([40, 0, 1, 39], 300)], ids=str)
def test_bag_sum(counts, d, dtype):
    """More entries than a block, bags without any, widths that fill no block."""
    indices, _, offsets = on(*ragged(counts, 40))
    weight, scale = draw(40, d, dtype=dtype), draw(indices.numel(), dtype=dtype)
    found = bag_sum(weight, indices, offsets, scale, impl="triton")
    expected = SparseCode(indices, scale.double(), offsets, 40).to_dense() @ weight.double()
    torch.testing.assert_close(found, expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("counts", "d"), [([3, 0, 11, 1, 2], 7), ([0, 0], 7), ([], 7), ([40, 0, 1, 39], 300)], ids=str)
def test_entry_dots(counts, d, dtype):
    indices, rows, _ = on(*ragged(counts, 40))
    left, right = draw(len(counts), d, dtype=dtype), draw(40, d, seed=1, dtype=dtype)
    found = entry_dots(left, right, indices, rows, impl="triton")
    torch.testing.assert_close(found, (left.double()[rows] * right.double()[indices]).sum(1).to(dtype))
    given_order = entry_dots(left, right, indices, rows, group_by(indices, 40), impl="triton")
    assert torch.equal(found, given_order)


# Gradients -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize("block", [NO_BLOCK, BLOCK], ids=["no block", "block"])
def test_decode_gradients(counts, block):
    indices, _, offsets, block = on(*ragged(counts, 11), block)
    case = make_case(len(counts))
    inputs = [draw(indices.numel()), *on(case.w_dec, case.b_dec), draw(len(counts), block.numel(), seed=2)]
    inputs = [t.requires_grad_() for t in inputs]

    def run(values, w, b, blocked, impl="triton"):
        return decode_and_block(SparseCode(indices, values, offsets, 11), w, b, block, blocked, impl=impl)

    assert gradcheck(run, inputs, fast_mode=True)
    torch.testing.assert_close(run(*inputs), run(*inputs, impl="reference"))


@pytest.mark.parametrize("counts", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize("block", [NO_BLOCK, BLOCK], ids=["no block", "block"])
def test_encode_gradients(counts, block):
    indices, rows, _, block = on(*ragged(counts, 11), block)
    case = make_case(len(counts))
    inputs = [t.requires_grad_() for t in on(case.x, case.center, case.w_enc_t, case.b_enc)]

    def run(x, center, w, b, impl="triton"):
        return pre_activations_and_block(x, w, b, indices, rows, block, center=center, impl=impl)

    assert gradcheck(run, inputs, fast_mode=True)
    torch.testing.assert_close(run(*inputs), run(*inputs, impl="reference"))


@pytest.mark.parametrize(("n", "k"), [(5, 3), (0, 2), (1, 11), (4, 11)])
def test_encode_topk_equals_reference_with_gradients(n, k):
    results = []
    for impl in ("triton", "reference"):
        case = [t.requires_grad_() for t in on(*make_case(n))]
        x, center, w_enc_t, b_enc = case[:4]
        indices, values = encode_topk(x, w_enc_t, b_enc, k, center=center, impl=impl)
        dense = torch.zeros(n, 11, dtype=torch.float64, device=DEVICE).scatter(1, indices, values.relu())
        results.append((dense, *torch.autograd.grad(dense.square().sum(), (x, center, w_enc_t, b_enc))))
    torch.testing.assert_close(*results)


def test_all_dead_gives_zero_gradients():
    case = [t.requires_grad_() for t in on(*make_case(3))]
    x, center, w_enc_t, b_enc = case[:4]
    _, values = encode_topk(x, w_enc_t, b_enc - 100, 4, center=center, impl="triton")
    for gradient in torch.autograd.grad(values.relu().sum(), (w_enc_t, b_enc, center)):
        assert gradient.eq(0).all()


# Selection -----------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(0, 4),
    d_sae=st.integers(1, 5000),
    seed=st.integers(0, 99),
    levels=st.sampled_from([0, 1, 3, 40]),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_row_topk(n, d_sae, seed, levels, dtype, data):
    """Few levels: rows full of ties, of which the first columns must be taken. k up to d_sae."""
    from saelab.kernels.triton_row_topk import row_topk

    g = torch.Generator().manual_seed(seed)
    tile = torch.randint(levels, (n, d_sae), generator=g).float() if levels else torch.randn(n, d_sae, generator=g)
    tile = (tile - levels // 2).to(DEVICE, dtype)
    k = data.draw(st.integers(0, d_sae))
    values, columns = row_topk(tile, k)
    expected = tile.sort(dim=1, descending=True, stable=True)
    assert torch.equal(columns, expected.indices[:, :k].sort(dim=1).values)
    assert torch.equal(values, tile.gather(1, columns))


def test_row_topk_of_zeros_and_infinities():
    from saelab.kernels.triton_row_topk import row_topk

    tile = torch.tensor([[-0.0, 0.0, -1.0, float("inf"), -float("inf"), 0.0, -0.0]], device=DEVICE)
    for dtype in DTYPES:
        assert row_topk(tile.to(dtype), 3)[1].tolist() == [[0, 1, 3]]
        assert row_topk(tile.to(dtype), 6)[1].tolist() == [[0, 1, 2, 3, 5, 6]]


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 9000),
    seed=st.integers(0, 99),
    levels=st.sampled_from([0, 1, 3, 40]),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_keep_largest(n, seed, levels, dtype, data):
    g = torch.Generator().manual_seed(seed)
    values = torch.randint(levels, (n,), generator=g).float() - 1 if levels else torch.randn(n, generator=g)
    values, place = values.to(DEVICE, dtype), torch.arange(n, device=DEVICE) * 3
    count = data.draw(st.integers(0, n + 1))
    found = keep_largest(place, values, count, impl="triton")
    expected = values.sort(descending=True, stable=True).indices[:count].sort().values
    assert torch.equal(found[0], place[expected])
    assert torch.equal(found[1], values[expected])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 5000), (5, 37)])
@pytest.mark.parametrize("per_column", [False, True])
def test_positions_from(shape, per_column, dtype):
    from saelab.kernels.triton_positions import positions_from

    tile = draw(*shape, dtype=dtype)
    least = draw(shape[1], seed=1, dtype=dtype) if per_column else draw(1, seed=1, dtype=dtype)[0]
    assert torch.equal(positions_from(tile, least), (tile >= least).view(-1).nonzero().squeeze(1))
    assert positions_from(tile, torch.full_like(least, torch.inf)).numel() == 0


@pytest.mark.parametrize("precision", ["f32", "bf16"])
@pytest.mark.parametrize(("n", "k"), [(5, 3), (0, 2), (1, 37), (16, 5)])
def test_selections_equal_the_sparse_ones(n, k, precision):
    """Same tiles, same numbers: the same sets of entries, in float32 with and without the bfloat16 product."""
    case = make_case(n, d_in=8, d_sae=37, dtype=torch.float32)
    x, w, b, w_dec = on(case.x, case.w_enc_t, case.b_enc, case.w_dec)
    gradient = draw(n, 8, seed=3, dtype=torch.float32)
    quotas = torch.arange(37, device=DEVICE) % (n + 2)
    kinds = {
        "topk": lambda impl: select_topk(x, w, b, k, precision=precision, impl=impl),
        "scored": lambda impl: select_scored(x, w, b, gradient, w_dec, k, 0.5, precision=precision, impl=impl).chosen,
        "budget": lambda impl: select_budget(x, w, b, n * k, precision=precision, impl=impl),
        "columns": lambda impl: select_columns(x, w, b, quotas, precision=precision, impl=impl).entries,
        "above": lambda impl: select_above(x, w, b, b.new_full((37,), 0.7), impl=impl),
    }
    for name, select in kinds.items():
        dense = []
        for impl in ("triton", "sparse"):
            found = select(impl)
            if name in ("topk", "scored"):
                code = SparseCode.from_topk(found.indices, found.values, 37)
            else:
                code = found.code(37)
            dense.append(code.to_dense())
        torch.testing.assert_close(*dense, msg=name)


def test_budget_over_tiles_with_ties(monkeypatch):
    module = sys.modules[select_budget.__module__]
    monkeypatch.setattr(module, "tile_rows", lambda *_: 8)
    monkeypatch.setattr(module, "SAMPLE_ROWS", 4)
    w = torch.randint(3, (64, 30), generator=torch.Generator().manual_seed(0)).double().to(DEVICE)
    x, b = torch.eye(30, dtype=torch.float64, device=DEVICE), torch.zeros(64, dtype=torch.float64, device=DEVICE)
    a, r = (select_budget(x, w, b, 150, impl=impl) for impl in ("triton", "reference"))
    assert a.values.numel() == 150
    assert torch.equal(a.values.sort().values, r.values.sort().values)


# Bits, and where they run --------------------------------------------------------------------------------------------


def test_same_bits_twice():
    def run():
        case = make_case(12, d_in=64, d_sae=30, dtype=torch.float32)
        x, w, b, w_dec = (t.requires_grad_() for t in on(case.x, case.w_enc_t, case.b_enc, case.w_dec))
        indices, values = encode_topk(x, w, b, 5, impl="triton", precision="bf16")
        out = decode(SparseCode.from_topk(indices, values.relu(), 30), w_dec, impl="triton")
        return (indices, out, *torch.autograd.grad(out.square().sum(), (x, w, b, w_dec)))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_a_training_pass_through_triton_is_that_of_the_reference():
    from saelab.core.batch import Batch
    from saelab.core.config import parse_config
    from saelab.sae import ARCHITECTURES, StepContext, build_sae

    for name in ("topk", "relu"):
        config = ARCHITECTURES[name].config
        sizes = {"architecture": name, "d_in": 8, "d_sae": 16}
        sae = build_sae(parse_config(config, sizes | ({"k": 3} if "k" in config.model_fields else {}))).to(DEVICE)
        batch, dead = Batch(draw(6, 8, dtype=torch.float32)), torch.arange(10, 16, device=DEVICE)
        grads = []
        for impl in ("triton", "reference"):
            passed = sae.training_pass(batch, StepContext(dead=dead, aux_k=1, aux_coefficient=0.5, impl=impl))
            grads.append(torch.autograd.grad(sum(passed.losses.values()), list(sae.parameters())))
        torch.testing.assert_close(*grads)


def test_what_cannot_run_is_refused_in_one_line(monkeypatch):
    case = make_case(1)
    assert info(DEVICE)["triton"]["impl"] == "on request"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    if DEVICE == "cpu":
        assert info()["triton"]["impl"] == "unavailable"
        with pytest.raises(ConfigError, match="TRITON_INTERPRET=1"):
            select_topk(case.x, case.w_enc_t, case.b_enc, 1, impl="triton")
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="not installed"):
        select_topk(case.x, case.w_enc_t, case.b_enc, 1, impl="triton")
    assert select_topk(case.x, case.w_enc_t, case.b_enc, 1).values.shape == (1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
def test_every_kernel_compiles_for_a_gpu(dtype):
    """The interpreter takes more than the compiler does; compiling to machine code needs no GPU."""
    command = [sys.executable, "-m", "tests.kernels.compile_triton", "90", dtype]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 7
