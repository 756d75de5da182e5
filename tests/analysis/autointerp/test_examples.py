"""Windows, samplers and examples: exact shares, disjoint halves, negatives that do not fire."""

import dataclasses

import numpy as np
import pytest
import torch

from saelab.analysis.autointerp.embedders import CharacterEmbedder
from saelab.analysis.autointerp.neighbours import coactive_neighbours, decoder_neighbours
from saelab.analysis.autointerp.samplers import DECILES, SAMPLERS, deciles_of, mixed, quantile, random, top
from saelab.analysis.autointerp.windows import NONE, cut_windows, window_matrix, window_maxima
from saelab.core.errors import ConfigError, StoreError
from tests.analysis.autointerp.planted import DEAD, DENSE, SMALL, corpus, plant


def rng():
    return np.random.default_rng(0)


def test_windows_cover_rows_without_overlap(store):
    windows = cut_windows(store, 16)
    assert len(windows) == 80 * 4  # 65 tokens: four windows, and a rest of one token that is in none
    assert (windows.starts[1:] >= windows.stops[:-1]).all()
    seen = np.zeros(store.n_tokens, int)
    for start, stop in zip(windows.starts, windows.stops, strict=True):
        seen[start:stop] += 1
    assert set(seen) == {0, 1}
    assert ((windows.of_token == NONE) == (seen == 0)).all()
    assert windows.of_token[windows.starts].tolist() == list(range(len(windows)))


def test_a_rest_of_half_a_window_is_kept(store):
    lengths = cut_windows(store, 26).stops - cut_windows(store, 26).starts
    assert sorted(set(lengths.tolist())) == [13, 26]
    assert sorted(set((cut_windows(store, 27).stops - cut_windows(store, 27).starts).tolist())) == [27]


def test_halves_share_no_row(store):
    windows = cut_windows(store, 16)
    assert not set(windows.rows[windows.scored]) & set(windows.rows[~windows.scored])
    assert len(set(windows.rows[windows.scored])) == 40
    assert (cut_windows(store, 16, seed=1).scored != windows.scored).any()


def test_one_row_is_refused_in_one_line(tmp_path):
    with pytest.raises(StoreError, match="at least two are needed") as error:
        cut_windows(plant(tmp_path / "f", n=1), 16)
    assert "\n" not in str(error.value)


def test_maxima_and_matrix_are_those_of_the_entries(store):
    windows = cut_windows(store, 16)
    for feature in (0, 3, DENSE, DEAD):
        tokens, values = store.feature(feature)
        dense = np.zeros(store.n_tokens, np.float32)
        dense[tokens] = values
        expected = np.stack([dense[a:b] for a, b in zip(windows.starts, windows.stops, strict=True)])
        assert np.array_equal(window_matrix(store, windows, feature, np.arange(len(windows))), expected)
        fired, maxima = window_maxima(store, windows, feature)
        assert np.array_equal(fired, np.flatnonzero(expected.max(1) > 0))
        assert np.array_equal(maxima, expected.max(1)[fired])


def test_quantile_takes_exactly_a_tenth_from_each_decile():
    values = rng().random(1000).astype(np.float32)
    deciles = deciles_of(values)
    assert np.bincount(deciles)[1:].tolist() == [100] * 10
    chosen = quantile(values, deciles, 50, rng())
    assert np.bincount(deciles[chosen])[1:].tolist() == [5] * 10
    assert (np.diff(values[chosen]) <= 0).all()
    assert len(set(chosen.tolist())) == 50
    more = quantile(values, deciles, 53, rng())
    assert np.bincount(deciles[more])[1:].tolist() == [5] * 7 + [6] * 3


def test_quantile_has_every_decile_when_there_are_few():
    values = np.arange(1, 8, dtype=np.float32)
    assert quantile(values, deciles_of(values), 50, rng()).tolist() == [6, 5, 4, 3, 2, 1, 0]


def test_constant_values_still_have_equal_deciles():
    assert np.bincount(deciles_of(np.ones(70, np.float32)))[1:].tolist() == [7] * DECILES


def test_other_samplers():
    values = rng().permutation(1000).astype(np.float32)
    deciles = deciles_of(values)
    assert values[top(values, deciles, 5, rng())].tolist() == [999, 998, 997, 996, 995]
    both = mixed(values, deciles, 50, rng())
    assert values[both[:10]].tolist() == list(range(999, 989, -1))
    assert len(set(both.tolist())) == 50
    assert np.bincount(deciles[both[10:]], minlength=11)[1:].tolist() == [4] * 10
    assert len(random(values, deciles, 2000, rng())) == 1000
    with pytest.raises(ConfigError, match="did you mean quantile"):
        SAMPLERS["quantiles"]


