import pytest
import torch
from torch.autograd import gradcheck

from saelab.kernels import encode_topk, pre_activations_and_block, pre_activations_at
from tests.kernels.cases import make_case, ragged

COUNTS = {
    "ragged": [3, 0, 11, 1, 2],
    "empty code": [0, 0, 0],
    "no tokens": [],
    "one token": [4],
    "full": [11, 11],
}
NO_BLOCK, BLOCK = torch.zeros(0, dtype=torch.int64), torch.tensor([7, 2])


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("block", [NO_BLOCK, BLOCK], ids=["no block", "block"])
def test_gradcheck_and_equality(counts, block):
    indices, rows, _ = ragged(counts, 11)
    case = make_case(len(counts)).leaves()

    def run(x, center, w, b, impl="sparse"):
        return pre_activations_and_block(x, w, b, indices, rows, block, center=center, impl=impl)

    inputs = (case.x, case.center, case.w_enc_t, case.b_enc)
    assert gradcheck(run, inputs)
    sparse, dense = run(*inputs), run(*inputs, impl="reference")
    torch.testing.assert_close(sparse, dense)
    weights = [torch.rand_like(t) for t in dense]
    grads = [
        torch.autograd.grad(sum((t * w).sum() for t, w in zip(out, weights, strict=True)), inputs)
        for out in (sparse, dense)
    ]
    torch.testing.assert_close(*grads)


def test_gradients_only_where_needed():
    indices, rows, _ = ragged([2, 1], 11)
    case = make_case(2)
    w = case.w_enc_t.clone().requires_grad_()
    pre_activations_at(case.x, w, case.b_enc, indices, rows, center=case.center).sum().backward()
    assert case.x.grad is None
    assert w.grad is not None
    assert w.grad[torch.tensor([i for i in range(11) if i not in indices.tolist()])].eq(0).all()


def test_known_values_are_returned_as_they_are():
    indices, rows, _ = ragged([2, 1], 11)
    case = make_case(2)
    known = torch.arange(3, dtype=torch.float64)
    assert torch.equal(pre_activations_at(case.x, case.w_enc_t, case.b_enc, indices, rows, known=known), known)


@pytest.mark.parametrize(("n", "k"), [(5, 3), (0, 2), (1, 11), (4, 11)])
def test_encode_topk_equals_reference_with_gradients(n, k):
    case = make_case(n).leaves()
    inputs = (case.x, case.w_enc_t, case.b_enc, case.center)
    results = []
    for impl in ("sparse", "reference"):
        indices, values = encode_topk(*inputs[:3], k, center=inputs[3], impl=impl)
        order = indices.sort(dim=1)
        ordered = values.relu().gather(1, order.indices)
        results.append((order.values, ordered, torch.autograd.grad(ordered.square().sum(), inputs)))
    torch.testing.assert_close(*results)


def test_inactive_entries_get_no_gradient():
    """The mask that sparsify's fused encoder forgets: entries with z <= 0 must not train anything."""
    case = make_case(6).leaves()
    _, values = encode_topk(case.x, case.w_enc_t, case.b_enc - 100, 4, center=case.center)
    for gradient in torch.autograd.grad(values.relu().sum(), (case.w_enc_t, case.b_enc, case.center)):
        assert gradient.eq(0).all()


def test_same_bits_twice():
    case = make_case(700, d_in=64, d_sae=300, dtype=torch.float32)

    def gradients():
        leaves = case.leaves()
        _, values = encode_topk(leaves.x, leaves.w_enc_t, leaves.b_enc, 9, center=leaves.center)
        return torch.autograd.grad(values.relu().square().sum(), (leaves.x, leaves.w_enc_t, leaves.b_enc))

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))
