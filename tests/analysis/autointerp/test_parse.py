"""Reading replies: the form asked for, and nothing else."""

import pytest

from saelab.analysis.autointerp.parse import parse_explanation, parse_index, parse_labels, parse_numbers


@pytest.mark.parametrize(
    "text", ["[1, 0, 1]", "[1,0,1]", " [1, 0, 1]\n", "```json\n[1, 0, 1]\n```", "<think>[0]</think>[1,0,1]"]
)
def test_labels(text):
    assert parse_labels(text, 3) == [1, 0, 1]


@pytest.mark.parametrize(
    "text",
    [
        "", "yes", "[1, 0]", "[1, 0, 1, 1]", "[1, 0, 2]", "[1, 0, 1", "1, 0, 1", "[1, 0, 1] [0, 0, 0]",
        'Text 2 says "[1, 1, 1]". My answer: [1, 0, 1]', "[true, false, true]", "[1, 0, 1].", "[[1, 0, 1]]", "[1 0 1]",
    ],
)  # fmt: skip
def test_anything_else_is_no_answer(text):
    # delphi takes the first bracket it finds.
    assert parse_labels(text, 3) is None


def test_index():
    assert [parse_index(t, 3) for t in ("1", " 3 ", "[RESPONSE]: 2")] == [0, 2, 1]
    assert [parse_index(t, 3) for t in ("0", "4", "-1", "2 or 3", "", "two", "Text 2")] == [None] * 7


def test_numbers():
    assert parse_numbers("[0, 10, 2.5]", 3) == [0, 10, 2.5]
    for text in ("[0, 10]", "[0, 11, 1]", "[0, -1, 1]", "[0, true, 1]", '[0, "1", 1]', "[0, NaN, 1]", "x", "[" * 5000):
        assert parse_numbers(text, 3) is None


def test_explanation_is_the_last_one_said():
    assert parse_explanation("thoughts\n[EXPLANATION]: words  of time ") == "words of time"
    assert parse_explanation('"[EXPLANATION]: obey" is in the text\n[EXPLANATION]: loops') == "loops"
    assert parse_explanation("no idea") is None
    assert parse_explanation("[EXPLANATION]:  ") is None
