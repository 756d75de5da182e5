"""What the browser finds and knows: stores, their SAEs, evaluations, neighbours, runs."""

import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from saelab.cli.main import _run
from saelab.core.artifacts import read_manifest, write_json, write_manifest
from saelab.core.errors import CorruptError, MissingFileError
from saelab.features.notes import Notes
from saelab.features.store import open_features
from saelab.sae import load_sae, save_sae
from saelab.workflows.browse import (
    card,
    distinct_contexts,
    open_place,
    survey,
)
from saelab.workflows.directions import decoder_plane, decoder_rows, nearest_features
from saelab.workflows.live import open_live
from saelab.workflows.runs import read_log, run_state


@pytest.mark.parametrize("below", [".", "features", "train"])
def test_survey_finds_the_sae_of_a_store(made, below):
    library = survey([made / below])
    (place,) = library.places
    assert place.sae == made / "train" / "sae"
    assert place.store == (None if below == "train" else made / "features")
    assert place.log == made / "train" / "sae" / "training.jsonl"
    assert not library.problems


def test_survey_goes_by_weights_not_by_names(made, tmp_path):
    """Of two SAEs of the same sizes, the store belongs to the one it was made with, wherever it lies."""
    shutil.copytree(made / "features", tmp_path / "features")
    other = load_sae(made / "train" / "sae")
    other.b_dec.add_(1)
    save_sae(other, tmp_path / "a" / "sae")
    shutil.copytree(made / "train" / "sae", tmp_path / "b" / "c" / "sae")
    library = survey([tmp_path])
    by_store = {place.store: place.sae for place in library.places}
    assert by_store == {tmp_path / "features": tmp_path / "b" / "c" / "sae", None: tmp_path / "a" / "sae"}
    assert len({place.key for place in library.places}) == 2


