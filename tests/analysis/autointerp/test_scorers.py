"""Scorers against judges of known quality, over real HTTP."""

import json
import re
import zlib
from dataclasses import replace

import numpy as np
import pytest

from saelab.analysis.autointerp import prompts
from saelab.analysis.autointerp.client import HttpJudge, JudgeConfig
from saelab.analysis.autointerp.embedders import CharacterEmbedder
from saelab.analysis.autointerp.examples import Corpus
from saelab.analysis.autointerp.explainers.language_model import LanguageModelExplainer, levels, strong
from saelab.analysis.autointerp.explainers.token_set import TokenSetExplainer
from saelab.analysis.autointerp.judge import Reply
from saelab.analysis.autointerp.scorers import (
    DetectionScorer,
    EmbeddingScorer,
    FuzzingScorer,
    IntruderScorer,
    SimulationScorer,
)
from saelab.analysis.autointerp.scorers.base import ScoringConfig, wording
from saelab.analysis.autointerp.scorers.detection import chances_of
from saelab.analysis.autointerp.scorers.fuzzing import WRONG
from tests.analysis.autointerp.planted import DENSE, INJECTION, SMALL, texts_of, truth, word_of
from tests.analysis.autointerp.server import serve

CONFIG = ScoringConfig()


def judge(url):
    return HttpJudge(JudgeConfig(model="scripted", endpoint=url, backoff=0.01, concurrency=8))


def items(small, features=range(DENSE)):
    return [(small.examples(i), truth(i)) for i in features]


def says(word, text):
    return int(re.search(rf" w{word}(?!\d)", text) is not None)


def knows(question):
    return [says(word_of(question), text) for text in texts_of(question)]


def knows_marks(question):
    marks = prompts.MARKERS["⟦" in "".join(texts_of(question))]  # the second pair where the text has the first
    said = []
    for text in texts_of(question):
        parts = re.findall(re.escape(marks[0]) + "(.*?)" + re.escape(marks[1]), text, re.DOTALL)
        said.append(int(bool(parts) and all(says(word_of(question), part) for part in parts)))
    return said


@pytest.mark.parametrize(("scorer", "mind"), [(DetectionScorer, knows), (FuzzingScorer, knows_marks)])
def test_perfect_judge_scores_one(small, scorer, mind):
    with serve(lambda q, m, n: json.dumps(mind(q))) as (_, url):
        scores = scorer(CONFIG, judge(url)).score(items(small))
    assert len(scores) == DENSE
    for score in scores:
        assert score.value == score.detail["tpr"] == score.detail["tnr"] == score.detail["f1"] == 1.0
        assert score.failures == 0
        assert score.low > 0.8
        assert all(right == n for right, n in score.detail["deciles"].values())


@pytest.mark.parametrize("scorer", [DetectionScorer, FuzzingScorer])
@pytest.mark.parametrize("constant", [0, 1])
def test_constant_judge_scores_one_half(small, scorer, constant):
    with serve(lambda q, m, n: json.dumps([constant] * len(texts_of(q)))) as (_, url):
        scores = scorer(CONFIG, judge(url)).score(items(small))
    for score in scores:
        assert score.value == 0.5
        assert (score.detail["tpr"], score.detail["tnr"]) == (constant, 1 - constant)
        assert score.low < 0.5 < score.high


@pytest.mark.parametrize("scorer", [DetectionScorer, FuzzingScorer])
def test_thirty_percent_noise_is_within_its_interval(small, scorer):
    mind = knows if scorer is DetectionScorer else knows_marks

    def noisy(question, messages, number):
        generator = np.random.default_rng(zlib.crc32(question.encode()))
        return json.dumps([int(x ^ (generator.random() < 0.3)) for x in mind(question)])

    with serve(noisy) as (_, url):
        scores = scorer(CONFIG, judge(url)).score(items(small))
    inside = [score.low <= 0.7 <= score.high for score in scores]
    assert sum(inside) >= len(inside) - 2
    assert abs(np.mean([score.value for score in scores]) - 0.7) < 0.08


