import time

import numpy as np
import pytest
import torch

from saelab.core.errors import ConfigError, StoreError
from saelab.features.build import build_features
from saelab.features.summary import TOP
from tests.features.fakes import SITE, FakeModel, Oracle, random_rows


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A store of 25 random features on 300 rows, and its dense code."""
    generator = torch.Generator().manual_seed(0)
    sae = Oracle(
        torch.randn(6, 25, generator=generator), torch.randn(25, 6, generator=generator), b_enc=-torch.ones(25)
    )
    model, rows = FakeModel(d_vocab=200), random_rows(300, 12, d_vocab=200)
    store = build_features(model, sae, rows, SITE, tmp_path_factory.mktemp("query") / "f")
    return store, store.activations(0, store.n_tokens).to_dense().numpy()


@pytest.mark.parametrize("n", [1, 20, TOP, TOP + 1, 1000])
@pytest.mark.parametrize("distinct", [True, False])
def test_top_contexts_are_the_strongest(built, n, distinct):
    store, dense = built
    for i in np.argsort((dense > 0).sum(0))[[0, 5, 10, 20, 24]].tolist():
        order = sorted(np.flatnonzero(dense[:, i]), key=lambda t: (-dense[t, i], t))
        if distinct:
            rows, best = set(), []
            for t in order:
                if t // 12 not in rows:
                    rows.add(t // 12)
                    best.append(t)
            order = best
        contexts = store.top_contexts(i, n, before=0, after=0, distinct_rows=distinct)
        assert [c.start for c in contexts] == order[:n]
        assert [c.value for c in contexts] == [dense[t, i] for t in order[:n]]


def test_context_is_the_text_around_its_peak(built):
    store, dense = built
    i = int((dense > 0).sum(0).argmax())
    for context in store.top_contexts(i, 20, before=4, after=3):
        token = context.start + context.peak
        row, first, last = store.row_of(token)
        assert (context.row, context.position) == (row, token - first)
        assert context.start == max(first, token - 4)
        stop = context.start + len(context.tokens)
        assert stop == min(last, token + 4)
        assert list(context.tokens) == store.tokens(context.start, stop)
        assert context.values.tolist() == dense[context.start : stop, i].tolist()
        assert context.text == "".join(context.tokens)
        assert context.value == dense[token, i] == context.values[context.peak]


def test_contexts_begin_with_bos_and_end_with_their_row(built):
    store, dense = built
    i = int((dense > 0).sum(0).argmax())
    for context in store.top_contexts(i, 10, before=100, after=100):
        assert len(context.tokens) == 12
        assert context.tokens[0] == "<0>"
        assert context.values[0] == 0


def test_intervals_by_quantile_have_equal_counts(built):
    store, dense = built
    i = int((dense > 0).sum(0).argmax())
    values = np.sort(dense[:, i][dense[:, i] > 0])
    intervals = store.interval_samples(i, 5, 4, seed=3)
    assert [x.count for x in intervals] == [len(part) for part in np.array_split(values, 5)][::-1]
    assert intervals[0].high == values[-1]
    assert intervals[-1].low == values[0]
    for interval in intervals:
        assert len(interval.contexts) == 4
        drawn = [c.value for c in interval.contexts]
        assert drawn == sorted(drawn, reverse=True)
        assert all(interval.low <= value <= interval.high for value in drawn)
        assert len({c.start + c.peak for c in interval.contexts}) == 4
    again = store.interval_samples(i, 5, 4, seed=3)
    other = store.interval_samples(i, 5, 4, seed=4)
    places = [[[c.start + c.peak for c in x.contexts] for x in run] for run in (intervals, again, other)]
    assert places[0] == places[1] != places[2]


def test_intervals_by_value_have_equal_width(built):
    store, dense = built
    i = int((dense > 0).sum(0).argmax())
    values = dense[:, i][dense[:, i] > 0]
    intervals = store.interval_samples(i, 4, 1000, by="value")[::-1]
    counts, edges = np.histogram(values, np.linspace(0, float(values.max()), 5))
    assert [x.count for x in intervals] == counts.tolist()
    assert [x.low for x in intervals] == pytest.approx(edges[:-1].tolist())
    assert sorted(c.value for x in intervals for c in x.contexts) == sorted(values.tolist())


def test_fewer_activations_than_intervals(built):
    store, dense = built
    counts = (dense > 0).sum(0)
    i = int(np.where(counts > 0, counts, 10**9).argmin())
    intervals = store.interval_samples(i, int(counts[i]) + 5, 3)
    assert [x.count for x in intervals] == [1] * counts[i]


@pytest.mark.parametrize("log", [True, False])
def test_histogram_equals_numpy(built, log):
    store, dense = built
    for i in range(store.n_features):
        values = dense[:, i][dense[:, i] > 0].astype(np.float64)
        result = store.histogram(i, 9, log=log)
        assert result.counts.sum() == len(values)
        if len(values):
            assert result.counts.tolist() == np.histogram(values, result.edges)[0].tolist()
            assert result.edges[-1] == values.max()


def test_co_active_equals_dense(built):
    store, dense = built
    active = dense > 0
    i = int(active.sum(0).argmax())
    frame = store.co_active(i, 30)
    together = (active[:, [i]] & active).sum(0)
    together[i] = 0
    assert frame["together"].tolist() == sorted(together[together > 0].tolist(), reverse=True)
    assert frame["together"].tolist() == together[frame["feature"]].tolist()
    np.testing.assert_allclose(frame["share"], frame["together"] / active[:, i].sum())
    np.testing.assert_allclose(frame["lift"], frame["share"] / (active.sum(0) / store.n_kept)[frame["feature"]])
    either = (active[:, [i]] | active).sum(0)[frame["feature"]]
    np.testing.assert_allclose(frame["jaccard"], frame["together"] / either)
    sampled = store.co_active(i, 5, max_tokens=50)
    assert sampled["share"].between(0, 1).all()
    assert sampled["together"].max() <= 50


def test_bad_questions_are_one_line(built):
    store, _ = built
    with pytest.raises(StoreError, match=r"feature 25 does not exist.*0 to 24"):
        store.top_contexts(25)
    with pytest.raises(StoreError):
        store.feature(-1)
    with pytest.raises(ConfigError):
        store.top_contexts(0, n=-1)
    with pytest.raises(ConfigError):
        store.interval_samples(0, 0)
    with pytest.raises(ConfigError):
        store.histogram(0, 0)


class Crowd:
    """Feature 0 fires on every token, feature 1 on every other, the rest rarely; values are random."""

    d_in, d_sae = 6, 400
    W_enc, W_dec = torch.ones(6, 400), torch.ones(400, 6)

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def encode(self, x):
        from saelab.core.code import SparseCode

        n = len(x)
        indices = torch.stack(
            [torch.zeros(n, dtype=torch.int64), torch.arange(n) % 2 + 1, torch.randint(3, 400, (n,))], 1
        )
        return SparseCode.from_topk(indices, torch.rand(n, 3, generator=self.generator) + 0.01, 400)

    def decode(self, code):
        raise NotImplementedError


def test_top_contexts_take_milliseconds(tmp_path):
    """200,000 tokens, each of them an entry of feature 0: its top contexts cost what those of a rare one do."""
    store = build_features(FakeModel(), Crowd(), random_rows(1000, 201), SITE, tmp_path / "f", rows_per_batch=200)
    assert store.column("count")[0] == 200_000
    store.top_contexts(399)
    taken = []
    for i in [0, 1, 2] * 10 + list(range(3, 73)):
        start = time.thread_time()
        assert len(store.top_contexts(i, 20)) == 20
        taken.append(time.thread_time() - start)
    assert np.percentile(taken, 95) < 0.020
