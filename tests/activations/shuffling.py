"""Statistics that tell a global shuffle from a local one or from none, given the places of streamed rows."""

import numpy as np
from scipy import stats

SIGMAS = 5.0


def neighbour_correlation(places: np.ndarray) -> float:
    """Correlation of the places of neighbouring rows, in standard errors (1/sqrt(n) under independence)."""
    correlation = np.corrcoef(places[:-1], places[1:])[0, 1]
    return float(correlation * np.sqrt(len(places) - 1))


def decile_p_value(places: np.ndarray, n_rows: int, batch_size: int) -> float:
    """p-value of the hypothesis that every batch draws evenly from the ten deciles of the store."""
    batches = places[: len(places) // batch_size * batch_size].reshape(-1, batch_size)
    deciles = batches * 10 // n_rows
    counts = np.stack([(deciles == d).sum(axis=1) for d in range(10)], axis=1)
    expected = batch_size / 10
    # Drawing without replacement makes counts less variable than a multinomial; the test is then conservative.
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return float(stats.chi2.sf(statistic, df=9 * len(batches)))


def looks_globally_shuffled(places: np.ndarray, n_rows: int, batch_size: int) -> bool:
    return (
        abs(neighbour_correlation(places)) < SIGMAS
        and decile_p_value(places, n_rows, batch_size) > 1e-6
        and abs(neighbour_correlation(places[::7])) < SIGMAS
    )