def test_examples_are_disjoint_and_true(small):
    # delphi draws both sets from one list with one seed; here they share no row of text, whatever the feature.
    for feature in range(DENSE):
        found = small.examples(feature)
        rows = {name: set(small.windows.rows[getattr(found, name).windows]) for name in ("explain", "score")}
        assert not rows["explain"] & rows["score"]
        assert not rows["explain"] & set(small.windows.rows[found.negatives.windows])
        assert not rows["score"] & set(small.windows.rows[found.background.windows])
        for sample in (found.explain, found.score):
            for k in range(len(sample)):
                assert (sample.values[k] > 0).tolist() == [i == 10 + feature for i in sample.ids(k)]
        for sample in (found.negatives, found.contrast, found.background):
            assert all(10 + feature not in sample.ids(k) for k in range(len(sample)))
            assert not sample.values.any()
            assert len(set(sample.windows.tolist())) == len(sample)


def test_kinds_of_negatives_are_of_their_kind(small):
    found = small.examples(2)
    assert {kind: found.negatives.kinds.count(kind) for kind in set(found.negatives.kinds)} == {
        "decoder": 5, "coactive": 5, "random": 10,
    }  # fmt: skip
    nearest = decoder_neighbours(small_decoder(), np.array([2]), 3)[0]
    hard = small.examples(2).negatives
    some = [k for k, kind in enumerate(hard.kinds) if kind == "decoder"]
    words = {10 + i for i in nearest.tolist() if i < DENSE}
    alive = [i for i in decoder_neighbours(small_decoder(), np.array([2]), 9)[0].tolist() if i < DENSE]
    assert words or alive
    assert all(set(hard.ids(k).tolist()) & {10 + i for i in range(DENSE)} for k in some)


def small_decoder():
    from tests.analysis.autointerp.planted import Planted

    return Planted().W_dec


def test_neighbours_are_the_nearest_and_not_swapped(store):
    # delphi reads topk's (values, indices) the wrong way round.
    decoder = small_decoder()
    unit = decoder / decoder.norm(dim=1, keepdim=True)
    cosine = (unit @ unit.T).fill_diagonal_(-2)
    expected = torch.argsort(cosine, dim=1, descending=True)[:, :4].numpy()
    assert np.array_equal(decoder_neighbours(decoder, np.arange(10), 4), expected)
    dense = store.activations(0, store.n_tokens).to_dense().numpy() > 0
    both = dense.T.astype(float) @ dense
    either = dense.sum(0)[:, None] + dense.sum(0)[None] - both
    jaccard = np.divide(both, either, out=np.zeros_like(both), where=either > 0)
    np.fill_diagonal(jaccard, -1)
    found = coactive_neighbours(store, np.arange(10), 3)
    for i in range(10):
        assert np.allclose(jaccard[i, found[i]], np.sort(jaccard[i])[::-1][:3])


def test_features_that_cannot_be_scored_are_left_out(small):
    assert small.examples(DENSE) is None  # fires in every window: there are no negatives
    assert small.examples(DEAD) is None


def test_same_seed_same_examples(store, small):
    again = corpus(store).examples(3)
    first = small.examples(3)
    assert np.array_equal(again.score.windows, first.score.windows)
    assert np.array_equal(again.negatives.windows, first.negatives.windows)
    other = corpus(store, SMALL.model_copy(update={"seed": 1})).examples(3)
    assert not np.array_equal(other.score.windows, first.score.windows)


def test_embedding_negatives_are_the_most_alike(store):
    config = SMALL.model_copy(update={"decoder": 0, "coactive": 0, "embedding": 5, "random": 5})
    made = corpus(store, config)
    made.embedder = CharacterEmbedder(made.texts)
    found = made.examples(1)
    some = [k for k, kind in enumerate(found.negatives.kinds) if kind == "embedding"]
    centre = made.embeddings[found.explain.windows].mean(0)
    fired, _ = window_maxima(store, made.windows, 1)
    free = np.setdiff1d(np.flatnonzero(made.windows.scored), fired)
    best = np.sort(made.embeddings[free] @ centre)[::-1][:5]
    assert np.allclose(np.sort(made.embeddings[found.negatives.windows[some]] @ centre)[::-1], best)


def test_texts_are_those_of_the_tokens(small):
    found = small.examples(0)
    assert "".join(found.score.tokens(0)) == found.score.text(0)
    assert dataclasses.is_dataclass(found)
