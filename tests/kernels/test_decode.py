import pytest
import torch
from torch.autograd import gradcheck

from saelab.core.code import SparseCode
from saelab.kernels import decode, decode_and_block
from tests.kernels.cases import make_case, ragged
from tests.kernels.test_encode import BLOCK, COUNTS, NO_BLOCK


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("block", [NO_BLOCK, BLOCK], ids=["no block", "block"])
def test_gradcheck_and_equality(counts, block):
    indices, _, offsets = ragged(counts, 11)
    g = torch.Generator().manual_seed(1)
    case = make_case(len(counts)).leaves()
    values = torch.randn(indices.numel(), generator=g, dtype=torch.float64, requires_grad=True)
    blocked = torch.randn(len(counts), block.numel(), generator=g, dtype=torch.float64, requires_grad=True)

    def run(values, w, b, blocked, impl="sparse"):
        return decode_and_block(SparseCode(indices, values, offsets, 11), w, b, block, blocked, impl=impl)

    inputs = (values, case.w_dec, case.b_dec, blocked)
    assert gradcheck(run, inputs)
    sparse, dense = run(*inputs), run(*inputs, impl="reference")
    torch.testing.assert_close(sparse, dense)
    weights = [torch.rand_like(t) for t in dense]
    grads = [
        torch.autograd.grad(sum((t * w).sum() for t, w in zip(out, weights, strict=True)), inputs)
        for out in (sparse, dense)
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("which", [0, 1])
def test_gradient_when_one_output_is_unused(which):
    indices, _, offsets = ragged([2, 3], 11)
    case = make_case(2).leaves()
    values = torch.rand(5, dtype=torch.float64, requires_grad=True)
    blocked = torch.rand(2, 2, dtype=torch.float64, requires_grad=True)
    grads = []
    for impl in ("sparse", "reference"):
        out = decode_and_block(SparseCode(indices, values, offsets, 11), case.w_dec, None, BLOCK, blocked, impl=impl)
        grads.append(torch.autograd.grad(out[which].sum(), case.w_dec)[0])
    torch.testing.assert_close(*grads)


def test_decode_without_bias_or_gradient():
    indices, _, offsets = ragged([2, 0], 11)
    case = make_case(2)
    code = SparseCode(indices, torch.ones(2, dtype=torch.float64), offsets, 11)
    torch.testing.assert_close(decode(code, case.w_dec), code.to_dense() @ case.w_dec)
