"""The whole comparison: what is computed, what is refused, what comes back from disk."""

import dataclasses
import json

import numpy as np
import pytest
from scipy import sparse

from saelab.analysis.compare import CodeMatrix, Side, compare, load_comparison, save_comparison
from saelab.core.errors import ActivationError, ConfigError, CorruptError, FormatError, OutputExistsError, StoreError
from saelab.sae.folder import load_sae
from tests.analysis.compare.planted import codes, sparse_codes, unit

ORDER = np.random.default_rng(9).permutation(24)


@pytest.fixture(scope="module")
def sides():
    """A, and B: A in another order, its last feature dead."""
    matrix = sparse_codes(3000, 24).tolil()
    matrix[:, 23] = 0
    decoder = unit(24, 64, np.random.default_rng(0)).astype(np.float32)
    a = Side("a<1>", decoder, CodeMatrix(matrix), "model site")
    return a, Side("b", decoder[ORDER], CodeMatrix(sparse.csc_matrix(matrix)[:, ORDER]), "model site")


@pytest.fixture(scope="module")
def found(sides):
    return compare(*sides, text="planted", targets=6)


def test_permuted_copy(found):
    data = found.to_dict()
    assert data["decoders"]["mean_matched"] == pytest.approx(1)
    assert data["activations"]["mean_matched"] == pytest.approx(1)
    assert data["activations"]["matched"] == data["decoders"]["matched"] == 23
    assert data["activation_baseline"]["mean_best_a_to_b"] < 0.1 < data["decoder_baseline"]["mean_best_a_to_b"] < 0.5
    assert data["pairs"] == pytest.approx({"either": 1, "jaccard": 1, "cosine": 1})
    assert data["b_from_a"]["needed"]["1"] == data["a_from_b"]["needed"]["1"] == 1.0
    assert data["clusters"]["pair"] == {"clusters": 23, "features_a": 23, "features_b": 23}
    assert data["splitting"]["split"] == data["splitting"]["novel"] == 0
    assert (data["a"]["dead"], data["b"]["dead"]) == (1, 1)
    frame = found.to_frame()
    live = np.arange(24) != 23
    np.testing.assert_array_equal(ORDER[frame["activation_match"][live]], np.arange(24)[live])
    assert frame["activation_match"][23] == frame["decoder_best"][23] == -1
    np.testing.assert_array_equal(found.to_frame("b")["activation_match"][ORDER != 23], ORDER[ORDER != 23])
    with pytest.raises(ConfigError, match="'a' or 'b'"):
        found.to_frame("c")


def test_same_seed_same_result(sides, found):
    assert json.dumps(compare(*sides, text="planted", targets=6).to_dict()) == json.dumps(found.to_dict())


def test_save_and_load(found, tmp_path):
    folder = save_comparison(found, tmp_path / "c")
    again = load_comparison(folder)
    np.testing.assert_equal(again.to_dict(), found.to_dict())
    for side in ("a", "b"):
        assert again.to_frame(side).equals(found.to_frame(side))
    assert len(again.clusters) == len(found.clusters)
    page = (folder / "report.html").read_text()
    assert "a&lt;1&gt;" in page
    assert "a<1>" not in page
    assert "cdn.plot.ly" not in page.split("</style>")[1][:2000]
    for title in ("Matching", "One-to-many", "Many-to-many", "Novel features"):
        assert title in page
    with pytest.raises(OutputExistsError):
        save_comparison(found, folder)
    with pytest.raises(FormatError, match="expected sae"):
        load_sae(folder)
    data = (folder / "arrays.npz").read_bytes()
    (folder / "arrays.npz").write_bytes(data[:-20])
    with pytest.raises(CorruptError, match=r"arrays\.npz is missing or not what was written"):
        load_comparison(folder)


def test_figures_draw_what_was_found(found):
    from saelab.analysis.compare.figures import figures

    drawn = figures(found)
    assert set(drawn) == {"matching", "cosine_and_correlation", "one_to_many", "clusters", "novel"}
    curves = drawn["matching"][1]
    assert curves.loc[curves["curve"] == "correlation, one-to-one", "similarity"].tolist() == pytest.approx([1] * 23)
    assert drawn["clusters"][1].set_index("kind").loc["pair", "clusters"] == 23
    assert found.plot().data


def test_parts_that_cannot_be_compared_are_said(sides):
    a, b = sides
    elsewhere = dataclasses.replace(b, space="other model")
    only_codes = compare(a, elsewhere, targets=0)
    assert only_codes.decoders is None
    assert only_codes.splitting is None
    assert only_codes.b_from_a is None
    assert "cosine" not in only_codes.pairs
    assert "different spaces (model site and other model)" in only_codes.skipped[0]
    only_decoders = compare(dataclasses.replace(a, codes=None), dataclasses.replace(b, codes=None))
    assert only_decoders.activations is None
    assert only_decoders.n_tokens == 0
    assert only_decoders.decoders.summary()["matched"] == 24
    assert set(only_decoders.figures()) == {"matching", "novel"}
    with pytest.raises(ConfigError, match="nothing to compare between a<1> and b: decoders: they write into different"):
        compare(dataclasses.replace(a, codes=None), dataclasses.replace(elsewhere, codes=None))


def test_bad_sides_are_one_line(sides):
    a, b = sides
    broken = np.array(a.decoder)
    broken[0, 0] = np.nan
    cases = [
        (dataclasses.replace(a, decoder=broken), b, ActivationError, "decoder of a<1> holds NaN"),
        (dataclasses.replace(a, codes=codes(3000, 20)), b, StoreError, "over 20 features, its decoder has 24"),
        (dataclasses.replace(a, codes=codes(2000, 24)), b, StoreError, "2000 tokens, b on 3000"),
        (dataclasses.replace(a, codes=CodeMatrix(sparse.csc_matrix((3000, 24)))), b, ActivationError, "ever fires"),
    ]
    for left, right, error, text in cases:
        with pytest.raises(error, match=text) as caught:
            compare(left, right)
        assert "\n" not in str(caught.value)
    with pytest.raises(StoreError, match="only 3000 tokens to compare on, at least 5000"):
        compare(a, b, least_tokens=5000)
