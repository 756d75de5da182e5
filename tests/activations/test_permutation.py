import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from saelab.activations.permutation import Permutation
from tests.activations.shuffling import decile_p_value, looks_globally_shuffled, neighbour_correlation


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 5000), seed=st.integers(-(2**31), 2**63), number=st.integers(0, 10**6))
def test_it_is_a_bijection_whatever_the_size(n: int, seed: int, number: int) -> None:
    image = Permutation(n, seed, number)(np.arange(n))
    assert np.array_equal(np.sort(image), np.arange(n))


def test_any_part_can_be_computed_alone() -> None:
    permutation = Permutation(10**12 + 39, 5)
    places = np.array([0, 7, 10**12, 10**11 + 3])
    together = permutation(places)
    assert [int(permutation(places[i : i + 1])[0]) for i in range(4)] == together.tolist()
    assert together.max() < 10**12 + 39
    assert len(set(together.tolist())) == 4


def test_seeds_and_numbers_give_unrelated_orders() -> None:
    base, other_seed, other_number = (Permutation(20_000, s, e)(np.arange(20_000)) for s, e in [(0, 0), (1, 0), (0, 1)])
    for other in (other_seed, other_number):
        assert (base == other).mean() < 1e-3
        assert abs(np.corrcoef(base, other)[0, 1]) < 5 / np.sqrt(20_000)


def test_small_permutations_are_uniform() -> None:
    # Every element of [0, 5) should land at every place equally often over seeds: chi-square on the 25 counts.
    counts = np.zeros((5, 5))
    for seed in range(1500):
        counts[np.arange(5), Permutation(5, seed)(np.arange(5))] += 1
    statistic = ((counts - 300) ** 2 / 300).sum()
    assert stats.chi2.sf(statistic, df=16) > 1e-4


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n", [30_000, 65_536, 100_003])
def test_order_is_globally_shuffled(n: int, seed: int) -> None:
    assert looks_globally_shuffled(Permutation(n, seed)(np.arange(n)), n, 256)


def test_the_statistics_reject_unshuffled_and_locally_shuffled_orders() -> None:
    n, generator = 30_000, np.random.default_rng(0)
    in_order = np.arange(n)
    shuffled_batches = generator.permutation(in_order[: n // 256 * 256].reshape(-1, 256)).ravel()
    window = np.concatenate([generator.permutation(part) for part in np.split(in_order, 4)])
    assert neighbour_correlation(in_order) > 100
    for order in (in_order, shuffled_batches, window):
        assert not looks_globally_shuffled(order, n, 256)
    assert decile_p_value(window, n, 256) < 1e-12
    assert looks_globally_shuffled(generator.permutation(n), n, 256)
