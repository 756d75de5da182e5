import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab.features.ragged import (
    largest_of_runs,
    list_of_each,
    quantile_positions,
    runs,
    sorted_within,
    top_entries,
)

lists = st.lists(st.lists(st.sampled_from([0.25, 1.0, 1.5, 2.0, 7.5, 3e-40, 1e30]), max_size=8), max_size=8)


def ragged(given_lists):
    offsets = np.cumsum([0, *map(len, given_lists)])
    return offsets, np.array([v for values in given_lists for v in values], np.float32)


@given(lists)
@settings(max_examples=100, deadline=None)
def test_sorted_within_sorts_each_list(given_lists):
    offsets, values = ragged(given_lists)
    expected = [np.sort(values[a:b]) for a, b in itertools.pairwise(offsets)]
    assert sorted_within(offsets, values).tolist() == [v for part in expected for v in part.tolist()]
    assert list_of_each(offsets).tolist() == [i for i, part in enumerate(given_lists) for _ in part]


@given(lists, st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_top_entries_equal_python(given_lists, k):
    offsets, values = ragged(given_lists)
    top_offsets, positions = top_entries(offsets, values, k)
    for i in range(len(given_lists)):
        expected = sorted(range(offsets[i], offsets[i + 1]), key=lambda j: (-values[j], j))[:k]
        assert positions[top_offsets[i] : top_offsets[i + 1]].tolist() == expected


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.sampled_from([1.0, 2.0, 3.0])), max_size=20))
@settings(max_examples=100, deadline=None)
def test_runs_and_their_largest(entries):
    first, second, values = (np.array([e[c] for e in entries]) for c in range(3))
    starts = runs(first, second)
    expected_starts = [i for i, e in enumerate(entries) if i == 0 or e[:2] != entries[i - 1][:2]]
    assert starts.tolist() == expected_starts
    best = largest_of_runs(starts, values.astype(np.float32))
    ends = [*expected_starts[1:], len(entries)] if entries else []
    assert best.tolist() == [max(range(a, b), key=lambda i: (values[i], -i)) for a, b in zip(starts, ends, strict=True)]


def test_quantiles_are_members_of_the_list():
    assert quantile_positions(np.array([0, 1, 2, 5, 11]), 0.5).tolist() == [0, 0, 0, 2, 5]
    assert quantile_positions(np.array([11]), 0.9).tolist() == [9]
