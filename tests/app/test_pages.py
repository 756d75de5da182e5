"""Every page on the small store: what it shows, what it does when data is missing or broken."""

import csv
import io
import json
import shutil

import numpy as np
import pytest

from saelab.core.artifacts import write_json
from saelab.features.notes import Notes
from saelab.features.store import open_features
from tests.app.conftest import check, html_of, text_of

PAGES = ("overview", "features", "feature", "prompt", "steer", "train")


@pytest.mark.parametrize("page", PAGES)
def test_page_opens(made, open_app, page):
    app = open_app(made, page=page)
    assert app.title[0].value.startswith({"feature": "Feature "}.get(page, page.capitalize()))
    assert not app.error


def test_overview_counts_what_the_store_holds(made, open_app):
    said = text_of(open_app(made))
    store = open_features(made / "features")
    dead = int((np.asarray(store.column("density")) == 0).sum())
    assert f"{store.n_features:,} features; {dead:,} never fire" in said
    assert "saelab eval" in said  # no evaluation was made, so the command that makes one


def test_features_search_filter_sort(made, open_app):
    store = open_features(made / "features")
    density = np.asarray(store.column("density"))
    app = open_app(made, page="features")
    shown = app.dataframe[0].value
    assert shown["feature"].tolist() == np.argsort(-density, kind="stable")[:50].tolist()
    app.selectbox(key="order").set_value(False).run()
    app.multiselect(key="filtered").set_value(["max"]).run()
    app.number_input(key="low_max").set_value(1.0).run()
    check(app)
    wanted = np.flatnonzero(np.asarray(store.column("max")) >= 1.0)
    shown = app.dataframe[0].value
    assert shown["feature"].tolist() == wanted[np.argsort(density[wanted], kind="stable")][:50].tolist()
    app.text_input(key="search").set_value("17").run()
    assert app.dataframe[0].value["feature"].tolist() == [17] if 17 in wanted else app.info
    app.text_input(key="search").set_value("no such token").run()
    assert "No feature is like that" in text_of(check(app))


def test_features_pages_do_not_overlap(made, open_app):
    app = open_app(made, page="features")
    first = app.dataframe[0].value["feature"].tolist()
    app.number_input(key="page_number").set_value(2).run()
    second = app.dataframe[0].value["feature"].tolist()
    assert len(first) == len(second) == 50
    assert not set(first) & set(second)


def test_feature_by_link_and_on(made, open_app):
    app = open_app(made, page="feature", query={"feature": "17"})
    assert app.title[0].value == "Feature 17"
    app.button(key="on").click().run()
    assert app.title[0].value == "Feature 18"
    assert "18" in app.query_params["feature"]
    app.button(key="back").click().run()
    app.number_input(key="number").set_value(200).run()
    assert check(app).title[0].value == "Feature 200"


def test_feature_of_a_wrong_link_says_so(made, open_app):
    app = open_app(made, page="feature", query={"feature": "99999"})
    assert "There is no feature 99999; this SAE has features 0 to 255" in text_of(app)


def test_next_follows_the_selection(made, open_app):
    app = open_app(made, page="features")
    order = app.dataframe[0].value["feature"].tolist()
    app.switch_page("views/feature.py")
    app.query_params["feature"] = str(order[3])
    app.run()
    app.button(key="on").click().run()
    assert check(app).title[0].value == f"Feature {order[4]}"


def test_notes_are_saved_beside_the_store_and_shown_again(made, open_app, tmp_path):
    shutil.copytree(made / "features", tmp_path / "features")
    app = open_app(tmp_path / "features", page="feature", query={"feature": "3"}, pane="Notes")
    app.text_input(key="label_3").set_value("returns <b>self</b>")
    app.text_area(key="note_3").set_value("seen twice")
    next(b for b in app.button if b.label == "Save").click()
    check(app.run())
    app.button(key="star").click().run()
    saved = json.loads((tmp_path / "features.notes.json").read_text())
    ((sae, notes),) = saved["saes"].items()
    assert sae == open_features(tmp_path / "features").manifest["sae_fingerprint"]
    assert notes["3"]["label"] == "returns <b>self</b>"
    assert notes["3"]["star"] is True
    again = open_app(tmp_path / "features", page="feature", query={"feature": "3"}, pane="Notes")
    assert again.text_input(key="label_3").value == "returns <b>self</b>"
    assert "returns <b>self</b>" in text_of(again)
    assert again.button(key="star").label == "★"
    table = open_app(tmp_path / "features", page="features")
    table.toggle(key="starred").set_value(True).run()
    assert table.dataframe[0].value["feature"].tolist() == [3]
    assert table.dataframe[0].value["label"].tolist() == ["returns <b>self</b>"]


def test_two_sessions_keep_apart(made, open_app):
    one = open_app(made, page="feature", query={"feature": "5"})
    two = open_app(made, page="feature", query={"feature": "9"})
    two.button(key="on").click().run()
    one.run()
    assert one.title[0].value == "Feature 5"
    assert two.title[0].value == "Feature 10"
    assert one.session_state["feature"] == 5


def test_prompt_shows_features_and_their_effect(made, open_app):
    app = open_app(made, page="prompt")
    assert "loaded on the first use" in text_of(app)
    app.text_area(key="prompt_text").set_value("def f(self): <script>alert(1)</script>")
    app.button[0].click().run()
    check(app)
    frame = app.dataframe[0].value
    assert frame["value"].is_monotonic_decreasing
    assert not frame["feature"].duplicated().any()
    assert (frame["surprise"] >= 0).all()
    assert "<script>" not in html_of(app)
    assert "&lt;" in html_of(app)
    app.toggle(key="with_effect").set_value(True).run()
    assert check(app).dataframe[0].value["effect"].head(20).notna().all()
    app.segmented_control(key="measure").set_value("surprise").run()
    assert check(app).dataframe[0].value["surprise"].is_monotonic_decreasing
    app.segmented_control(key="measure").set_value("effect").run()
    assert check(app).dataframe[0].value["effect"].dropna().is_monotonic_decreasing


