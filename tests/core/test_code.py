"""SparseCode against its dense meaning."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from saelab.core.code import SparseCode


@st.composite
def dense_matrices(draw):
    n, d = draw(st.integers(0, 6)), draw(st.integers(1, 7))
    values = draw(st.lists(st.sampled_from([0.0, 0.0, 1.0, -2.0, 0.5]), min_size=n * d, max_size=n * d))
    return torch.tensor(values).reshape(n, d)


@given(dense_matrices())
def test_dense_round_trip(dense):
    code = SparseCode.from_dense(dense)
    assert torch.equal(code.to_dense(), dense)
    assert code.n_tokens == dense.shape[0]
    assert code.nnz == int((dense != 0).sum())
    assert torch.equal(code.l0(), (dense > 0).sum(1))
    assert torch.equal(code.positive().to_dense(), dense.clamp(min=0))
    assert torch.equal(code.rows(), dense.nonzero()[:, 0])


@given(st.lists(dense_matrices(), min_size=1, max_size=4))
def test_concatenate(parts):
    d = max(p.shape[1] for p in parts)
    parts = [torch.nn.functional.pad(p, (0, d - p.shape[1])) for p in parts]
    whole = SparseCode.concatenate([SparseCode.from_dense(p) for p in parts])
    assert torch.equal(whole.to_dense(), torch.cat(parts))


def test_from_topk_and_gradient():
    pre = torch.tensor([[3.0, 1.0, -1.0], [0.0, 2.0, 5.0]], requires_grad=True)
    values, indices = pre.topk(2, dim=1)
    code = SparseCode.from_topk(indices, values, 3)
    assert torch.equal(code.to_dense(), torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 5.0]]))
    (code.to_dense() * torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])).sum().backward()
    assert torch.equal(pre.grad, torch.tensor([[1.0, 2.0, 0.0], [0.0, 5.0, 6.0]]))
    assert not code.detach().values.requires_grad
    empty = SparseCode.from_topk(torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 0), 3)
    assert torch.equal(empty.to_dense(), torch.zeros(2, 3))
