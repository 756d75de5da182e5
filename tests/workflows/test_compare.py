"""``saelab compare`` as a user runs it, and everything that can be wrong with its input in one line each."""

import json
import shutil

import pytest
import torch

from saelab.analysis.compare import load_comparison
from saelab.analysis.compare.collect import require_same_tokenizer
from saelab.core.artifacts import read_json, write_json
from saelab.core.errors import StoreError
from saelab.sae import build_sae
from saelab.sae.folder import load_meta, load_sae, save_sae
from saelab.sae.topk import TopKConfig
from tests.made import SITE, saelab


@pytest.fixture(scope="module")
def two(made, tmp_path_factory):
    """The SAE of ``made``, the same with its features in reverse order, and a feature store of each."""
    folder = tmp_path_factory.mktemp("two")
    sae = load_sae(made / "train" / "sae")
    order = torch.arange(sae.d_sae - 1, -1, -1)
    tensors = sae.tensors()
    turned = {
        name: value[:, order] if name == "W_enc" else value[order] if value.shape[:1] == (sae.d_sae,) else value
        for name, value in tensors.items()
    }
    other = build_sae(sae.config, seed=None)
    other.load_tensors(turned)
    save_sae(other, folder / "turned", load_meta(made / "train" / "sae"))
    shutil.copytree(made / "train" / "sae", folder / "sae")
    text = ["--text", made / "code.txt"]
    assert saelab("build", folder / "turned", *text, "--max_tokens", 4000, "--out", folder / "features") == 0
    return folder


def check(capsys, *args):
    capsys.readouterr()
    assert saelab("compare", *args, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_store_text_and_feature_stores_agree(capsys, made, two):
    """However the codes come about, a permuted copy is found out."""
    small = ["--targets", 8, "--max_tokens", 3000]
    by_store = check(capsys, two / "sae", two / "turned", "--store", made / "store", *small, "--out", two / "c")
    by_text = check(capsys, two / "sae", two / "turned", "--text", made / "code.txt", *small)
    by_features = check(capsys, made / "features", two / "features", *small)
    for data in (by_store, by_text, by_features):
        live = 256 - data["a"]["dead"]
        assert data["activations"]["mean_matched"] == pytest.approx(1)
        assert data["activations"]["matched"] == data["decoders"]["matched"] == live > 100
        assert data["decoders"]["mean_matched"] == pytest.approx(1)
        assert data["pairs"]["cosine"] == pytest.approx(1, abs=1e-5)
        assert data["splitting"]["novel"] == 0
    assert by_store["n_tokens"] == 3000
    assert by_store["activations"]["matched"] == by_text["activations"]["matched"]
    saved = load_comparison(two / "c")
    frame = saved.to_frame()
    matched = frame[frame["activation_match"] >= 0]
    assert (matched["activation_match"] == 255 - matched.index).all()
    assert saelab("show", two / "c") == 0


def test_decoders_alone_need_no_text(capsys, two):
    data = check(capsys, two / "sae", two / "turned", "--activations", "false")
    assert data["activations"] is None
    assert data["n_tokens"] == 0
    assert data["decoders"]["mean_matched"] == pytest.approx(1)


def doctored(two, name, **provenance):
    """A copy of the SAE whose provenance says something else."""
    folder = two / name
    if not folder.exists():
        shutil.copytree(two / "sae", folder)
    meta = read_json(folder / "meta.json")
    meta["provenance"] |= provenance
    write_json(folder / "meta.json", meta)
    return folder


def test_bad_input_is_one_line(capsys, made, two):
    narrow = two / "narrow"
    save_sae(build_sae(TopKConfig(d_in=64, d_sae=32, k=4), seed=0), narrow, load_meta(two / "sae"))
    broken = two / "broken"
    sae = load_sae(two / "sae")
    sae.W_dec[0, 0] = float("nan")
    save_sae(sae, broken, load_meta(two / "sae"))
    (two / "other.txt").write_text("import os\nprint(os.name)\n" * 400)
    assert saelab("build", two / "sae", "--text", two / "other.txt", "--max_tokens", 2000, "--out", two / "f2") == 0
    store = ["--store", made / "store"]
    elsewhere = doctored(two, "elsewhere", site="blocks.3.hook_resid_post")
    foreign = doctored(two, "foreign", model_fingerprint="0" * 16, model="another")
    cases = [
        ([two / "sae"], "key 'b' is missing"),
        ([two / "sae", two / "nothing"], "nothing does not exist"),
        ([two / "sae", made / "features"], "give two SAE folders or two feature stores"),
        ([made / "features", two / "f2"], "do not hold the same tokens"),
        ([made / "features", two / "features", *store], "leave --store and --text out"),
        ([two / "sae", two / "turned", *store, "--text", "x"], "either --store or --text, not both"),
        ([two / "sae", two / "turned", *store, "--max_tokens", 300], "only 300 tokens to compare on, at least 1000"),
        ([two / "sae", narrow, *store], "reads activations of width 64"),
        ([two / "sae", narrow, "--activations", "false"], "192 and 64 wide"),
        ([two / "sae", broken, "--activations", "false"], "decoder of broken holds NaN"),
        ([two / "sae", elsewhere, *store], "does not hold site 'blocks.3.hook_resid_post'"),
        ([two / "sae", foreign, *store], "was trained on another"),
        ([two / "sae", foreign, "--activations", "false"], "different spaces"),
        ([two / "sae", two / "turned", "--threshold", 2], "'threshold'"),
    ]
    for args, text in cases:
        capsys.readouterr()
        assert saelab("compare", *args) == 1, args
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("saelab: ")]
        assert len(lines) == 1
        assert text in lines[0]


def test_different_tokenizers_are_refused():
    class Rows:
        def __init__(self, tokenizer_hash):
            self.tokenizer_hash = tokenizer_hash

    require_same_tokenizer(Rows("a"), Rows("a"))
    with pytest.raises(StoreError, match=r"different tokenizers \(a and b\)"):
        require_same_tokenizer(Rows("a"), Rows("b"))


def test_same_site_name_of_another_site_is_another_space(capsys, two):
    """Features at two sites of one model: activations are compared, directions are not."""
    data = check(
        capsys, two / "sae", doctored(two, "later", site="blocks.2.hook_resid_post"), "--max_tokens", 1500,
        "--targets", 0, "--text", "stdlib:heldout",
    )  # fmt: skip
    assert data["decoders"] is None
    assert f"{SITE} (" in data["skipped"][0]
    assert "blocks.2.hook_resid_post" in data["skipped"][0]
    assert data["activations"]["matched"] > 0
