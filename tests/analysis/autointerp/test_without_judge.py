"""Scorers that need no language model, and embedders, against planted truth."""

import re

import numpy as np
import pytest
import torch

from saelab.analysis.autointerp.embedders import CharacterEmbedder, Embedder, open_embedder
from saelab.analysis.autointerp.examples import Corpus
from saelab.analysis.autointerp.scorers import (
    EmbeddingScorer,
    ExampleEmbeddingScorer,
    InterventionScorer,
    IntruderScorer,
    SurfaceScorer,
    SurprisalScorer,
    losses,
)
from saelab.analysis.autointerp.scorers.base import ScoringConfig
from saelab.analysis.autointerp.scorers.losses import mean_losses, mean_losses_after
from saelab.core.errors import ConfigError
from saelab.features.explanations import Explanation
from tests.analysis.autointerp.planted import DENSE, SMALL, WORDS, Planted, PositionModel, corpus, truth
from tests.features.fakes import SITE, FakeModel

CONFIG = ScoringConfig()


class OneHot:
    """Says which words are in a text."""

    name = "one-hot"

    def documents(self, texts):
        made = np.array(
            [[f" w{i} " in f"{text.replace('.', ' ')} ".replace(" w", "  w") for i in range(WORDS)] for text in texts]
        )
        return (made / np.maximum(np.linalg.norm(made, axis=1, keepdims=True), 1)).astype(np.float32)

    def queries(self, texts):
        return self.documents(texts)


@pytest.fixture(scope="module")
def words(store):
    made = corpus(store)
    made.embedder = OneHot()
    return made


def items(words, shift=0):
    return [(words.examples(i), truth(i + shift)) for i in range(4)]


def test_one_hot_embedder_gives_auc_one(words):
    assert isinstance(OneHot(), Embedder)
    for score in EmbeddingScorer(CONFIG, words.embedder).score(items(words)):
        assert score.value == 1.0
        assert set(score.detail["kinds"].values()) == {1.0}
        assert set(score.detail["deciles"]) == set(range(1, 11))
    for score in EmbeddingScorer(CONFIG, words.embedder).score(items(words, shift=20)):
        assert 0.2 < score.value < 0.8  # an explanation of something else


def test_example_embedding_finds_what_windows_share(words):
    scores = ExampleEmbeddingScorer(CONFIG, words.embedder).score(items(words))
    assert np.mean([score.value for score in scores]) > 0.62  # one shared word of sixteen, and noise of the others
    assert np.mean([score.detail["delta_plus"] for score in scores]) > 0.03
    assert abs(np.mean([score.detail["delta_minus"] for score in scores])) < 0.03
    assert {score.author for score in scores} == {""}


def test_example_embedding_of_constant_vectors_is_chance(store):
    made = corpus(store)

    class Constant(OneHot):
        def documents(self, texts):
            return np.ones((len(texts), 1), np.float32)

    made.embedder = Constant()
    for score in ExampleEmbeddingScorer(CONFIG, made.embedder).score(items(made)):
        assert score.value == 0.5
        assert score.detail == {"delta_plus": 0.0, "delta_minus": 0.0}


def test_surface_learns_the_word(words):
    for score in SurfaceScorer(CONFIG, words.embedder).score(items(words)):
        assert score.value > 0.95


def test_intruder_by_embedding(words):
    scores = IntruderScorer(CONFIG.model_copy(update={"intruder_shown": 3, "intruder_rounds": 60}), None).score(
        items(words)
    )
    assert np.mean([score.value for score in scores]) > 0.42  # chance is a third
    assert {score.judge for score in scores} == {"embedding"}
    assert all(sum(n for _, n in score.detail["kinds"].values()) == 60 for score in scores)


def test_no_embedder_judges_intruders_that_it_chose_itself(store):
    """Negatives most like the feature's windows are never the least alike: an embedder cannot find them."""
    config = CONFIG.model_copy(update={"intruder_shown": 3, "intruder_rounds": 30})
    made = Corpus(store, SMALL.model_copy(update={"embedding": 10}), embedder=OneHot())
    found = items(made)
    assert all("embedding" in examples.negatives.kinds for examples, _ in found)
    scores = IntruderScorer(config, None).score(found)
    assert len(scores) == 4
    for score in scores:
        assert "embedding" not in score.detail["kinds"]

    class Judge:
        name = "scripted"

        def ask(self, requests, done):
            raise AssertionError("nothing is asked for the windows alone")

    rounds = [one for examples, _ in found for one in IntruderScorer(config, Judge()).rounds(examples)]
    assert "embedding" in {one.kind for one in rounds}
    only = Corpus(store, SMALL.model_copy(update={"embedding": 10, "random": 0, "decoder": 0, "coactive": 0}))
    only.embedder = OneHot()
    assert IntruderScorer(config, None).score(items(only)) == []


def test_character_embedder():
    embedder = CharacterEmbedder(["abc def", "xyz", "the cat"])
    made = embedder.documents(["the cat sat", "the cat sits", "0123456789", ""])
    assert np.allclose(np.linalg.norm(made[:3], axis=1), 1)
    assert made[0] @ made[1] > 0.5 > made[0] @ made[2]
    assert not made[3].any() or np.isfinite(made[3]).all()
    assert np.array_equal(
        made,
        CharacterEmbedder(["abc def", "xyz", "the cat"]).documents(["the cat sat", "the cat sits", "0123456789", ""]),
    )
    assert np.allclose(
        embedder.documents(["a", "the cat"])[1], embedder.documents(["the cat"])[0]
    )  # no neighbours leak
    assert embedder.documents([]).shape == (0, 1024)