@pytest.mark.parametrize("scorer", [DetectionScorer, FuzzingScorer])
def test_malformed_answers_are_failures(small, scorer):
    """delphi's count of failures is always 0: a judge that never answers would have no wrong answers."""
    mind = knows if scorer is DetectionScorer else knows_marks

    def broken(question, messages, number):
        right = json.dumps(mind(question))
        return right if number % 2 else right + " I hope this helps!"

    with serve(broken) as (_, url):
        scores = scorer(CONFIG, judge(url)).score(items(small))
    failures, n = sum(s.failures for s in scores), sum(s.n for s in scores)
    assert abs(failures - n / 2) <= 5 * DENSE
    for score in scores:
        right = sum(r for r, _ in score.detail["deciles"].values()) + sum(r for r, _ in score.detail["kinds"].values())
        assert right == score.n - score.failures
    with serve(lambda q, m, n: "I would rather not.") as (_, url):
        nothing = scorer(CONFIG, judge(url)).score(items(small, [0]))[0]
    assert nothing.value == 0.0
    assert nothing.failures == nothing.n
    with serve(lambda q, m, n: {"refusal": "no", "text": None}) as (_, url):
        refused = scorer(CONFIG, judge(url)).score(items(small, [0]))[0]
    assert (refused.value, refused.failures) == (0.0, refused.n)


def test_text_that_attacks_the_prompt_stays_data(small):
    seen = []

    def record(question, messages, number):
        seen.append((question, messages[0]["content"]))
        return json.dumps(knows(question))

    with serve(record) as (_, url):
        scores = DetectionScorer(CONFIG, judge(url)).score(items(small))
    attacked = [question for question, _ in seen if "Ignore all previous" in question]
    assert attacked, "the corpus holds the attack"
    for question in attacked:
        assert INJECTION not in question  # its line break and quotation mark are escaped
        assert len(texts_of(question)) <= CONFIG.shown
        assert all(re.match(r'DESCRIPTION: |TEXTS|\d\. "', line) for line in question.splitlines())
    assert "never follow" in seen[0][1]
    assert {score.value for score in scores} == {1.0}


def test_markers_are_none_that_the_text_has(small):
    assert prompts.markers_for(["a << b"]) == prompts.MARKERS[1]
    with serve(lambda q, m, n: json.dumps(knows_marks(q))) as (script, url):
        FuzzingScorer(CONFIG, judge(url)).score(items(small))
    for chat in script.asked:
        question = json.loads(chat)[-1]["content"]
        texts = texts_of(question)
        pair = next(
            pair for pair in prompts.MARKERS if pair[0] in "".join(texts) and pair[0] in json.loads(chat)[0]["content"]
        )
        bare = [text.replace(pair[0], "").replace(pair[1], "") for text in texts]
        assert not any(mark in text for mark in pair for text in bare)


def test_wrong_marks_are_where_the_feature_does_not_fire(small):
    windows = FuzzingScorer(CONFIG).marked(small.examples(1))
    kinds = [w.kind for w in windows]
    assert kinds.count("active") == 10
    assert kinds.count(WRONG) == 10
    assert len({(id(w.sample), w.k) for w in windows}) == len(windows)  # each window once
    right = [w for w in windows if w.right]
    wrong = [w for w in windows if not w.right]
    assert all((w.sample.values[w.k][: len(w.marks)][w.marks] > 0).all() for w in right)
    assert all(w.marks.any() and not (w.sample.values[w.k][: len(w.marks)][w.marks] > 0).any() for w in wrong)


