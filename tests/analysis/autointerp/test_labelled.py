"""Our scorers' parsing and arithmetic on labelled data of others: OpenAI's puzzles, EleutherAI's examples."""

import json
import re

import numpy as np
import pytest

from saelab.analysis.autointerp import prompts
from saelab.analysis.autointerp.explainers.language_model import levels
from saelab.analysis.autointerp.parse import parse_labels, parse_numbers
from saelab.analysis.autointerp.scorers.base import Judgement, grade
from saelab.analysis.autointerp.scorers.simulation import simulation_score
from tests.analysis.autointerp.planted import texts_of


@pytest.fixture
def puzzles(shared):
    data = json.loads((shared / "explanations" / "openai_puzzles.json").read_text())
    found = {}
    for name, puzzle in data.items():
        sentences = [
            [(token, 0) if isinstance(token, str) else tuple(token) for token in sentence]
            for sentence in puzzle["sentences"]
        ]
        found[name] = (puzzle["explanation"], sentences)
    return found


def test_simulating_the_true_activations_of_every_puzzle_is_one(puzzles):
    assert len(puzzles) == 19
    for explanation, sentences in puzzles.values():
        true, predicted = [], []
        for sentence in sentences:
            tokens = [token for token, _ in sentence]
            question = prompts.simulation_messages(explanation, tokens)[-1].content
            assert json.loads(question.split("): ", 1)[1]) == tokens  # nothing is lost on the way to the judge
            values = np.array([value for _, value in sentence], np.float32)
            reply = json.dumps([float(v) for v in values])
            true.append(values)
            predicted.append(parse_numbers(reply, len(tokens)))
        value, _, _, n, failures, _ = simulation_score(true, predicted, [1 + k % 2 for k in range(len(true))])
        assert value == pytest.approx(1.0, abs=1e-12)
        assert failures == 0
        assert n == sum(map(len, true))
        assert np.isnan(simulation_score(true, [[2.0] * len(t) for t in true], [1] * len(true))[0])
        shifted = simulation_score(true, [np.roll(t, 1).tolist() for t in true], [1] * len(true))[0]
        assert shifted < 0.9


def test_levels_of_the_puzzles_are_their_own(puzzles):
    for _, sentences in puzzles.values():
        values = np.array([v for sentence in sentences for _, v in sentence], np.float32)
        assert np.array_equal(levels(values, 10.0), values.astype(int))


@pytest.mark.parametrize("kind", ["clean", "fuzzed"])
def test_labelled_examples_through_prompt_parser_and_arithmetic(shared, kind):
    path = shared / "explanations" / "sae-auto-interp_detection_fuzzing_examples.json"
    features = json.loads(path.read_text())
    assert len(features) == 18
    for name, feature in features.items():
        texts, labels = zip(*((e["text"], e["score"]) for e in feature[kind]), strict=True)
        bare = [re.sub("<<|>>", "", text) for text in texts]
        markers = prompts.markers_for(bare)
        if kind == "clean":
            messages = prompts.detection_messages(feature["explanation"], texts)
        else:
            messages = prompts.fuzzing_messages(feature["explanation"], texts, markers)
        assert texts_of(messages[-1].content) == list(texts)
        for reply, right in ((json.dumps(labels), True), (json.dumps([1 - x for x in labels]), False)):
            said = parse_labels(reply, len(labels))
            judgements = [
                Judgement(bool(x), bool(y), 1 if x else 0, "active" if x else "random")
                for x, y in zip(labels, said, strict=True)
            ]
            score = grade(judgements, 0, "detection", "a", "j")
            if set(labels) == {0, 1}:
                assert score.value == float(right), name
                assert score.detail["f1"] == float(right)
            else:
                assert score is None


def test_saved_counts_of_others_are_proportions(shared):
    """Counts that EleutherAI saved (correct of number_questions) fit our interval's arithmetic."""
    from saelab.analysis.autointerp.intervals import proportion

    data = json.loads((shared / "explanations" / "sae-auto-interp-gpt2" / "recal_layer_0.json").read_text())
    values = [proportion(one["correct"], one["number_questions"]) for one in data.values()]
    assert len(values) == 245
    assert all(0 <= v.low <= v.value <= v.high <= 1 for v in values)
    assert np.mean([v.value for v in values]) == pytest.approx(
        np.mean([one["correct"] / one["number_questions"] for one in data.values()])
    )


def test_simulated_answers_of_others_are_no_answers_of_ours(shared):
    """Their free-form answers ("Activating tokens: Everybody (10)") are not the list asked for: failures."""
    data = json.loads((shared / "explanations" / "sae-auto-interp-gpt2" / "simulated_layer_0.json").read_text())
    answers = [answer for one in data.values() for answer in one["answers"]]
    assert len(answers) > 500
    assert not any(parse_numbers(answer, 1) for answer in answers)
