"""Pairs of activations: forks of a text, and files of paired texts, on the embedded model."""

import json

import pytest
import torch

from saelab.core.errors import MissingFileError, TextError
from saelab.models.subject import load_model
from saelab.sae.folder import load_meta, load_sae
from saelab.workflows import pairs as pairs_module
from saelab.workflows.pairs import PairsJob, collect_pairs
from tests.made import SITE, saelab


@pytest.fixture(scope="module")
def model():
    return load_model("embedded")


def job(made, **settings):
    return PairsJob(text=str(made / "code.txt"), tokens={"context": 32}, rows_per_batch=4, **settings)


def test_forks_differ_in_the_last_token_only(made, model):
    pairs = collect_pairs(job(made, max_pairs=10, per_row=2), model, SITE)
    again = collect_pairs(job(made, max_pairs=10, per_row=2), model, SITE)
    assert pairs.positive.shape == pairs.negative.shape == pairs.context.shape == (10, 192)
    assert torch.equal(pairs.negative, again.negative)
    assert not torch.equal(pairs.positive, collect_pairs(job(made, max_pairs=10), model, SITE, seed=1).positive)
    # the first pair, found again by hand
    batch = next(job(made).rows(model).batches(4))
    acts = model.read(batch.tokens, [SITE])[SITE]
    nearest = (acts[:, :-1] - pairs.context[0]).norm(dim=2)
    row, at = divmod(int(nearest.argmin()), nearest.shape[1])
    torch.testing.assert_close(acts[row, at], pairs.context[0])
    torch.testing.assert_close(acts[row, at + 1], pairs.positive[0])
    logits = model.logits(batch.tokens)[row, at].clone()
    logits[batch.tokens[row, at + 1]] = -torch.inf
    changed = batch.tokens[row : row + 1, : at + 2].clone()
    changed[0, -1] = logits.argmax()
    torch.testing.assert_close(model.read(changed, [SITE])[SITE][0, -1], pairs.negative[0], rtol=1e-3, atol=1e-3)


def test_files_of_pairs(made, model, tmp_path):
    lines = [{"good": f"return x{i}", "bad": f"return x{i} +", "root": "def f(x):\n    "} for i in range(5)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    columns = {"positive": "good", "negative": "bad"}
    pairs = collect_pairs(job(made, file=str(tmp_path / "p.jsonl"), columns=columns), model, SITE)
    assert pairs.context is None
    ids = model.tokenizer("return x3 +", add_special_tokens=False)["input_ids"]
    alone = model.read(torch.tensor([[model.tokenizer.bos_token_id, *ids]]), [SITE])[SITE][0, -1]
    torch.testing.assert_close(pairs.negative[3], alone, rtol=1e-3, atol=1e-3)
    rooted = collect_pairs(
        job(made, file=str(tmp_path / "p.jsonl"), columns={**columns, "context": "root"}), model, SITE
    )
    assert rooted.context is not None
    torch.testing.assert_close(rooted.context[0], rooted.context[4])
    assert not torch.allclose(rooted.positive, pairs.positive)
    with pytest.raises(TextError, match="has no column 'positive'"):
        collect_pairs(job(made, file=str(tmp_path / "p.jsonl")), model, SITE)
    with pytest.raises(MissingFileError):
        collect_pairs(job(made, file=str(tmp_path / "none.jsonl")), model, SITE)


def test_contrastive_sae_from_the_command_line(made, tmp_path, capsys):
    small = ["--pairs.text", made / "code.txt", "--pairs.max_pairs", 400, "--pairs.tokens.context", 32, "--site", SITE]
    small += ["--sae.d_sae", 256, "--training.tokens", 6000, "--training.batch_size", 200]
    assert saelab("train", "configs/contrastive.yaml", *small, "--out", tmp_path / "c") == 0
    sae = load_sae(tmp_path / "c" / "sae")
    assert (sae.config.architecture, sae.d_in) == ("contrastive", 2 * 192)
    meta = load_meta(tmp_path / "c" / "sae")
    assert meta["provenance"]["pairs"] == {
        "text": str(made / "code.txt"),
        "kind": "forks",
        "n": 400,
        "with_context": True,
    }
    assert {"contrast", "l1", "mse"} <= meta["metrics"].keys()
    assert f"next: saelab contrast {tmp_path / 'c' / 'sae'}" in capsys.readouterr().err.replace("\n", "")
    assert saelab("eval", tmp_path / "c" / "sae") == 1
    assert "saelab contrast measures it" in capsys.readouterr().err


def test_contrast_from_the_command_line(made, tmp_path, capsys):
    small = ["--pairs.text", made / "code.txt", "--pairs.max_pairs", 300, "--pairs.tokens.context", 32, "--site", SITE]
    small += ["--sae.d_sae", 128, "--training.tokens", 6000, "--training.batch_size", 200]
    assert saelab("train", "configs/contrastive.yaml", *small, "--out", tmp_path / "c") == 0
    capsys.readouterr()
    assert saelab("contrast", tmp_path / "c" / "sae", "--max_pairs", 100, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert [half["name"] for half in report["halves"]] == ["common", "differing", "all"]
    assert report["n_pairs"] == 100
    assert saelab("contrast", made / "train" / "sae") == 1
    assert "is no contrastive SAE" in capsys.readouterr().err


def test_room_for_pairs_grows_and_keeps_their_order(monkeypatch):
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(pairs_module, "FIRST_PAIRS", 3)
    parts = [(x[i : i + 5], x[i : i + 5] + 1, -x[i : i + 5]) for i in range(0, 20, 5)]
    monkeypatch.setattr(pairs_module, "_forks", lambda *_: iter(parts))
    for most, n in ((17, 17), (10**9, 20)):
        found = collect_pairs(PairsJob(max_pairs=most), None, SITE)
        assert torch.equal(found.positive, x[:n])
        assert torch.equal(found.negative, x[:n] + 1)
        assert torch.equal(found.context, -x[:n])