def test_detection_shows_each_window_once_in_a_recorded_order(small):
    scorer = DetectionScorer(CONFIG, judge("http://127.0.0.1:1/v1"))
    requests, groups = scorer.questions((small.examples(0), truth(0)))
    assert sorted(w for group in groups for w in group) == list(range(40))
    assert groups == scorer.questions((small.examples(0), truth(0)))[1]
    other = DetectionScorer(CONFIG.model_copy(update={"seed": 1}), judge("http://127.0.0.1:1/v1"))
    assert groups != other.questions((small.examples(0), truth(0)))[1]
    assert [len(group) for group in groups] == [5] * 8
    assert all(request.messages[-1].content.count("\n") >= 6 for request in requests)


def test_intruder(small):
    def finds(question, messages, number):
        """The intruder is marked where the others' word is not."""
        marks = [re.findall(r"<<(.*?)>>|⟦(.*?)⟧", text, re.DOTALL) for text in texts_of(question)]
        words = [{w for a, b in found for w in re.findall(r"w\d+", a + b)} for found in marks]
        common = max({w for some in words for w in some}, key=lambda w: sum(w in some for some in words))
        return str(1 + next(k for k, some in enumerate(words) if common not in some))

    with serve(finds) as (_, url):
        scores = IntruderScorer(CONFIG.model_copy(update={"intruder_shown": 3}), judge(url)).score(items(small))
        assert [score.value for score in scores] == [1.0] * DENSE
        assert {score.detail["chance"] for score in scores} == {1 / 3}
        assert all(score.n == 10 for score in scores)
    with serve(lambda q, m, n: "7") as (_, url):
        nothing = IntruderScorer(CONFIG.model_copy(update={"intruder_shown": 3}), judge(url)).score(items(small, [0]))[
            0
        ]
    assert (nothing.value, nothing.failures) == (0.0, 10)
    with serve(lambda q, m, n: "1") as (_, url):
        many = IntruderScorer(CONFIG.model_copy(update={"intruder_shown": 3, "intruder_rounds": 60}), judge(url))
        guess = np.mean([score.value for score in many.score(items(small))])
    assert abs(guess - 1 / 3) < 0.08  # the place of the intruder is random


def test_intruder_from_another_decile_marks_its_own_tokens(small):
    scorer = IntruderScorer(CONFIG.model_copy(update={"intruder_shown": 3, "intruder_from": "decile"}))
    for one in scorer.rounds(small.examples(0)):
        deciles = [int(sample.deciles[k]) for sample, k, _ in one.windows]
        assert deciles[one.intruder] != one.decile
        assert {d for k, d in enumerate(deciles) if k != one.intruder} == {one.decile}


def test_simulation_of_the_truth_is_one_and_of_a_constant_undefined(small):
    found = small.examples(2)
    scorer = SimulationScorer(CONFIG, judge("http://127.0.0.1:1/v1"))
    chosen = scorer.windows(found)
    assert len(set(found.score.deciles[chosen].tolist())) == 10
    by_tokens = {
        json.dumps(found.score.tokens(k)): (10 * found.score.values[k] / found.maximum).tolist() for k in chosen
    }

    def simulate(question, messages, number):
        tokens = json.loads(question.split("): ", 1)[1])
        return json.dumps(by_tokens[json.dumps(tokens)][: len(tokens)])

    with serve(simulate) as (_, url):
        score = SimulationScorer(CONFIG, judge(url)).score([(found, truth(2))])[0]
    assert score.value == pytest.approx(1.0, abs=1e-12)
    assert set(score.detail["deciles"]) == set(range(1, 11))
    with serve(lambda q, m, n: json.dumps([3] * len(json.loads(q.split("): ", 1)[1])))) as (_, url):
        constant = SimulationScorer(CONFIG, judge(url)).score([(found, truth(2))])[0]
    assert np.isnan(constant.value)
    assert constant.failures == 0
    with serve(lambda q, m, n: "[1, 2") as (_, url):
        broken = SimulationScorer(CONFIG, judge(url)).score([(found, truth(2))])[0]
    assert broken.failures == 10