def test_empty_prompt_is_one_line(made, open_app):
    app = open_app(made, page="prompt")
    app.text_area(key="prompt_text").set_value("")
    app.button[0].click().run()
    assert "the prompt is empty; type some text" in text_of(check(app))


def test_steering_with_strength_0_changes_nothing(made, open_app):
    app = open_app(made, page="steer")
    app.number_input(key="edit_1_strength").set_value(0.0)
    app.slider(key="new_tokens").set_value(6)
    app.button(key="write").click().run()
    assert "Both texts are the same." in text_of(check(app))
    changes = [float(value) for value in app.table[0].value["change"]]
    assert changes[:3] == [0.0, 0.0, 0.0]
    assert changes[3] < 1e-4


def test_steering_hard_changes_the_text(made, open_app):
    app = open_app(made, page="steer")
    app.number_input(key="edit_1_strength").set_value(300.0)
    app.slider(key="new_tokens").set_value(6)
    app.button(key="write").click().run()
    assert "Marked: from where the two texts part." in text_of(check(app))


def test_train_shows_state_and_command(made, open_app):
    app = open_app(made, page="train")
    assert app.dataframe[0].value["run"].tolist() == ["train/sae"]
    assert "finished" in app.dataframe[0].value["status"][0]
    assert app.code[0].value.startswith("saelab train ")
    assert "config.yaml" in app.code[0].value


def test_empty_folder_names_the_command(tmp_path, open_app):
    for page in ("overview", "features", "feature", "prompt", "steer", "train"):
        assert "saelab" in text_of(open_app(tmp_path, page=page)), page


def test_half_written_and_corrupt_stores_are_one_line(made, open_app, tmp_path):
    building = tmp_path / "building"
    building.mkdir()
    write_json(building / "progress.json", {"kind": "feature-store", "state": "building"})
    assert "still being built, or whose build was interrupted" in text_of(open_app(tmp_path))

    broken = tmp_path / "broken"
    shutil.copytree(made / "features", broken)
    values = broken / "by_feature" / "values.npy"
    values.write_bytes(values.read_bytes()[:-100])
    said = text_of(open_app(broken, page="features"))
    assert "values.npy has" in said
    assert "build the feature store again" in said

    (broken / "manifest.json").write_text('{"kind": "featu')
    assert "is not valid JSON" in text_of(open_app(broken))


def test_corrupt_notes_are_one_line(made, open_app, tmp_path):
    shutil.copytree(made / "features", tmp_path / "features")
    (tmp_path / "features.notes.json").write_text("{}")
    said = text_of(open_app(tmp_path / "features", page="feature", query={"feature": "3"}, pane="Notes"))
    assert "does not hold notes on features" in said


def test_sae_without_store_names_the_command(made, open_app):
    said = text_of(open_app(made / "train", page="features"))
    assert f"saelab build {made / 'train' / 'sae'}" in said


def test_exports_hold_every_column(made):
    from saelab.features.table import Query, choose, export, sortable

    store = open_features(made / "features")
    found = choose(store, Query(sort="max", descending=True), {})
    read = list(csv.DictReader(io.StringIO(b"".join(export(store, found, {}, "csv")).decode(), newline="")))
    lines = [json.loads(line) for line in b"".join(export(store, found, {}, "jsonl")).decode().splitlines()]
    assert [int(row["feature"]) for row in read] == [line["feature"] for line in lines] == found.tolist()
    for name in sortable(store):
        assert [line[name] for line in lines] == store.column(name)[found].tolist()
    assert Notes(store).all() == {}


def test_loss_effect_of_contexts_is_the_intervention(made, open_app):
    import torch

    from saelab.workflows.live import open_live

    store = open_features(made / "features")
    i = int(np.argmax(store.column("density")))
    live = open_live(made / "train" / "sae")
    contexts = store.top_contexts(i, 2, 6, 3)
    effects = live.context_effects(store, contexts)
    for context, effect in zip(contexts, effects, strict=True):
        row, start, _ = store.row_of(context.start + context.peak)
        assert row == context.row
        ids = torch.from_numpy(store.token_ids(start, context.start + len(context.token_ids)).astype(np.int64))[None]

        def without(x):
            code = live.sae.encode(x.reshape(-1, x.shape[-1])).to_dense()[:, i]
            code[0] = 0  # BOS is not encoded
            return x - (code[:, None] * live.sae.W_dec[i] / live.sae.input_scale).reshape(x.shape)

        with torch.no_grad():
            losses = [
                -live.model.logits(ids, replace=r)[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
                for r in ({}, {live.site: without})
            ]
        wanted = (losses[1] - losses[0])[max(context.start - start - 1, 0) :]
        np.testing.assert_allclose(effect[-len(wanted) :], wanted.numpy(), atol=2e-5)
        assert np.abs(np.nan_to_num(effect)).max() > 0
    app = open_app(made, page="feature", query={"feature": str(i)})
    app.toggle(key="context_effects").set_value(True).run()
    body = html_of(check(app))
    assert f"rise of the loss (nats) without feature {i}" in body
    assert "activation" in body
