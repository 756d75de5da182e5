"""Neuronpedia and SAEDashboard: what is written is what is read back; real files of theirs; broken ones in one line."""

import gzip
import json

import numpy as np
import pytest

from saelab.core.errors import FormatError, MissingFileError, SaelabError
from saelab.features.dashboard_import import import_dashboards, read_dashboards
from saelab.features.explanations import Explanation, Explanations
from saelab.features.neuronpedia import ExportSettings, export_dashboard, export_neuronpedia, shown_contexts
from tests.app.planted import plant

SETTINGS = ExportSettings("tiny", "0-res-mine", top=4, intervals=3, per_interval=2)
FEATURES = [1, 2]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    made = plant(tmp_path_factory.mktemp("exchange") / "features")
    Explanations(made).add(
        [Explanation(1, "me", 'the "seven" <token>\n', explainer="llm", model="m"), Explanation(2, "me", "everything")]
    )
    return made


def same_contexts(store, imported, feature):
    """Every exported context is a row of the imported store, token by token and value by value."""
    expected = {
        (tuple(shown.context.tokens), tuple(shown.context.values.tolist()))
        for shown in shown_contexts(store, feature, SETTINGS)
    }
    offsets = imported.array("tokens/row_offsets.npy")
    tokens, values = imported.feature(feature)
    dense = np.zeros(imported.n_tokens, np.float32)
    dense[tokens] = values
    found = set()
    for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        if dense[start:stop].any():
            found.add((tuple(imported.tokens(start, stop)), tuple(dense[start:stop].tolist())))
    assert found == expected


@pytest.mark.parametrize("form", ["neuronpedia", "saedashboard"])
def test_round_trip(store, tmp_path, form):
    folder = tmp_path / "out"
    folder.mkdir()
    if form == "neuronpedia":
        root = export_neuronpedia(store, folder, SETTINGS, FEATURES)
        assert root == folder / "tiny" / "0-res-mine"
        assert sorted(p.name for p in root.iterdir()) == [
            "activations", "explanations", "features",
            "model.jsonl", "release.jsonl", "source.jsonl", "sourceset.jsonl",
        ]  # fmt: skip
    else:
        export_dashboard(store, folder, SETTINGS, FEATURES)
    imported = import_dashboards(folder, tmp_path / "back")
    imported.verify()
    for feature in FEATURES:
        same_contexts(store, imported, feature)
        assert imported.column("density")[feature] == store.column("density")[feature]
        assert imported.column("max")[feature] == store.column("max")[feature]
        for name in ("top", "bottom"):
            assert np.array_equal(imported.column(f"logit_{name}")[feature], store.column(f"logit_{name}")[feature])
            words = store.vocabulary.strings(store.column(f"logit_{name}_ids")[feature])
            assert imported.vocabulary.strings(imported.column(f"logit_{name}_ids")[feature]) == words
    assert imported.manifest["model"] == "tiny"
    assert imported.manifest["site"] == "0-res-mine"
    if form == "neuronpedia":
        said = Explanations(imported).explanations()
        assert [(e.feature, e.author, e.text, e.explainer, e.model) for e in said] == [
            (1, "me", 'the "seven" <token>\n', "llm", "m"), (2, "me", "everything", "", ""),
        ]  # fmt: skip
    # and out again: the same contexts a second time
    (tmp_path / "again").mkdir()
    export_dashboard(imported, tmp_path / "again", SETTINGS, FEATURES)
    again = read_dashboards(tmp_path / "again")
    assert set(again.features) == set(FEATURES)


def test_fields_are_those_of_the_formats(store, tmp_path):
    export_dashboard(store, tmp_path, SETTINGS, [1])
    (one,) = json.loads((tmp_path / "batch-0.json").read_text())["features"]
    wanted = {
        "feature_index", "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1",
        "correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson",
        "correlated_features_indices", "correlated_features_l1", "correlated_features_pearson", "neg_str",
        "neg_values", "pos_str", "pos_values", "frac_nonzero", "freq_hist_data_bar_values",
        "freq_hist_data_bar_heights",
        "logits_hist_data_bar_heights", "logits_hist_data_bar_values", "n_prompts_total", "n_tokens_in_prompt",
        "dataset", "decoder_weights_dist", "vector", "activations",
    }  # fmt: skip
    assert set(one) == wanted
    first = one["activations"][0]
    assert (first["bin_min"], first["bin_contains"]) == (-1, -1)
    assert first["values"][first["qualifying_token_index"]] == max(first["values"]) == 10
    parts = {a["bin_min"]: a["bin_contains"] for a in one["activations"] if a["bin_min"] >= 0}
    assert sum(parts.values()) == pytest.approx(1.0)
    assert sum(one["freq_hist_data_bar_heights"]) == 10


def test_exports_are_the_same_bytes_every_time(store, tmp_path):
    paths = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        root = export_neuronpedia(store, tmp_path / name, SETTINGS, FEATURES)
        paths.append({p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()})
    assert paths[0] == paths[1]


def test_real_saedashboard_files(shared, tmp_path):
    source = shared / "explanations" / "saedashboard"
    imported = import_dashboards(source, tmp_path / "np")
    imported.verify()
    assert imported.n_features == 4
    data = [json.loads(p.read_text()) for p in sorted(source.glob("*.json"))]
    for one in (f for batch in data for f in batch["features"]):
        index = int(one["feature_index"])
        assert imported.column("density")[index] == pytest.approx(one["frac_nonzero"])
        assert imported.column("max")[index] == np.float32(max(max(a["values"]) for a in one["activations"]))
        if not imported.column("count")[index]:
            continue
        best = max(one["activations"], key=lambda a: max(a["values"]))
        context = imported.top_contexts(index, 1, before=1000, after=1000)[0]
        assert list(context.tokens) == best["tokens"]
        assert imported.vocabulary.strings(imported.column("logit_top_ids")[index]) == one["pos_str"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("batch-0.json", b"{"),
        ("batch-0.json", b'{"features": [{"feature_index": 1}]}'),
        ("batch-0.json", b'{"features": [{"feature_index": -1, "activations": []}]}'),
        ("batch-0.json", b'{"features": [{"feature_index": 99999999999, "activations": []}]}'),
        ("batch-0.json", b'{"features": [{"feature_index": 0, "activations": [{"tokens": ["a"], "values": []}]}]}'),
        ("batch-0.json", b'{"features": [{"feature_index": 0, "activations": [{"tokens": ["a"], "values": [NaN]}]}]}'),
        ("features/batch-0.jsonl.gz", b"no gzip"),
        ("features/batch-0.jsonl.gz", gzip.compress(b'{"index": "x"}\n', mtime=0)),
        ("strange/batch-0.jsonl.gz", gzip.compress(b"{}\n", mtime=0)),
        ("other.json", b"{}"),
    ],
)
def test_broken_files_are_one_line(tmp_path, name, content):
    path = tmp_path / "in" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(FormatError) as error:
        import_dashboards(tmp_path / "in", tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_missing_path(tmp_path):
    with pytest.raises(MissingFileError):
        read_dashboards(tmp_path / "nothing")
    assert issubclass(MissingFileError, SaelabError)
