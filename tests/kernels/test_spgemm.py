import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab.core.code import SparseCode
from saelab.kernels import co_activation, co_activation_matrix, spgemm, top_co_active
from tests.kernels.cases import ragged


def code_of(counts, d_sae, seed=0):
    indices, _, offsets = ragged(counts, d_sae, seed)
    values = torch.rand(indices.numel(), generator=torch.Generator().manual_seed(seed)) + 0.1
    return SparseCode(indices, values, offsets, d_sae)


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 23), max_size=12), seed=st.integers(0, 99), block=st.sampled_from([1, 70, 1 << 22])
)
def test_counts_and_sums_are_those_of_the_dense_product(counts, seed, block):
    code = code_of(counts, 23, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spgemm, "BLOCK_ELEMENTS", block)
        patch.setattr(spgemm, "PIECES_AT_A_TIME", 3)
        dense = code.to_dense().double()
        active = (dense > 0).double()
        assert torch.equal(co_activation_matrix(code).double(), active.T @ active)
        torch.testing.assert_close(co_activation_matrix(code, weighted=True), dense.T @ dense)
    for weighted in (False, True):
        torch.testing.assert_close(
            co_activation_matrix(code, weighted=weighted, impl="reference"),
            co_activation_matrix(code, weighted=weighted),
        )


def test_against_scipy():
    import numpy as np
    import scipy.sparse

    code = code_of([5] * 300 + [90, 0, 1], 200)
    c = scipy.sparse.csr_matrix((np.ones(code.nnz, np.int32), code.indices, code.offsets), shape=(303, 200))
    assert np.array_equal(co_activation_matrix(code).numpy(), (c.T @ c).toarray())


def test_blocks_cover_every_row_once_and_are_bounded(monkeypatch):
    monkeypatch.setattr(spgemm, "BLOCK_ELEMENTS", 100)
    blocks = list(co_activation(code_of([4] * 20, 30)))
    assert [(block.start, len(block.values)) for block in blocks] == [(start, 3) for start in range(0, 30, 3)]


def test_the_others_most_active_with_a_feature():
    """Features 0 and 1 always together, 2 with them half of the time, 3 alone."""
    indices = torch.tensor([0, 1, 2, 0, 1, 3, 3])
    code = SparseCode(indices, torch.ones(7), torch.tensor([0, 3, 5, 6, 7]), 5)
    top = top_co_active(code, 3)
    assert top.features.tolist() == [[1, 2, -1], [0, 2, -1], [0, 1, -1], [-1, -1, -1], [-1, -1, -1]]
    assert top.values.tolist() == [[2, 1, 0], [2, 1, 0], [1, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert top_co_active(code, 99).features.shape == (5, 5)


def test_same_bits_twice():
    code = code_of([7] * 200, 40)
    assert torch.equal(co_activation_matrix(code, weighted=True), co_activation_matrix(code, weighted=True))
