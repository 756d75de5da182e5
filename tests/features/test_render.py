import dataclasses
import io

import numpy as np
import pytest
from rich.console import Console

from saelab.features.query import Context
from saelab.features.render import fit_context, render_context, visible


def context(tokens, values, peak):
    return Context(
        feature=0,
        tokens=tuple(tokens),
        token_ids=np.arange(len(tokens)),
        values=np.array(values, np.float32),
        peak=peak,
        row=0,
        position=peak,
        start=0,
        text="".join(tokens),
    )


def terminal(text):
    out = io.StringIO()
    Console(file=out, force_terminal=True, color_system="truecolor", width=200).print(text)
    return out.getvalue()


def test_markup_and_control_sequences_are_data():
    tokens = ["[bold red]", "\x1b[31m", "\n", "\t", "\r", "\u202e", "\x07", "[/]", "link=x"]
    text = render_context(context(tokens, [0.0] * 9, 0))
    assert text.plain == "[bold red]\\x1b[31m⏎→\\x0d\\u202e\\x07[/]link=x"
    printed = terminal(text)
    assert "\x1b[31m" not in printed
    assert "\r" not in printed
    assert "\x07" not in printed
    assert printed.count("\n") == 0 or printed.endswith("\n")


@pytest.mark.parametrize(
    ("token", "shown"),
    [("a b", "a b"), ("\u200b", "\\u200b"), ("\U000e0001", "\\U000e0001"), ("\x9b", "\\x9b"), ("é🙂", "é🙂")],
)
def test_visible(token, shown):
    assert visible(token) == shown


def test_background_grows_with_the_activation():
    text = render_context(context("abcd", [0.0, 1.0, 2.0, 4.0], 3))
    styles = {text.plain[span.start : span.end]: span.style for span in text.spans}
    assert "a" not in styles or styles["a"].bgcolor is None
    blue = [styles[c].bgcolor.triplet.blue for c in "bcd"]
    assert blue == sorted(blue, reverse=True)
    assert len(set(blue)) == 3
    assert styles["d"].underline
    assert not styles["c"].underline
    weak = render_context(context("abcd", [0.0, 1.0, 2.0, 4.0], 3), maximum=40.0)
    assert {s.end: s.style for s in weak.spans}[4].bgcolor.triplet.blue > blue[2]
    assert "48;2;214;120;0" in terminal(text)


def test_a_silent_context_has_no_background():
    text = render_context(context("ab", [0.0, 0.0], 1))
    assert all(span.style.bgcolor is None for span in text.spans)


@pytest.mark.parametrize("width", [1, 12, 30, 200])
def test_fit_context_keeps_the_peak_and_fits(width):
    tokens = tuple(f"tok{i} " for i in range(20))
    values = np.zeros(20, np.float32)
    values[15] = 2.0
    fitted = fit_context(dataclasses.replace(context(tokens, values, 15), start=100), width)
    assert fitted.tokens[fitted.peak] == "tok15 "
    assert fitted.value == 2.0
    assert fitted.start + fitted.peak == 115
    assert len(fitted.text) <= max(width, len("tok15 "))
    if width == 200:
        assert fitted.tokens == tokens
    if width == 30:
        assert 0 < fitted.peak < len(fitted.tokens) - 1