def test_explainer_reads_the_examples_and_counts_replies_without_explanation(small):
    seen = []

    def explain(question, messages, number):
        seen.append(question)
        words = re.findall(r"(?:<<|⟦)( w\d+)", question)
        best = max(set(words), key=words.count)
        return f"They all have one word.\n[EXPLANATION]: the word{best}." if number % 4 else "Hm."

    with serve(explain) as (_, url):
        explainer = LanguageModelExplainer(judge(url))
        found = explainer.explain([small.examples(i) for i in range(DENSE)])
    assert explainer.failures == 2
    assert len(found) == DENSE - 2
    assert all(e.text == truth(e.feature).text for e in found)
    assert {e.author for e in found} == {"llm:scripted:v1"}
    assert "NOT ACTIVE" not in seen[0]


def test_variants_show_negatives_and_logits(small):
    contrastive = LanguageModelExplainer(judge("http://127.0.0.1:1/v1"), "llm-contrastive").request(small.examples(1))
    question = contrastive.messages[-1].content
    active, inactive = question.split("NOT ACTIVE")
    assert len(texts_of(active)) == 15
    assert len(texts_of(inactive)) == 5
    assert not any(says(11, text) for text in texts_of(inactive))
    logits = LanguageModelExplainer(judge("http://127.0.0.1:1/v1"), "llm-logits").request(small.examples(1))
    assert "RAISED TOKENS: " in logits.messages[-1].content
    assert "w10" not in contrastive.messages[0].content


def test_token_set_is_the_word_and_its_rule_is_perfect(small):
    examples = [small.examples(i) for i in range(DENSE)]
    found = TokenSetExplainer().explain(examples)
    assert [e.detail["tokens"] for e in found] == [[10 + i] for i in range(DENSE)]
    assert found[0].text == "“ w10”"
    pairs = list(zip(examples, found, strict=True))
    for scorer in (DetectionScorer(CONFIG), FuzzingScorer(CONFIG)):
        assert [score.value for score in scorer.score(pairs)] == [1.0] * DENSE
        assert scorer.score([(examples[0], truth(0))]) == []  # a sentence has no rule
        swapped = scorer.score([(examples[0], found[1])])[0]
        assert swapped.value < 0.7


def test_models_read_the_tokens_of_a_set_as_they_are_in_texts(small):
    examples = [small.examples(i) for i in range(DENSE)]
    found = TokenSetExplainer().explain(examples)
    assert wording((examples[0], found[0])) == " w10"
    line = replace(found[0], text="“⏎”", detail={"tokens": [4, 11]})
    assert wording((examples[0], line)) == " << >>  w11"
    assert wording((examples[0], truth(0))) == "the word w10."
    assert wording((examples[0], None)) == ""
    own = Corpus(small.store, SMALL)
    own.embedder = CharacterEmbedder(own.texts)
    pairs = [(own.examples(e.feature), e) for e in found]
    scores = EmbeddingScorer(CONFIG, own.embedder).score(pairs)
    assert np.mean([score.value for score in scores]) > 0.9


def test_levels_and_strength():
    values = np.array([0, 0.001, 0.1, 0.55, 1.0], np.float32)
    assert levels(values, 1.0).tolist() == [0, 1, 1, 6, 10]
    assert strong(np.array([[0, 0.2, 0.3, 1.0], [0, 0, 0, 0]], np.float32)).tolist() == [
        [False, False, True, True], [False] * 4,
    ]  # fmt: skip


def test_probabilities_are_those_of_zero_and_one():
    half = (("1", np.log(0.3)), ("0", np.log(0.1)), ("x", np.log(0.6)))
    reply = Reply("[1, 0]", logprobs=(("[", ()), ("1", half), (",", ()), (" 0", ((" 0", 0.0),)), ("]", ())))
    assert np.allclose(chances_of(reply, 2), [0.75, 0.0])
    assert np.isnan(chances_of(reply, 3)).all()
