"""Pages about saved results: errors, comparisons, circuits, two prompts; broken folders are one line."""

import shutil

import numpy as np
import pytest

from saelab.analysis.compare import Side, compare, save_comparison
from saelab.analysis.dark_matter.result import load_dark_matter
from saelab.features.store import open_features
from saelab.workflows.browse import survey
from saelab.workflows.results import evaluation_frame, matched_frame, split_frame, worst_tokens
from tests.app.conftest import check, html_of, text_of
from tests.made import saelab


@pytest.fixture(scope="module")
def results(made, tmp_path_factory):
    """The small run with a dark-matter result, an evaluation and a comparison beside it."""
    folder = tmp_path_factory.mktemp("results")
    for name in ("train", "features"):
        shutil.copytree(made / name, folder / name)
    sae = folder / "train" / "sae"
    off = [f"--{key}={0}" for key in ("downstream_tokens", "pursuit_tokens", "synthetic_tokens", "error_saes.tokens")]
    small = ["--max_tokens", 6000, "--skip_positions", 4, "--model_parts", "false", *off]
    assert saelab("dark-matter", sae, "--store", made / "store", *small, "--out", folder / "dark") == 0
    text = ["--text", made / "code.txt", "--max_tokens", 1000]
    assert saelab("eval", sae, *text, "--out", folder / "evaluation") == 0
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(12, 8)).astype(np.float32)
    order = rng.permutation(12)
    found = compare(Side("results/features", rows), Side("elsewhere/sae", rows[order]), targets=0)
    save_comparison(found, folder / "comparison")
    return folder


def test_error_page_splits_the_error_of_a_text(results, open_app):
    app = open_app(results, page="error")
    result = load_dark_matter(results / "dark")
    values = {m.label: m.value for m in app.metric}
    assert values["FVU"] == f"{result.decomposition.fvu:.4f}"
    app.text_area(key="error_text").set_value("def f(self): <script>alert(1)</script>")
    next(b for b in app.button if b.label == "Read it").click().run()
    body = html_of(check(app))
    assert "<script" not in body
    assert "&lt;" in body
    assert "the whole error over the squared norm" in body
    app.segmented_control(key="error_part").set_value("linear").run()
    assert "its linear part over the squared norm" in html_of(check(app))


def test_error_page_finds_the_sae_of_a_relative_path(results, open_app, tmp_path):
    """What was written with a path as given from another folder still finds its SAE and the tokens' texts."""
    run = tmp_path / "elsewhere" / "run"
    for name in ("dark", "train", "features"):
        shutil.copytree(results / name, run / name)
    file = run / "dark" / "dark_matter.json"
    file.write_text(file.read_text().replace(str(results / "train"), "run/train"))
    app = open_app(run, page="error")
    assert all(token.startswith("“") for token in app.dataframe[0].value["token"])
    next(b for b in app.button if b.label == "Read it").click().run()
    assert "the whole error over the squared norm" in html_of(check(app))


def test_worst_tokens_are_the_worst(results):
    result = load_dark_matter(results / "dark")
    store = open_features(results / "features")
    frame = worst_tokens(result, result.main, store.vocabulary, n=5)
    ids, x = result.tokens["token_id"], result.tokens["x"]
    shares = {
        i: result.tokens[f"{result.main}/total"][ids == i].sum() / x[ids == i].sum()
        for i in np.unique(ids)
        if (ids == i).sum() >= 10
    }
    best = sorted(shares, key=lambda i: -shares[i])[:5]
    assert frame["token"].tolist() == [f"“{store.vocabulary.strings([int(i)])[0]}”".replace("\n", "⏎") for i in best]
    np.testing.assert_allclose(frame["error"], [shares[i] for i in best], rtol=1e-5)


def test_compare_page_matches_and_opens(results, open_app):
    app = open_app(results, page="compare")
    said = text_of(app)
    assert "A: results/features, 12 features. B: elsewhere/sae, 12 features." in said
    evaluations, _, matched = (frame.value for frame in list(app.dataframe)[:3])
    assert evaluations["name"].tolist() == [f"{results.name}/evaluation"]
    assert len(matched) == 12
    assert matched["cosine"].min() == pytest.approx(1)
    frame, problems = evaluation_frame(survey([results]).results["evaluation"])
    assert not problems
    assert frame["d_sae"].tolist() == [256]


