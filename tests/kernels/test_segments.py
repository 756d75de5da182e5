import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab.kernels.segments import (
    entry_dots,
    group_by,
    grouped_sum,
    offsets_of_topk,
    rows_of,
    rows_of_topk,
    stable_order,
)


@settings(max_examples=30, deadline=None)
@given(nnz=st.integers(0, 40), groups=st.integers(1, 9), seed=st.integers(0, 99))
def test_grouped_sum_is_index_add(nnz, groups, seed):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 3, generator=g, dtype=torch.float64)
    indices, key = torch.randint(5, (nnz,), generator=g), torch.randint(groups, (nnz,), generator=g)
    scale = torch.randn(nnz, generator=g, dtype=torch.float64)
    expected = torch.zeros(groups, 3, dtype=torch.float64).index_add_(0, key, scale.unsqueeze(1) * weight[indices])
    torch.testing.assert_close(grouped_sum(weight, indices, key, groups, scale), expected)


def test_groups_keep_the_order_of_tokens():
    order, offsets = group_by(torch.tensor([2, 0, 2, 0]), 4)
    assert order.tolist() == [1, 3, 0, 2]
    assert offsets.tolist() == [0, 2, 2, 4, 4]


def test_entry_dots_takes_entries_in_any_order():
    g = torch.Generator().manual_seed(0)
    left, right = torch.randn(4, 6, generator=g), torch.randn(7, 6, generator=g)
    rows, indices = torch.tensor([3, 0, 3, 1]), torch.tensor([6, 0, 2, 2])
    torch.testing.assert_close(entry_dots(left, right, indices, rows), (left[rows] * right[indices]).sum(1))


def test_rows():
    assert rows_of(torch.tensor([0, 2, 2, 3]), 3).tolist() == [0, 0, 2]
    assert rows_of_topk(2, 3, torch.device("cpu")).tolist() == [0, 0, 0, 1, 1, 1]
    assert offsets_of_topk(2, 3, torch.device("cpu")).tolist() == [0, 3, 6]


@pytest.mark.parametrize("n_groups", [1, 300, (1 << 15) - 1, 1 << 15, (1 << 15) + 1, 1_000_000])
def test_stable_order_is_that_of_a_stable_sort(n_groups):
    g = torch.Generator().manual_seed(0)
    key = torch.randint(n_groups, (2000,), generator=g)[torch.randint(2000, (5000,), generator=g)]
    key[0] = n_groups - 1
    assert torch.equal(stable_order(key, n_groups), key.sort(stable=True).indices)
    groups = group_by(key, n_groups)
    assert torch.equal(groups.offsets.diff(), torch.bincount(key, minlength=n_groups))
    assert stable_order(key[:0], n_groups).numel() == 0
