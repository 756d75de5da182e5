"""One HTML file: planted numbers, hostile tokens inert, nothing fetched, nothing run."""

import re

import pytest

import saelab
from saelab.core.errors import ConfigError, OutputError, StoreError
from saelab.features.dashboard import Panes, dashboard, show
from saelab.features.explanations import Explanation, Explanations, Score
from saelab.features.notes import Notes
from saelab.features.store import open_features
from tests.app.planted import plant


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dashboard") / "features"
    plant(folder)
    return folder


def test_planted_numbers(planted):
    body = dashboard(open_features(planted), [1]).body
    facts = dict(re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd>", body))
    assert facts["density"] == f"{10 / 110:.3%}"
    assert (facts["tokens"], facts["max"], facts["mean"], facts["rows"], facts["entropy"]) == (
        "10", "10", "5.5", "10", "0",
    )  # fmt: skip
    top = body[: body.index("<details>")]
    peaks = re.findall(r'<div class="n">([\d.]+)<small>(\d+):(\d+)</small>', top)
    assert [int(value) for value, *_ in peaks] == [10, 9, 8, 7, 6, 5, 4, 3, 2, 1]
    parts = re.findall(r"</b>: (\d+) activations, ([\d.]+)%", body)
    assert sum(int(count) for count, _ in parts) == 10
    assert sum(float(share) for _, share in parts) == pytest.approx(100)
    bars = [int(tip) for tip in re.findall(r'data-tip="[^"]* to [^"]*&#10;(\d+) tokens"', body)]
    assert len(bars) == 50
    assert sum(bars) == 10


def test_document_needs_nothing_and_runs_nothing(planted, tmp_path):
    store = open_features(planted)
    notes = Notes(store)
    notes.save(2, label="<img src=x onerror=alert(1)>", note="</div><script>", star=True)
    try:
        text = dashboard(store, [1, 2, 0]).save(tmp_path / "a.html").read_text(encoding="utf-8")
    finally:
        notes.save(2, label="", note="", star=False)
    assert "default-src 'none'" in text
    assert "<script" not in text
    assert "\u202e" not in text
    assert "<img" not in text
    assert not re.search(r"(?:src|href)=\"(?!#)", text)
    assert "url(" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "&lt;img src=x onerror=alert(1)&gt;" in text
    assert "Dead on this text" in text
    assert text.index('id="feature-1"') < text.index('id="feature-2"') < text.index('id="feature-0"')


def test_explanations_and_scores_are_shown(planted):
    store = open_features(planted)
    said = Explanations(store)
    said.add(
        [Explanation(1, "token-set", "the token <seven>")],
        [Score(1, "detection", 0.75, 0.5, 0.9, 40, author="token-set")],
    )
    try:
        body = dashboard(store, [1]).body
    finally:
        said.path.unlink()
    assert "the token &lt;seven&gt;" in body
    assert "detection 0.750 [0.500, 0.900], n = 40" in body


def test_show_is_the_same_and_knows_the_store_opened_last(planted):
    store = open_features(planted)
    assert saelab.show(1)._repr_html_() == dashboard(store, [1]).body
    assert show([1, 2], planted).title == dashboard(store, [1, 2]).title
    assert show(1, store, Panes(contexts=3, intervals=0)).body.count('<div class="n">') == 3


def test_what_is_wrong_is_one_line(planted, tmp_path, monkeypatch):
    store = open_features(planted)
    with pytest.raises(StoreError, match=r"feature 4 does not exist; .* holds features 0 to 3"):
        dashboard(store, [4])
    with pytest.raises(ConfigError, match="no feature was given"):
        dashboard(store, [])
    with pytest.raises(OutputError, match="cannot write"):
        dashboard(store, [1]).save(tmp_path / "none" / "a.html")
    monkeypatch.setattr("saelab.features.store._last", [])
    with pytest.raises(ConfigError, match="no feature store is open"):
        show(1)
