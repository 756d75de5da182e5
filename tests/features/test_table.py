"""The order of the feature table."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from saelab.features.table import stable_order

SPECIAL = [0.0, -0.0, 1.0, -1.0, float("nan"), float("inf"), float("-inf"), 1e-45, -1e-45, 3.4e38]


@pytest.mark.parametrize("descending", [False, True])
@given(
    values=st.one_of(
        arrays.arrays(np.float32, st.integers(0, 30), elements=st.floats(width=32) | st.sampled_from(SPECIAL)),
        arrays.arrays(np.float64, st.integers(0, 30)),
        arrays.arrays(np.int64, st.integers(0, 30), elements=st.integers(-(1 << 40), 1 << 40) | st.integers(-2, 3)),
        arrays.arrays(np.int32, st.integers(0, 30)),
        arrays.arrays(np.bool_, st.integers(0, 30)),
    )
)
def test_stable_order_is_that_of_a_stable_argsort(values, descending):
    wide = values.astype(np.float64)
    expected = np.argsort(-wide if descending else wide, kind="stable")
    assert stable_order(values, descending).tolist() == expected.tolist()


def test_many_equal_values_keep_their_order():
    values = np.random.default_rng(0).integers(0, 50, 200_000).astype(np.float32)
    values[::7] = np.nan
    assert np.array_equal(stable_order(values, True), np.argsort(-values, kind="stable"))