def test_matched_pairs_are_the_planted_ones(results):
    from saelab.analysis.compare.folder import load_comparison

    comparison = load_comparison(results / "comparison")
    order = np.random.default_rng(0)
    order.normal(size=(12, 8))
    order = order.permutation(12)
    frame = matched_frame(comparison)
    assert (order[frame["b"]] == frame["a"]).all()
    assert list(split_frame(comparison).columns) == ["feature", "parts", "r2_single", "r2_group"]


def test_broken_results_are_one_line(results, open_app, tmp_path):
    for name in ("comparison", "dark", "evaluation", "train"):
        shutil.copytree(results / name, tmp_path / name)
    (tmp_path / "comparison" / "comparison.json").write_text("{")
    (tmp_path / "dark" / "dark_matter.json").write_text('{"main": 1}')
    (tmp_path / "evaluation" / "evaluation.json").write_text("[1, 2")
    circuit = tmp_path / "circuit"
    circuit.mkdir()
    (circuit / "manifest.json").write_text('{"kind": "circuit", "content": "edges"}')
    (circuit / "circuit.json").write_text('{"graph": 3}')
    said = text_of(open_app(tmp_path, page="compare"))
    assert "is missing or not what was written; compare again" in said
    assert "evaluation.json is not valid JSON" in said
    assert "does not have the fields of a dark-matter result" in text_of(open_app(tmp_path, page="error"))
    assert "is not a circuit that this version can read: it" in text_of(open_app(tmp_path, page="circuits"))


def test_pages_without_results_name_the_command(made, open_app):
    said = text_of(open_app(made, page="error"))
    assert f"saelab dark-matter {made / 'train' / 'sae'} --store {made / 'store'} --out" in said
    assert "saelab circuits" in text_of(open_app(made, page="circuits"))
    assert "saelab compare" in text_of(open_app(made, page="compare"))


def test_two_prompts_side_by_side(made, open_app):
    app = open_app(made, page="prompt")
    app.toggle(key="two").set_value(True).run()
    app.text_area(key="prompt_text").set_value("def f3(self, value):")
    app.text_area(key="second_text").set_value("<b>import os</b>")
    app.button[0].click().run()
    frame = check(app).dataframe[0].value
    assert frame["relative"].abs().is_monotonic_decreasing
    np.testing.assert_allclose(frame["difference"], frame["second"] - frame["first"], atol=1e-6)
    assert (frame[["first", "second"]].max(axis=1) > 0).all()
    assert "<b>import" not in html_of(app)
    app.text_area(key="second_text").set_value("def f3(self, value):")
    app.button[0].click().run()
    assert (check(app).dataframe[0].value["difference"] == 0).all()


def test_cosine_to_a_direction_is_a_column(made, open_app):
    app = open_app(made, page="features")
    app.text_input(key="direction").set_value("17").run()
    name = "cosine to feature 17"
    app.selectbox(key="sort").set_value(name).run()
    frame = check(app).dataframe[0].value
    assert frame["feature"][0] == 17
    assert frame[name][0] == pytest.approx(1, abs=1e-5)
    assert frame[name].is_monotonic_decreasing
    app.multiselect(key="filtered").set_value([name]).run()
    app.number_input(key=f"low_{name}").set_value(0.999).run()
    assert check(app).dataframe[0].value["feature"].tolist() == [17]
    app.text_input(key="direction").set_value("none such").run()
    assert "is not the number of a feature" in text_of(app)


def test_map_by_tsne_is_kept(made, open_app, tmp_path):
    for name in ("train", "features"):
        shutil.copytree(made / name, tmp_path / name)
    app = open_app(tmp_path)
    app.segmented_control(key="map_method").set_value("t-SNE").run()
    assert "laid out by t" in text_of(check(app))
    assert len(list(tmp_path.glob("features.map-*.npz"))) == 1
    app.selectbox(key="hue").set_value("token_entropy").run()
    check(app)
