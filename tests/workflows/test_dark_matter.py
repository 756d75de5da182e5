"""saelab dark-matter and lazy-neurons through the command line: folders, reports, and what they refuse."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

from saelab.analysis.dark_matter.result import load_dark_matter
from saelab.core.errors import ConfigError, CorruptError
from saelab.sae.folder import load_sae, save_sae
from saelab.workflows.show import describe
from tests.cli.test_bad_input import refused  # noqa: F401  a fixture
from tests.made import SITE, saelab

SMALL = ["--training.tokens", 4000, "--training.batch_size", 500, "--sae.k", 8]
PARTS = ["--downstream_tokens", 600, "--pursuit_tokens", 900, "--synthetic_tokens", 2000, "--max_tokens", 6000]
ERROR_SAES = ["--error_saes.tokens", 2000, "--error_saes.batch_size", 500, "--error_saes.expansion", 1]


@pytest.fixture(scope="module")
def ladder(made, tmp_path_factory):
    """A ladder of four widths, and an SAE at another site, on one store of two sites."""
    folder = tmp_path_factory.mktemp("ladder")
    text = ["--text", made / "code.txt", "--tokens.context", 64]
    sites = ["--sites", SITE, "--sites", "blocks.1.hook_mlp_out"]
    assert saelab("harvest", "embedded", *text, *sites, "--harvest.max_tokens", 6500, "--out", folder / "store") == 0
    config = ["train", "configs/ladder.yaml", "--store", folder / "store", *SMALL]
    grid = ["--grid", "{sae.d_sae: [32, 64, 96, 128]}", "--sae.d_sae", 64]
    assert saelab(*config, "--site", SITE, *grid, "--out", folder / "train") == 0
    other = ["--site", "blocks.1.hook_mlp_out", "--grid", "{}", "--sae.d_sae", 64]
    assert saelab(*config, *other, "--out", folder / "earlier") == 0
    return folder


@pytest.fixture(scope="module")
def result(ladder):
    """The whole report, every part small."""
    sae, earlier = ladder / "train" / "d_sae=64", ladder / "earlier"
    command = ["dark-matter", sae, "--store", ladder / "store", "--ladder", ladder / "train", "--earlier", earlier]
    assert saelab(*command, *PARTS, *ERROR_SAES, "--out", ladder / "dm") == 0
    return load_dark_matter(ladder / "dm")


def test_every_part_is_there_and_comes_back_from_disk(result, ladder):
    assert result.main == "d_sae=64"
    assert [d.d_sae for d in result.decompositions] == [32, 64, 96, 128]
    assert result.scaling.widths == [32, 64, 96, 128]
    assert len(result.token_scaling) == 6
    assert {p.method for p in result.pursuit} == {"encoder", "gradient", "orthogonal", "random"}
    assert [e.predictors for e in result.earlier] == ["own", "blocks.1.hook_mlp_out", "own+earlier"]
    assert [e.part for e in result.error_saes] == ["error", "linear", "nonlinear"]
    assert result.downstream.n_tokens >= 600
    assert result.introduced.cells
    assert len(result.findings()) == 9
    assert {"loss", "surprisal", "token", "l0", "x_norm"} <= set(result.decomposition.baselines)
    assert any("was trained on this store" in note for note in result.notes)
    n = len(result.tokens["context"])
    assert all(len(values) == n for values in result.tokens.values())
    d = result.decomposition
    test = result.tokens["fit"] == 0
    assert int(test.sum()) == d.n_test
    shares = result.tokens["d_sae=64/linear"][test].sum(), result.tokens["d_sae=64/nonlinear"][test].sum()
    assert d.linear_share == pytest.approx(shares[0] / sum(shares), rel=1e-4)
    about = describe(ladder / "dm")
    assert about["kind"] == "dark-matter"
    assert about["main"] == "d_sae=64"
    assert load_sae(ladder / "dm" / "error_saes" / "nonlinear").d_in == 192
    assert not list((ladder / "dm").glob("tmp*"))


def test_saved_map_splits_the_error_as_the_run_did(result, ladder):
    from saelab.activations.store import open_store

    store, sae = open_store(ladder / "store"), load_sae(ladder / "train" / "d_sae=64")
    keep = np.flatnonzero(result.tokens["position"] == 20)[:9]
    position = store.read_rows("position", torch.arange(store.n_rows))
    rows = (position >= 16).nonzero().squeeze(1)[:6000][keep]
    x = store.read_rows(SITE, rows)
    eta = x - sae(x) - result.maps["d_sae=64"](x)
    np.testing.assert_allclose(eta.square().sum(1), result.tokens["d_sae=64/nonlinear"][keep], rtol=1e-3)


def test_report_holds_every_figure_and_reaches_nothing(result, ladder):
    page = (ladder / "dm" / "report.html").read_text()
    for name in result.figures():
        assert f'id="f-{name}"' in page
    assert "Plotly.newPlot" in page
    assert "<th>with true introduced</th>" in page
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=", page)
    assert "@import" not in page.split("<script>")[0]
    assert "cdn.plot.ly" not in page.split("</script>")[-1]
    assert result.plot("norms").data
    with pytest.raises(ConfigError, match="no figure 'norm'; did you mean norms"):
        result.plot("norm")


def test_json_is_one_object_without_nan(ladder, capsys):
    capsys.readouterr()
    off = ["--downstream_tokens", 0, "--pursuit_tokens", 0, "--synthetic_tokens", 0, "--error_saes.tokens", 0]
    command = ["dark-matter", ladder / "train" / "d_sae=32", "--store", ladder / "store", "--model_parts", "false"]
    assert saelab(*command, *off, "--out", ladder / "small", "--json") == 0
    data = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert data["scaling"] is None
    assert 0 < data["decompositions"][0]["fvu"] < 1
    assert load_dark_matter(ladder / "small").downstream is None


def test_a_damaged_result_is_named(result, ladder, tmp_path):
    shutil.copytree(ladder / "dm", tmp_path / "dm")
    path = tmp_path / "dm" / "dark_matter.json"
    data = json.loads(path.read_text())
    del data["decompositions"][0]["r2"]
    path.write_text(json.dumps(data))
    with pytest.raises(CorruptError, match="does not hold a Decomposition"):
        load_dark_matter(tmp_path / "dm")


def test_bad_input_is_one_line(refused, ladder, made, tmp_path):  # noqa: F811
    def run(sae, store, *extra):
        return ("dark-matter", sae, "--store", store, *extra, "--force", "--out", tmp_path / "o")

    sae, store = ladder / "train" / "d_sae=64", ladder / "store"
    refused(*run(sae, store, "--max_tokens", 900), says=["too few for activations of width 192", "at least 768"])
    refused(*run(sae, store, "--skip_positions", 64), says=["0 tokens of 0 context"])
    refused(*run(ladder / "train", store), says=["holds 4 SAEs", "--ladder"])
    refused(*run(ladder / "earlier" / "sae", made / "store"), says=["blocks.1.hook_mlp_out"])
    refused(*run(sae, sae), says=["is a saelab sae folder, expected activation-store"])
    refused(*run(store, store), says=["expected an SAE or a training of several"])
    refused(*run(sae, store, "--earlier", sae), says=["expected an SAE of another site"])
    refused(*run(sae, store, "--ladder", ladder / "earlier"), says=["a ladder is of one site"])
    refused(*run(sae, store, "--text", made / "store" / "manifest.json"), says=["text is not the one"])
    other = load_sae(sae)
    save_sae(other, tmp_path / "foreign", {"provenance": {"site": SITE, "model": "x", "model_fingerprint": "y"}})
    refused(*run(tmp_path / "foreign", store), says=["was trained on x (y)", "give a store of the same model"])
    save_sae(other, tmp_path / "nowhere", {})
    refused(*run(tmp_path / "nowhere", store), says=["does not record its site", "--site"])
    with torch.no_grad():
        other.W_dec[3, 5] = torch.nan
    save_sae(other, tmp_path / "broken", {"provenance": {"site": SITE}})
    refused(*run(tmp_path / "broken", store), says=["NaN"])
    refused(*run(sae, store)[:-2], code=2, says=["--out"])
    refused("dark-matter", sae, "--stor", store, "--out", tmp_path / "o", code=2, says=["--stor", "--store"])


def test_lazy_neurons_command(made, ladder, tmp_path, capsys):
    sizes = ["--max_tokens", 500, "--curve_tokens", 200, "--top_k", "[0, 48]", "--tokens.context", 64]
    command = ["lazy-neurons", "embedded", "--text", made / "code.txt", *sizes, "--sae", ladder / "earlier" / "sae"]
    capsys.readouterr()
    assert saelab(*command, "--out", tmp_path / "lazy", "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert [layer["layer"] for layer in data["layers"]] == [0, 1, 2, 3]
    assert data["comparison"]["points"][0]["k"] == 8
    assert data["comparison"]["same_object"]
    assert describe(tmp_path / "lazy")["kind"] == "lazy-neurons"
    assert (tmp_path / "lazy" / "report.html").stat().st_size > 1e6
    assert saelab("lazy-neurons", ladder / "nothing", "--text", made / "code.txt") == 1
