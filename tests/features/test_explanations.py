"""Explanations and scores beside a store: kept, replaced, concurrent, killed, shown in the table."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from saelab.core.errors import CorruptError
from saelab.features.explanations import Explanation, Explanations, Score, attach_explanations, explanations_path
from saelab.features.notes import Note
from saelab.features.store import open_features
from saelab.features.table import Query, Range, choose, export, page, sortable
from tests.app.planted import plant


@pytest.fixture
def store(tmp_path):
    return plant(tmp_path / "features")


def score(feature, value, scorer="detection", **more):
    return Score(feature, scorer, value, 0.0, 1.0, 100, **{"author": "a", **more})


def test_what_is_added_is_there(store):
    book = Explanations(store)
    assert book.explanations() == []
    assert book.columns() == {}
    explanation = Explanation(1, "a", "seven", "llm", "m", "1", detail={"tokens": [7]})
    first = score(1, 0.9, failures=3, judge="j", settings="s", detail={"tpr": 1.0, "deciles": {"1": [2, 3]}})
    book.add([explanation], [first])
    assert Explanations(store).explanations() == [explanation]
    assert Explanations(store).scores() == [first]
    assert book.settings("", "a", "detection", [0, 1]) == {1: "s"}
    assert book.settings("", "b", "detection", [0, 1]) == {}


def test_newer_replaces_older_of_the_same_key_only(store):
    book = Explanations(store)
    book.add([Explanation(1, "a", "old"), Explanation(1, "b", "other")], [score(1, 0.1), score(1, 0.2, "fuzzing")])
    book.add([Explanation(1, "a", "new"), Explanation(1, "a", "control's", control="untrained")], [score(1, 0.3)])
    assert [e.text for e in book.explanations()] == ["new", "other"]
    assert [e.text for e in book.explanations(control="untrained")] == ["control's"]
    assert {(s.scorer, s.value) for s in book.scores()} == {("detection", 0.3), ("fuzzing", 0.2)}


def test_nan_is_kept(store):
    Explanations(store).add(scores=[score(1, float("nan"), detail={"x": float("nan")})])
    found = Explanations(store).scores()[0]
    assert np.isnan(found.value)
    assert found.detail == {"x": None}


def test_the_store_stays_valid_and_unchanged(store):
    before = {p: p.read_bytes() for p in store.path.rglob("*") if p.is_file()}
    Explanations(store).add([Explanation(1, "a", "x")])
    assert {p: p.read_bytes() for p in store.path.rglob("*") if p.is_file()} == before
    open_features(store.path).verify()


def test_another_sae_in_its_place_does_not_get_them(store):
    Explanations(store).add([Explanation(1, "a", "x")])
    store.manifest["sae_fingerprint"] = "other"
    assert Explanations(store).explanations() == []


def test_several_threads_lose_nothing(store):
    def write(number):
        for k in range(20):
            Explanations(store).add([Explanation(1, f"{number}-{k}", "x")], [score(1, 0.5, author=f"{number}-{k}")])

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(Explanations(store).explanations()) == len(Explanations(store).scores()) == 80


def test_killed_while_writing_leaves_whole_batches(store):
    script = (
        "import sys\n"
        "from saelab.features.store import open_features\n"
        "from saelab.features.explanations import Explanation, Explanations\n"
        "book = Explanations(open_features(sys.argv[1]))\n"
        "n = 0\n"
        "while True:\n"
        "    book.add([Explanation(i, f'{n}', 'x' * 500) for i in range(50)])\n"
        "    n += 1\n"
        "    print(n, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(store.path)], stdout=subprocess.PIPE, text=True)
    said = 0
    while said < 3:
        said = int(process.stdout.readline())
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    said = max([said, *map(int, process.stdout.read().split())])
    process.stdout.close()
    counts = {}
    for explanation in Explanations(store).explanations():
        counts[explanation.author] = counts.get(explanation.author, 0) + 1
    assert set(counts.values()) == {50}
    assert len(counts) >= said


def test_a_broken_file_is_one_line(store):
    explanations_path(store.path).write_text("this is no database at all" * 100)
    with pytest.raises(CorruptError, match="mend it or move it away"):
        Explanations(store).explanations()


def test_table_sorts_filters_searches_and_exports_by_scores(store):
    Explanations(store).add(
        [Explanation(1, "a", "Lucky seven"), Explanation(2, "a", "anything")],
        [score(1, 0.9), score(2, 0.6), score(2, float("nan"), "simulation")],
    )
    assert "detection" not in sortable(store)
    attach_explanations(store)
    assert "detection" in sortable(store)
    assert choose(store, Query(sort="detection", descending=True), {}).tolist()[:2] == [1, 2]
    assert choose(store, Query(sort="detection"), {}).tolist()[:2] == [2, 1]
    assert choose(store, Query(ranges=(Range("detection", low=0.7),)), {}).tolist() == [1]
    assert choose(store, Query(text="lucky"), {}).tolist() == [1]
    frame = page(store, np.array([1, 3]), ["detection"], {1: Note(label="mine")})
    assert frame["explanation"].tolist() == ["Lucky seven", ""]
    assert frame["detection"].tolist()[0] == 0.9
    rows = [json.loads(line) for line in b"".join(export(store, np.arange(4), {}, "jsonl")).splitlines()]
    assert [row["detection"] for row in rows] == [None, 0.9, 0.6, None]
    assert rows[1]["explanation"] == "Lucky seven"
    assert len(store.summary()) == 4


def test_attaching_again_sees_what_is_new(store):
    attach_explanations(store)
    assert store.attached == {}
    Explanations(store).add([Explanation(1, "a", "x")], [score(1, 0.9)])
    attach_explanations(store)
    assert store.attached["detection"][1] == 0.9
    before = store.attached
    attach_explanations(store)
    assert store.attached is before  # nothing new: nothing read


def test_columns_of_a_second_author_say_whose(store):
    book = Explanations(store)
    book.add([Explanation(1, "a", "x"), Explanation(2, "a", "x"), Explanation(1, "b", "y")])
    book.add(scores=[score(1, 0.9), score(1, 0.4, author="b"), score(1, 0.7, "intruder", author="")])
    assert list(book.columns()) == ["detection", "detection (b)", "intruder"]
    assert book.texts() == {1: "x", 2: "x"}


def test_a_token_set_gives_way_to_a_sentence(store):
    book = Explanations(store)
    sets = [Explanation(i, "token-set", "tokens", "token-set") for i in (1, 2, 3)]
    book.add(sets, [score(1, 0.5, author="token-set")])
    book.add([Explanation(1, "llm:m:v1", "a sentence", "llm")], [score(1, 0.9, author="llm:m:v1")])
    assert book.texts() == {1: "a sentence", 2: "tokens", 3: "tokens"}
    assert book.columns()["detection"][1] == 0.9
    assert book.columns()["detection (token-set)"][1] == 0.5


def test_jsonl_holds_everything(store):
    book = Explanations(store)
    book.add([Explanation(1, "a", "x\ny")], [score(1, 0.9), score(1, 0.5, control="shuffled")])
    lines = [json.loads(line) for line in b"".join(book.jsonl()).splitlines()]
    assert [line["kind"] for line in lines] == ["explanation", "score", "score"]
    assert lines[0]["text"] == "x\ny"
    assert {line.get("control") for line in lines[1:]} == {"", "shuffled"}