def test_embedder_that_is_not_there_is_one_line(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ConfigError, match="needs sentence-transformers"):
        open_embedder("all-MiniLM-L6-v2", [])


class Words:
    """A tokenizer that knows the words w0, w1 ... and nothing else."""

    bos_token_id = 0

    def __new__(cls, text, **options):
        return {"input_ids": [int(w) for w in re.findall(r"w(\d+)", text)] or [1]}

    @staticmethod
    def decode(ids):
        return "".join(f" w{i}" for i in ids)


class Counting(FakeModel):
    """Next word: likely one that was in the text before (so a description that names a word helps)."""

    n_ctx = 64

    def __init__(self, store):
        super().__init__(d_vocab=WORDS, tokenizer=Words)
        self.fingerprint = store.manifest["model_fingerprint"]
        self.name = "counting"

    def logits(self, tokens, replace=None):
        seen = torch.nn.functional.one_hot(tokens, WORDS).float().cumsum(1)
        x = torch.zeros(*tokens.shape, 6)
        if replace:
            x = replace[SITE](x)
        return 5.0 * (seen > 0).float() + x @ self.steer

    def losses_after(self, head, tails):
        tokens = torch.cat([head.expand(len(tails), -1), tails], 1)
        logits = self.logits(tokens)[:, len(head) - 1 : -1]
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), tails, reduction="none")

    steer = torch.zeros(6, WORDS)


def test_surprisal_rewards_an_explanation_that_names_the_word(store, words):
    model = Counting(store)
    right = SurprisalScorer(CONFIG, model).score(items(words))
    wrong = SurprisalScorer(CONFIG, model).score(items(words, shift=20))
    assert all(score.value > 0.9 for score in right)
    assert all(score.detail["gain_active"] > score.detail["gain_inactive"] for score in right)
    assert abs(np.mean([score.value for score in wrong]) - 0.5) < 0.2
    assert right[0].n == 20


def test_mean_losses_are_those_of_one_row_at_a_time(store):
    model = Counting(store)
    generator = np.random.default_rng(0)
    rows = [
        (generator.integers(1, WORDS, n).tolist(), generator.integers(1, WORDS, m).tolist())
        for n, m in ((3, 5), (10, 2), (1, 1), (60, 30), (5, 70))
    ]
    found = mean_losses(model, rows)
    for (before, after), loss in zip(rows, found, strict=True):
        ids = (before + after)[-64:]
        count = min(len(after), 63)
        log_p = model.logits(torch.tensor([ids]))[0].log_softmax(-1)
        expected = -np.mean([float(log_p[k - 1, ids[k]]) for k in range(len(ids) - count, len(ids))])
        assert loss == pytest.approx(expected, abs=1e-5)


def test_mean_losses_after_are_those_of_one_row_at_a_time(store, monkeypatch):
    model = Counting(store)
    generator = np.random.default_rng(1)
    head = generator.integers(1, WORDS, 9).tolist()
    tails = [generator.integers(1, WORDS, m).tolist() for m in (5, 1, 30, 5, 12)]
    expected = mean_losses(model, [(head, tail) for tail in tails])
    assert mean_losses_after(model, head, tails) == pytest.approx(expected, abs=1e-5)
    monkeypatch.setattr(losses, "LOGIT_BYTES", 4 * WORDS * 12)  # a batch of one, or of two short ones
    assert mean_losses_after(model, head, tails) == pytest.approx(expected, abs=1e-5)


def test_intervention_reaches_the_kl_and_finds_the_word_that_is_written(store, words):
    """Feature i writes the word w(10 + i): the explanation that says so is likelier after steering."""
    model, sae = Counting(store), Planted()
    model.steer = torch.zeros(6, WORDS)
    decoder = torch.zeros(10, 6)
    for i in range(4):
        decoder[i, i] = 1
        model.steer[i, 10 + i] = 3.0
    sae.W_dec = decoder
    model.read = lambda tokens, sites: {SITE: torch.ones(*tokens.shape, 6)}
    config = CONFIG.model_copy(update={"texts": 3})
    right = InterventionScorer(config, model, sae, SITE).score(items(words))
    wrong = InterventionScorer(config, model, sae, SITE).score(items(words, shift=20))
    for score in right:
        assert score.detail["kl"] == pytest.approx(config.kl, rel=0.1)
        assert score.n == 3
    assert np.mean([score.value for score in right]) > np.mean([score.value for score in wrong]) + 0.3


def test_intervention_with_a_judge_counts_and_hides_the_side(store, words):
    from saelab.analysis.autointerp.judge import Reply

    class Judge:
        name = "scripted"

        def __init__(self):
            self.seen = []

        def ask(self, requests, done):
            for place, request in enumerate(requests):
                self.seen.append(request)
                done(place, Reply("1"))

    model, sae, judge = Counting(store), Planted(), Judge()
    model.read = lambda tokens, sites: {SITE: torch.ones(*tokens.shape, 6)}
    config = CONFIG.model_copy(update={"texts": 8})
    found = [(words.examples(i), truth(i)) for i in range(DENSE)]
    scores = InterventionScorer(config, model, sae, SITE, judge).score(found)
    assert len(judge.seen) == 8 * DENSE
    assert abs(np.mean([score.value for score in scores]) - 0.5) < 0.2  # "A" is right about half of the time


def test_position_model_is_what_the_store_was_built_with():
    x = PositionModel(d_vocab=WORDS).read(torch.tensor([[0, 10]]), [SITE])[SITE]
    assert x[0, 1].tolist()[:2] == [10, 2]
    assert isinstance(Explanation(0, "a", "b"), Explanation)
