import json
from itertools import islice

import numpy as np
import pytest
import torch

from saelab.activations.live import LiveStream
from saelab.core.errors import ConfigError, ResumeError, TextError
from tests.activations.fakes import EchoModel, FakeModel, FakeRows, NumberedRows
from tests.activations.shuffling import looks_globally_shuffled, neighbour_correlation

ROWS, LENGTH = 500, 40
N = ROWS * LENGTH


def stream(batch_size: int = 250, **settings: object) -> LiveStream:
    chosen: dict[str, object] = {"buffer_rows": 2000, "rows_per_batch": 8, "text_window": 512}
    return LiveStream(EchoModel(), NumberedRows(ROWS, LENGTH), "a", batch_size, **{**chosen, **settings})  # type: ignore[arg-type]


def places(source: LiveStream, batches: int) -> np.ndarray:
    return torch.cat([batch.x[:, 0] for batch in islice(source, batches)]).long().numpy()


@pytest.mark.parametrize("seed", range(4))
def test_with_the_text_inside_the_window_it_is_globally_shuffled(seed: int) -> None:
    order = places(stream(seed=seed), N // 250)
    assert np.array_equal(np.sort(order), np.arange(N))
    assert abs(neighbour_correlation(order)) < 5
    # The buffer holds 50 text rows' tokens: tokens of one text row share a batch more often than under a global
    # shuffle, but a batch holds far more text rows than the 250 / 40 of unshuffled reading.
    rows_per_batch = np.mean([len(set(batch // LENGTH)) for batch in order.reshape(-1, 250)])
    assert 40 < rows_per_batch < 70


def test_with_everything_in_the_buffer_it_is_as_good_as_a_store() -> None:
    assert looks_globally_shuffled(places(stream(buffer_rows=N), N // 250), N, 250)


def test_a_small_window_is_found_out() -> None:
    order = places(stream(text_window=8, buffer_rows=500), N // 250)
    assert neighbour_correlation(order) > 50


def test_every_row_once_per_epoch_and_epochs_differ() -> None:
    order = places(stream(buffer_rows=1000), 3 * N // 250)
    first, second, third = order.reshape(3, N)  # the buffer divides the epoch, so blocks end where epochs do
    for epoch in (first, second, third):
        assert np.array_equal(np.sort(epoch), np.arange(N))
    assert (first == second).mean() < 1e-2
    assert (places(stream(buffer_rows=1000, seed=1), N // 250) == first).mean() < 1e-2


@pytest.mark.parametrize(("batch_size", "after"), [(250, 0), (250, 1), (250, 8), (333, 17), (1999, 23), (2000, 11)])
def test_resume_is_exact(batch_size: int, after: int) -> None:
    source = stream(batch_size)
    iterator = iter(source)
    for _ in range(after):
        next(iterator)
    state = json.loads(json.dumps(source.state_dict()))
    assert len(json.dumps(state)) < 1000
    other = stream(batch_size)
    other.load_state_dict(state)
    for batch, same in islice(zip(iterator, other, strict=True), 12):
        assert torch.equal(batch.x, same.x)


def test_resume_is_exact_with_outliers_targets_and_gradients() -> None:
    def make() -> LiveStream:
        rows = FakeRows(90, 16)
        return LiveStream(
            FakeModel(torch.bfloat16),
            rows,
            "a",
            64,
            buffer_rows=300,
            seed=5,
            target_site="b",
            gradient=True,
            outlier_norm=1.4,
            rows_per_batch=4,
            text_window=32,
        )

    source = make()
    iterator = iter(source)
    for _ in range(31):
        next(iterator)
    other = make()
    other.load_state_dict(json.loads(json.dumps(source.state_dict())))
    for batch, same in islice(zip(iterator, other, strict=True), 20):
        assert batch.target is not None
        assert batch.gradient is not None
        assert same.target is not None
        assert same.gradient is not None
        assert batch.x.dtype == batch.target.dtype == batch.gradient.dtype == torch.float32
        assert torch.equal(batch.x, same.x)
        assert torch.equal(batch.target, same.target)
        assert torch.equal(batch.gradient, same.gradient)
        assert torch.equal(batch.gradient, batch.x * 2)


def test_states_of_other_streams_are_refused() -> None:
    state = stream().state_dict()
    for other in (stream(seed=1), stream(buffer_rows=2001), stream(text_window=64)):
        with pytest.raises(ResumeError, match="saved stream position has"):
            other.load_state_dict(state)


def test_bad_sizes_and_empty_texts() -> None:
    with pytest.raises(ConfigError, match="buffer_rows must be at least batch_size"):
        stream(100, buffer_rows=99)
    with pytest.raises(ConfigError):
        stream(0)
    rows = FakeRows(4, 5)
    rows.keep[:] = False
    with pytest.raises(TextError, match="no token to keep"):
        next(iter(LiveStream(FakeModel(), rows, "a", 2, buffer_rows=4)))
