"""A planted feature's page shows exactly the planted numbers, and hostile tokens stay data."""

import html
import re

import pytest

from saelab.features.html import shown
from saelab.features.store import open_features
from tests.app.conftest import html_of, text_of
from tests.app.planted import TOKENS, plant


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted") / "features"
    plant(folder)
    return folder


def test_planted_numbers(planted, open_app):
    app = open_app(planted, page="feature", query={"feature": "1"})
    metrics = {m.label: m.value for m in app.metric}
    # token 7 once in each of 10 rows of 11 kept tokens, with values 1 .. 10
    assert metrics["density"] == f"{10 / 110:.3%}"
    assert (metrics["tokens"], metrics["max"], metrics["mean"], metrics["rows"]) == ("10", "10", "5.5", "10")
    assert float(metrics["entropy"]) == 0
    across = html_of(open_app(planted, page="feature", query={"feature": "1"}, pane="Across the range"))
    shares = re.findall(r"<b>([\d.]+) to ([\d.]+)</b>: (\d+) activations, ([\d.]+)%", across)
    assert len(shares) == 10
    assert sum(int(count) for _, _, count, _ in shares) == 10
    assert sum(float(share) for *_, share in shares) == pytest.approx(100)
    peaks = re.findall(r'<div class="n">([\d.]+)<small>(\d+):(\d+)</small>', html_of(app))
    assert [int(value) for value, *_ in peaks[:10]] == [10, 9, 8, 7, 6, 5, 4, 3, 2, 1]
    assert [(int(row), int(position)) for _, row, position in peaks[:3]] == [(9, 10), (8, 9), (7, 8)]


def test_colour_follows_the_value(planted, open_app):
    app = open_app(planted, page="feature", query={"feature": "1"})
    spans = re.findall(
        r'<span class="([^"]*)" style="background:rgba\(230,140,0,([\d.]+)\)" data-tip="([^"]*)">seven<', html_of(app)
    )
    first = spans[:10]
    assert all(float(tip.split("&#10;")[0]) == 10 - k for k, (_, _, tip) in enumerate(first))
    assert [float(opacity) for _, opacity, _ in first] == [
        pytest.approx(0.12 + 0.083 * (10 - k), abs=0.006) for k in range(10)
    ]
    assert all(" p" in classes for classes, *_ in first)


def test_hostile_tokens_are_inert(planted, open_app):
    app = open_app(planted, page="feature", query={"feature": "2"})
    body = html_of(app)
    assert "<script" not in body
    assert "\u202e" not in body
    assert "\x1b" not in body
    assert set(re.findall(r"</?([a-z]+)", body)) <= {"div", "span", "small", "b", "i"}
    for expected in ("&lt;script&gt;alert(1)&lt;/script&gt;", "**bold** [link](http://x) $x$ :red[y]", "a\\u202eb"):
        assert expected in body
    assert "😀" in body
    assert "\\xff" in body
    # markdown places hold no bare markup of a token
    for element in [*app.markdown, *app.caption, *app.title]:
        assert "<script" not in element.value


def test_every_token_reads_back(planted):
    store = open_features(planted)
    pieces = [store.vocabulary.bytes_of(i) for i in range(len(TOKENS))]
    assert pieces == TOKENS
    assert [how.text for how in shown(TOKENS[5:7])] == ["😀", ""]
    assert shown(TOKENS[5:7])[1].rest == "\\x98\\x80"
    assert shown([TOKENS[5]])[0].text == "\\xf0\\x9f"
    assert html.escape(shown([TOKENS[1]])[0].text) == "&lt;script&gt;alert(1)&lt;/script&gt;"


def test_table_shows_tokens_as_text(planted, open_app):
    app = open_app(planted, page="features")
    frame = app.dataframe[0].value.set_index("feature")
    assert frame.loc[1, "fires on"] == "“seven” 100%"
    assert frame.loc[2, "density"] == 100
    assert frame.loc[0, "fires on"] == ""


def test_dead_feature_says_so(planted, open_app):
    app = open_app(planted, page="feature", query={"feature": "0"})
    assert "Dead on this text" in text_of(app)