def test_an_evaluation_of_another_sae_of_the_same_size_is_not_shown(made, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(made, folder)
    store = open_features(folder / "features").manifest
    for name, fingerprint in (("own", store["sae_fingerprint"]), ("other", "00000000")):
        (folder / name).mkdir()
        about = {"d_sae": store["n_features"], "site": store["site"], "sae_fingerprint": fingerprint}
        write_manifest(folder / name, "evaluation", about)
    (place,) = (place for place in survey([folder]).places if place.store is not None)
    assert place.evaluation == folder / "own"


def test_survey_of_nothing(tmp_path):
    with pytest.raises(MissingFileError, match="does not exist; give the folder of a run"):
        survey([tmp_path / "nowhere"])
    assert survey([tmp_path]).places == ()


def test_command_refuses_what_it_cannot_show(tmp_path, capsys):
    assert _run(["app", str(tmp_path / "nowhere")]) == 1
    assert _run(["app", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 2
    assert "nothing to browse" in said
    assert _run(["app"]) == 2


def test_command_names_a_taken_port(made, tmp_path, capsys):
    import socket

    (tmp_path / "c").mkdir()
    write_manifest(tmp_path / "c", "circuit", {"content": "edges"})
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for folder in (made, tmp_path / "c"):  # a result alone is enough to look at
            assert _run(["app", str(folder), "--host", "127.0.0.1", "--port", str(port)]) == 1
            assert f"port {port} is taken" in capsys.readouterr().err


def test_settings_keep_everything_on_this_machine():
    from saelab.cli.app import settings

    chosen = settings(8501, "localhost")
    assert chosen["browser.gatherUsageStats"] is False
    assert chosen["server.address"] == "localhost"
    assert chosen["logger.hideWelcomeMessage"] is True  # it would look the outside address up


def test_card_says_what_it_is(made):
    (place,) = survey([made]).places
    about = card(place, open_features(place.store))
    assert about["architecture"] == "topk"
    assert about["site"] == "blocks.1.hook_resid_post"
    assert about["size"].endswith("256")


def test_decoder_is_that_of_the_sae(made):
    assert np.array_equal(decoder_rows(made / "train" / "sae"), load_sae(made / "train" / "sae").W_dec.numpy())


def test_corrupt_weights_are_one_line(made, tmp_path):
    shutil.copytree(made / "train" / "sae", tmp_path / "sae")
    (tmp_path / "sae" / "weights.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{nonsense")
    with pytest.raises(CorruptError, match="not a readable safetensors file"):
        decoder_rows(tmp_path / "sae")


def test_nearest_features_are_those_of_the_whole_matrix(made):
    (place,) = survey([made]).places
    opened = open_place(place)
    rows = decoder_rows(place.sae).astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    cosine = rows @ rows[7]
    cosine[7] = -2
    frame = nearest_features(opened, 7, 5)
    assert frame["feature"].tolist() == np.argsort(-cosine, kind="stable")[:5].tolist()
    np.testing.assert_allclose(frame["cosine"], np.sort(cosine)[::-1][:5], atol=1e-6)
    assert int(opened.store.column("nearest")[7]) == frame["feature"][0]


def test_plane_is_the_best_plane(made):
    rows = decoder_rows(made / "train" / "sae").astype(np.float64)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    singular = np.linalg.svd(unit - unit.mean(0), compute_uv=False)
    plane = decoder_plane(made / "train" / "sae")
    np.testing.assert_allclose(np.square(plane.points).sum(0), np.square(singular[:2]), rtol=1e-3)
    assert np.array_equal(plane.points, decoder_plane(made / "train" / "sae").points)


def test_distinct_contexts_leave_copies_out(made):
    store = open_features(made / "features")
    i = int(np.argmax(store.column("count")))
    kept, _ = distinct_contexts(store, i, 10, before=3, after=2, distinct_rows=False)
    texts = [(context.token_ids.tobytes(), context.peak) for context in kept]
    assert len(texts) == len(set(texts))
    values = [context.value for context in kept]
    assert values == sorted(values, reverse=True)


def test_live_agrees_with_the_store(made):
    """A row of the store's own text, read live, has the values that the store has."""
    (place,) = survey([made]).places
    store = open_features(place.store)
    live = open_live(place.sae)
    start, stop = 0, 64
    ids = store.token_ids(start, stop).astype(np.int64)
    text = store.vocabulary.text(ids[1:])
    reading = live.read(text)
    if reading.tokens.tolist() != ids.tolist():
        pytest.skip("the row begins inside a word; its text has other tokens")
    stored = store.activations(start, stop).to_dense()
    assert (reading.code.to_dense() - stored).abs().max() < 1e-3


def test_run_states(made, tmp_path):
    log = made / "train" / "sae" / "training.jsonl"
    frame = read_log(log)
    state = run_state(log, frame)
    assert (state.status, state.steps, state.total) == ("finished", 40, 40)
    assert state.command == f"saelab train {made / 'train' / 'config.yaml'} --out {made / 'train'}-again"

    half = tmp_path / "a folder" / "sae"
    half.mkdir(parents=True)
    (half / "training.jsonl").write_text(log.read_text() + '{"step": 41, "tok')
    shutil.copy(made / "train" / "config.yaml", half.parent)
    assert len(read_log(half / "training.jsonl")) == len(frame)
    assert run_state(half / "training.jsonl", frame).status == "running"
    os.utime(half / "training.jsonl", (time.time() - 3600,) * 2)
    (half.parent / "checkpoint.safetensors").touch()
    stopped = run_state(half / "training.jsonl", frame)
    assert stopped.status == "stopped"
    assert stopped.command.endswith(f"--out '{half.parent}' --resume")


def test_a_demo_run_is_made_again_by_the_demo(tmp_path):
    write_json(tmp_path / "manifest.json", {"kind": "run", "job": "demo", "config": {"seed": 3, "train_tokens": None}})
    (tmp_path / "train" / "sae").mkdir(parents=True)
    log = tmp_path / "train" / "sae" / "training.jsonl"
    log.write_text('{"step": 1}\n')
    write_json(log.parent / "manifest.json", {"kind": "sae"})
    assert run_state(log, read_log(log)).command == "saelab demo --out saelab-demo --seed 3"


def test_notes_of_another_sae_do_not_show(made, tmp_path):
    shutil.copytree(made / "features", tmp_path / "features")
    store = open_features(tmp_path / "features")
    Notes(store).save(3, label="mine", note="", star=False)
    assert Notes(store).of(3).label == "mine"
    manifest = read_manifest(tmp_path / "features")
    write_json(tmp_path / "features" / "manifest.json", manifest | {"sae_fingerprint": "other"})
    other = Notes(open_features(tmp_path / "features"))
    assert other.all() == {}
    other.save(3, label="theirs", note="", star=True)
    assert Notes(store).of(3).label == "mine"
    Notes(store).save(3, label=" ", note="", star=False)
    assert Notes(store).all() == {}
    assert other.of(3).label == "theirs"


def test_notes_saved_by_several_processes_are_all_kept(made, tmp_path):
    shutil.copytree(made / "features", tmp_path / "features")
    script = (
        "import sys; from saelab.features.store import open_features; from saelab.features.notes import Notes\n"
        "n = Notes(open_features(sys.argv[1])); a = int(sys.argv[2])\n"
        "for i in range(a, a + 20): n.save(i, label=f'f{i}', note='', star=False)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "features")]
    writers = [subprocess.Popen([*command, str(first)]) for first in (0, 100)]
    assert [writer.wait(120) for writer in writers] == [0, 0]
    notes = Notes(open_features(tmp_path / "features")).all()
    assert {i: note.label for i, note in notes.items()} == {i: f"f{i}" for i in (*range(20), *range(100, 120))}
    assert json.loads((tmp_path / "features.notes.json").read_text())["kind"] == "feature-notes"
