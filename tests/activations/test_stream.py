import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab.activations.harvest import HarvestConfig, harvest
from saelab.activations.store import ActivationStore
from saelab.core.errors import ConfigError, ResumeError
from tests.activations.fakes import EchoModel, FakeModel, FakeRows, NumberedRows
from tests.activations.shuffling import looks_globally_shuffled


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """20 000 rows whose activation is their number."""
    config = HarvestConfig(shard_bytes=50_000, rows_per_batch=50)
    return harvest(EchoModel(), NumberedRows(500, 40), ["a", "b"], tmp_path_factory.mktemp("s") / "store", config)


def places(stream: object, batches: int | None = None) -> np.ndarray:
    return torch.cat([batch.x[:, 0] for batch in islice(stream, batches)]).long().numpy()  # type: ignore[call-overload]


@pytest.mark.parametrize("seed", range(6))
def test_it_is_globally_shuffled(store: ActivationStore, seed: int) -> None:
    order = places(store.stream("a", 256, seed=seed, epochs=2))
    for epoch in (order[: store.n_rows], order[store.n_rows :]):
        assert looks_globally_shuffled(epoch, store.n_rows, 256)


def test_every_row_once_per_epoch_and_epochs_differ(store: ActivationStore) -> None:
    order = places(store.stream("a", 300, seed=1, epochs=3))  # 300 does not divide 20 000: batches straddle epochs
    epochs = order.reshape(3, store.n_rows)
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), np.arange(store.n_rows))
    assert (epochs[0] == epochs[1]).mean() < 1e-2
    assert (places(store.stream("a", 300, seed=2, epochs=1)) == epochs[0]).mean() < 1e-2
    assert np.array_equal(places(store.stream("a", 300, seed=1, epochs=1)), epochs[0])


def test_without_epochs_it_goes_on_with_full_batches(store: ActivationStore) -> None:
    batches = list(islice(store.stream("a", 3001), 15))
    assert {batch.x.shape for batch in batches} == {(3001, 4)}


@settings(max_examples=25, deadline=None)
@given(batch_size=st.integers(1, 9000), after=st.integers(0, 12))
def test_resume_is_exact_at_any_batch(store: ActivationStore, batch_size: int, after: int) -> None:
    stream = store.stream("a", batch_size, seed=3)
    iterator = iter(stream)
    for _ in range(after):
        next(iterator)
    state = json.loads(json.dumps(stream.state_dict()))
    assert len(json.dumps(state)) < 300
    going_on = [next(iterator).x for _ in range(4)]
    iterator.close()  # type: ignore[attr-defined]
    other = store.stream("a", batch_size, seed=3)
    other.load_state_dict(state)
    for x, batch in zip(going_on, other, strict=False):
        assert torch.equal(x, batch.x)


def test_a_second_iterator_goes_on_where_the_first_was_left(store: ActivationStore) -> None:
    stream, reference = store.stream("a", 100), places(store.stream("a", 100), 6)
    first = places(stream, 2)
    assert np.array_equal(np.concatenate([first, places(stream, 4)]), reference)


def test_states_of_other_streams_are_refused(store: ActivationStore) -> None:
    state = store.stream("a", 10, seed=0).state_dict()
    for other in (store.stream("a", 10, seed=1), store.stream("b", 10), store.stream("a", 10, target_site="b")):
        with pytest.raises(ResumeError, match="saved stream position has"):
            other.load_state_dict(state)
    with pytest.raises(ResumeError, match="store"):
        store.stream("a", 10).load_state_dict({**state, "store": "crc32:ffffffff"})
    with pytest.raises(ConfigError, match="batch_size"):
        store.stream("a", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_target_and_gradient_belong_to_the_same_tokens(tmp_path: Path, dtype: torch.dtype) -> None:
    config = HarvestConfig(gradients=True, shard_bytes=3000)
    store = harvest(FakeModel(dtype), FakeRows(20, 12), ["a", "b"], tmp_path / "s", config)
    every = torch.arange(store.n_rows)
    a, b, grad = (store.read_rows(name, every).float() for name in ("a", "b", "a.grad"))
    stream = store.stream("a", 32, target_site="b", gradient=True, epochs=1)
    assert stream.d_in == 4
    begin = 0
    for batch in stream:
        rows = stream.rows_at(begin, batch.x.shape[0])
        begin += batch.x.shape[0]
        assert batch.target is not None
        assert batch.gradient is not None
        assert batch.x.dtype == batch.target.dtype == batch.gradient.dtype == torch.float32
        assert torch.equal(batch.x, a[rows])
        assert torch.equal(batch.target, b[rows])
        assert torch.equal(batch.gradient, grad[rows])
    assert begin == store.n_rows == 20 * 10


def test_memory_does_not_grow_with_the_store() -> None:
    # A stream over 4e9 imaginary rows: only the rows asked for are ever made.
    from saelab.activations.stream import StoreStream

    stream = StoreStream(
        lambda name, rows: rows[:, None].double(),
        n_rows=4_000_000_007,
        d_in=1,
        site="a",
        batch_size=64,
        seed=0,
        target_site=None,
        gradient=False,
        epochs=None,
        identity="x",
    )
    rows = stream.rows_at(4_000_000_000, 20_000)
    assert rows.unique().numel() > 19_990
    assert int(rows.max()) > 3_990_000_000
