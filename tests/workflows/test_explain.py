"""``saelab explain``: the whole way on a small store, without a judge and with one, killed and resumed."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest

from saelab.cli.main import _run
from saelab.features.explanations import Explanations
from saelab.features.store import open_features
from tests.analysis.autointerp.planted import DENSE, plant, texts_of, word_of
from tests.analysis.autointerp.server import serve

FAST = [
    *("--examples.length", "16", "--examples.explain", "20", "--examples.score", "20", "--examples.random", "10"),
    *("--examples.decoder", "5", "--examples.coactive", "5", "--examples.embedding", "5", "--batch", "3"),
]


def run(*args):
    return _run(["--quiet", *map(str, args)])


@pytest.fixture
def store(tmp_path):
    return plant(tmp_path / "features").path


def knows(question, messages, number):
    """Explain by the marked word, judge by the named one."""
    if question.startswith("ACTIVE"):
        words = re.findall(r"(?:<<|⟦)( w\d+)", question)
        return f"[EXPLANATION]: the word{max(set(words), key=words.count)}."
    if question.startswith("DESCRIPTION"):
        said = []
        fuzzing = "marked tokens" in messages[0]["content"]
        for text in texts_of(question):
            parts = re.findall(r"(?:<<|⟦)(.*?)(?:>>|⟧)", text, re.DOTALL) if fuzzing else [text]
            said.append(int(any(re.search(rf" w{word_of(question)}(?!\d)", part) for part in parts)))
        return json.dumps(said)
    return "1"


def judged(store, url, *more):
    scorers = "[detection, fuzzing, intruder, embedding]"
    judge = ["--judge.model", "scripted", "--judge.endpoint", url, "--judge.backoff", "0.01"]
    return run("explain", store, *FAST, *judge, "--explainers", "[llm]", "--scorers", scorers, *more)


def test_without_a_judge(store, capsys):
    assert run("explain", store, *FAST, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["features"] == DENSE
    assert result["left_out"] == 1  # the feature that fires everywhere
    rows = {(row["author"], row["scorer"], row["control"]): row for row in result["report"]["rows"]}
    assert rows["token-set", "detection", ""]["mean"] == 1.0
    assert rows["token-set", "fuzzing", ""]["mean"] == 1.0
    assert rows["token-set", "detection", "shuffled"]["mean"] < 0.7
    assert rows["token-set", "detection", "shuffled"]["difference"] > 0.3
    assert rows["token-set", "detection", ""]["features"] == DENSE
    assert any("model could not be loaded" in note for note in result["notes"])
    assert {"detection", "fuzzing", "embedding", "example_embedding", "surface"} <= set(result["counts"])
    assert run("explain", "report", store, "--json") == 0
    assert json.loads(capsys.readouterr().out) == result["report"]
    assert run("explain", "report", store) == 0
    shown = capsys.readouterr().out
    for word in ("SAE", "shuffled", "random-directions", "untrained", "neurons", "token-set"):
        assert word in shown
    assert run("explain", "report", store, "--markdown") == 0
    assert "| token-set | detection | 1.000 ± 0.000 |" in capsys.readouterr().out
    open_features(store).verify()


def test_with_a_judge_and_again_pays_nothing(store, capsys):
    with serve(knows) as (script, url):
        assert judged(store, url, "--json", "--judge.input_price", "1", "--judge.output_price", "2") == 0
        result = json.loads(capsys.readouterr().out)
        rows = {(row["author"], row["scorer"], row["control"]): row for row in result["report"]["rows"]}
        assert rows["llm:scripted:v1", "detection", ""]["mean"] == 1.0
        assert rows["llm:scripted:v1", "fuzzing", ""]["mean"] == 1.0
        assert rows["llm:scripted:v1", "detection", "shuffled"]["mean"] < 0.7
        asked = script.number
        assert result["usage"]["requests"] == asked
        assert result["usage"]["cost"] == pytest.approx(asked * (100 + 2 * 10) / 1e6)
        assert max(script.asked.values()) == 1
        assert judged(store, url, "--json") == 0
        assert script.number == asked
    texts = Explanations(open_features(store)).texts()
    assert texts == {i: f"the word w{10 + i}." for i in range(DENSE)}


def test_killed_and_resumed_pays_for_nothing_twice(store):
    """The judge stops answering in the middle; the run is killed with -9; the next one asks only what is unanswered."""
    hold, gate = threading.Event(), threading.Event()

    def holding(question, messages, number):
        if number > 25 and not gate.is_set():
            hold.set()
            gate.wait(60)
        return knows(question, messages, number)

    with serve(holding) as (script, url):
        command = [sys.executable, "-m", "saelab", "--quiet", "explain", str(store), *FAST]
        command += ["--judge.model", "scripted", "--judge.endpoint", url, "--judge.concurrency", "4"]
        command += ["--explainers", "[llm]", "--scorers", "[detection, fuzzing, intruder, embedding]"]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        assert hold.wait(120), "the run never asked so much"
        time.sleep(0.5)  # what was answered before is on the disk by now
        answered = Counter(script.answered)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert 0 < sum(answered.values()) <= 25
        open_features(store).verify()
        script.asked.clear()
        gate.set()
        assert judged(store, url) == 0
        assert not set(answered) & set(script.asked), "a reply that was paid for was asked for again"
        assert max(script.asked.values()) <= 2  # those that were under way when the run was killed
        resumed = [(s.feature, s.scorer, s.control, s.value) for s in Explanations(open_features(store)).scores()]
    fresh = plant(store.parent / "fresh")
    with serve(knows) as (_, url):
        assert judged(fresh.path, url) == 0
    assert resumed == [(s.feature, s.scorer, s.control, s.value) for s in Explanations(fresh).scores()]


def test_dry_run_sends_and_writes_nothing(store, capsys):
    before = sorted(store.parent.iterdir())
    with serve(knows) as (script, url):
        judge = ["--judge.model", "m", "--judge.endpoint", url, "--judge.input_price", "1", "--judge.output_price", "1"]
        assert run("explain", store, *FAST, *judge, "--dry-run") == 0
        shown = capsys.readouterr().out
        assert run("explain", store, *FAST, *judge, "--dry-run", "--json") == 0
        estimate = json.loads(capsys.readouterr().out)
    assert script.number == 0
    assert sorted(store.parent.iterdir()) == before
    assert "[system]" in shown
    assert "ACTIVE" in shown
    assert "$" in shown
    assert estimate["requests"] > 100
    assert estimate["cost"] > 0
    assert estimate["example"][0]["role"] == "system"


def test_mistakes_are_one_line(store, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for args, text in (
        (["explain", store, "--scorers", "[detektion]"], "did you mean detection"),
        (["explain", store, "--scorers", "[simulation]"], "needs a judge"),
        (["explain", store, "--explainers", "[llm]"], "needs a judge"),
        (["explain", store, "--explainers", "[lm]"], "did you mean llm"),
        (["explain", store, "--features", "[99]"], "feature 99 does not exist"),
        (["explain", store, "--dry-run"], "--judge.model"),
        (["explain", store, "--judge.model", "m"], "OPENAI_API_KEY"),
        (["explain", "report", store], "run saelab explain"),
        (["explain", store.parent / "nothing"], "does not exist"),
        (["explain", store, "--examples.sampler", "best"], "unknown sampler"),
    ):
        assert run(*args) == 1, args
        said = capsys.readouterr().err
        assert text in said
        assert said.count("\n") == 1


def test_export_import_compare(store, tmp_path, capsys):
    assert run("explain", store, *FAST, "--scorers", "[detection]") == 0
    assert run("explain", "export", store, "--out", tmp_path / "all.jsonl") == 0
    kinds = Counter(json.loads(line)["kind"] for line in (tmp_path / "all.jsonl").read_text().splitlines())
    assert kinds["explanation"] == DENSE
    assert kinds["score"] >= 2 * DENSE
    assert run("explain", "export", store, "--out", tmp_path / "all.jsonl") == 1
    for form in ("neuronpedia", "saedashboard"):
        assert run("explain", "export", store, "--format", form, "--out", tmp_path / form, "--model-id", "tiny") == 0
        assert run("explain", "import", tmp_path / form, "--out", tmp_path / f"{form}-back") == 0
        back = open_features(tmp_path / f"{form}-back")
        assert back.n_features == DENSE + 1
    said = Explanations(open_features(tmp_path / "neuronpedia-back")).texts()
    assert said == Explanations(open_features(store)).texts()
    capsys.readouterr()
    assert run("explain", "compare", store, store, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    for direction in found["directions"]:
        assert direction["mean_meaning"] == pytest.approx(1.0, abs=1e-5)
        assert direction["mean_correlation"] == pytest.approx(1.0)
        assert direction["agree_correlation"] == 1.0
        assert direction["random_meaning"] < 0.9
        assert direction["matched_correlation"] == pytest.approx(1.0)
        assert direction["random_correlation"] < 0.5


@pytest.mark.slow
def test_demo_features_with_model_and_all_controls(made, tmp_path, capsys):
    import shutil

    folder = tmp_path / "made"
    shutil.copytree(made, folder)
    small = ["--max_features", "12", "--control_features", "6", "--examples.length", "16", "--scoring.surprisal", "2"]
    args = ["explain", folder / "features", "--sae", folder / "train" / "sae", *small, "--scoring.texts", "1"]
    assert run(*args, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    rows = {(row["scorer"], row["control"]) for row in result["report"]["rows"]}
    for control in ("", "shuffled", "random-directions", "untrained", "neurons"):
        assert ("detection", control) in rows
        assert ("surprisal", control) in rows
    assert ("intervention", "") in rows
    assert result["notes"] == []
    assert run(*args, "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert again["report"] == result["report"]
    assert "surprisal" not in again["counts"]  # nothing was done again
    assert np.isfinite([row["mean"] for row in result["report"]["rows"]]).all()
