"""Every mistake of a user is one line that names what was given and what to do, and the right exit code."""

import errno
import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from saelab.core.artifacts import write_manifest
from tests.made import SITE, saelab


@pytest.fixture
def refused(capsys):
    """Run a command that must fail with one line matching all given parts."""

    def check(*args, code=1, says=()):
        capsys.readouterr()
        assert saelab(*args) == code
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if line.startswith("saelab: ")]
        assert len(lines) == 1, captured.err
        assert "Traceback" not in captured.err
        for part in says:
            assert part in lines[0]
        return lines[0]

    return check


def train(folder, *extra, out="new"):
    return (
        "train",
        "configs/demo-topk.yaml",
        "--store",
        folder / "store",
        "--site",
        SITE,
        *extra,
        "--out",
        folder / out,
    )


def test_usage(refused, tmp_path):
    refused("tran", code=2, says=["no such command 'tran'; did you mean train"])
    refused("train", "--sae.kk", 3, "--out", tmp_path, code=2, says=["unknown option '--sae.kk'", "--sae.k"])
    refused("train", code=2, says=["--out"])


def test_config(refused, made, tmp_path):
    (tmp_path / "typo.yaml").write_text(f"store: {made / 'store'}\nsae: {{d_sae: 256, kk: 8}}\n")
    refused(
        "train", tmp_path / "typo.yaml", "--out", tmp_path / "o", says=["unknown key 'sae.kk'", "did you mean sae.k"]
    )
    (tmp_path / "top.yaml").write_text("stor: x\nsae: {d_sae: 256}\n")
    refused("train", tmp_path / "top.yaml", "--out", tmp_path / "o", says=["unknown key 'stor'", "store"])
    (tmp_path / "type.yaml").write_text(f"store: {made / 'store'}\nsae: {{d_sae: many}}\n")
    refused("train", tmp_path / "type.yaml", "--out", tmp_path / "o", says=["sae.d_sae", "integer", "'many'"])
    refused("train", tmp_path / "no.yaml", "--out", tmp_path / "o", says=["config file not found", "no.yaml"])
    refused(*train(made, "--sae.k", 300, "--sae.d_sae", 256), says=["k = 300 is more than d_sae = 256"])
    refused(*train(made, "--sae.architecture", "topkk"), says=["topkk", "topk"])
    refused(*train(made, "--sae.d_in", 7), says=["sae.d_in is 7", "192 wide"])
    refused(*train(made, "--grid", "{sae.kk: [1, 2]}"), says=["grid: unknown key 'sae.kk'", "sae.k"])
    assert not (made / "new").exists()


def test_names(refused, made, tmp_path):
    out = ("--out", tmp_path / "o")
    refused(
        "harvest",
        "embedded",
        "--sites",
        "blocks.1.hook_resid_pst",
        *out,
        says=["hook_resid_pst", "blocks.1.hook_resid_post"],
    )
    refused("harvest", "no/such-model", "--sites", SITE, *out, says=["no/such-model"])
    refused("sites", tmp_path / "nowhere", says=["nowhere"])
    refused(
        "train",
        "demo-topk.yaml",
        "--store",
        made / "store",
        "--site",
        "blocks.3.hook_mlp_out",
        *out,
        says=["no site", SITE],
    )
    refused("train", "demo-topk.yaml", "--store", tmp_path / "none", *out, says=["none", "does not exist"])
    refused("eval", made / "store", says=["activation-store", "expected sae"])
    refused("show", tmp_path, says=["is not a saelab folder"])
    refused("show", made / "features", "--feature", 999, says=["feature 999 does not exist"])


def test_text(refused, tmp_path):
    def harvest(text, *extra):
        return ("harvest", "embedded", "--sites", SITE, "--text", text, *extra, "--out", tmp_path / "o", "--force")

    (tmp_path / "empty.txt").touch()
    refused(*harvest(tmp_path / "empty.txt"), says=["empty.txt"])
    (tmp_path / "short.txt").write_text("import os\n")
    refused(*harvest(tmp_path / "short.txt"), says=["short.txt", "tokens"])
    refused(*harvest(tmp_path / "missing.txt"), says=["missing.txt"])
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    refused(*harvest(tmp_path / "a.jsonl"), says=["text", "body"])


def test_other_model(refused, made, tmp_path, tiny_copy):
    refused(*train(made, "--model", tiny_copy), says=["store"])
    refused(
        "eval",
        made / "train" / "sae",
        "--model",
        tiny_copy,
        "--text",
        made / "code.txt",
        says=["fingerprint", "--other_model"],
    )
    out = ("--text", made / "code.txt", "--tokens.context", 64, "--sites", SITE, "--out", tmp_path / "o")
    assert saelab("harvest", "embedded", *out) == 0
    refused("harvest", tiny_copy, *out, "--resume", says=["model"])


@pytest.fixture
def tiny_copy(tmp_path):
    """The embedded model with one weight changed: same shapes, another model."""
    from saelab.core.assets import embedded_model_dir

    folder = tmp_path / "other"
    shutil.copytree(embedded_model_dir(), folder)
    weights = load_file(folder / "model.safetensors")
    name = next(iter(sorted(weights)))
    weights[name] = weights[name] + 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_nan_activations_name_their_rows(refused, made, tmp_path):
    from saelab.core.assets import embedded_model_dir

    folder = tmp_path / "broken"
    shutil.copytree(embedded_model_dir(), folder)
    weights = load_file(folder / "model.safetensors")
    weights["transformer.wpe.weight"][5] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(
        "harvest", folder, "--text", made / "code.txt", "--tokens.context", 64, "--sites", SITE,
        "--out", tmp_path / "o", says=[SITE, "NaN", "rows 0, 1, 2", "position"],
    )  # fmt: skip


def test_tokenizer_missing(refused, made, tmp_path):
    from saelab.core.assets import embedded_model_dir

    folder = tmp_path / "mute"
    shutil.copytree(embedded_model_dir(), folder, ignore=shutil.ignore_patterns("tokenizer*"))
    refused(
        "harvest", folder, "--sites", SITE, "--text", made / "code.txt", "--out", tmp_path / "o", says=["tokenizer"]
    )


def test_pickles_are_refused(refused, made, tmp_path):
    from saelab.core.assets import embedded_model_dir

    folder = tmp_path / "pickled"
    shutil.copytree(embedded_model_dir(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({"x": torch.zeros(1)}, folder / "pytorch_model.bin")
    refused("harvest", folder, "--sites", SITE, "--text", made / "code.txt", "--out", tmp_path / "o", says=["pickle"])
    sae = tmp_path / "sae"
    shutil.copytree(made / "train" / "sae", sae)
    (sae / "weights.safetensors").write_bytes(pickle.dumps({"W_enc": 1}))
    refused("eval", sae, says=["pickle", "expected safetensors"])


def test_corrupt_files_are_named(refused, made, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(made / "store", store)
    shard = next(p for p in sorted(store.rglob("*.safetensors")))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(data)
    refused("verify", store, says=[shard.name])
    refused(*train(made, "--store", store, "--training.tokens", 2000, "--training.batch_size", 512), says=[shard.name])
    shard.write_bytes(data[:-100])
    refused("verify", store, says=[shard.name])
    sae = tmp_path / "sae"
    shutil.copytree(made / "train" / "sae", sae)
    weights = sae / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8] + b"\0" * 8)
    refused("eval", sae, says=["weights.safetensors"])
    features = tmp_path / "features"
    shutil.copytree(made / "features", features)
    victim = features / "by_token" / "values.npy"
    victim.write_bytes(victim.read_bytes()[:-3])
    refused("show", features, "--feature", 1, says=["values.npy"])


def test_output(refused, made, tmp_path, monkeypatch):
    text = ("--text", made / "code.txt", "--tokens.context", 64, "--sites", SITE)
    refused("harvest", "embedded", *text, "--out", made / "store", says=["not empty", "--force"])
    refused(*train(made, out="train"), says=["not empty", "--force"])
    refused("build", made / "train" / "sae", "--out", made / "features", says=["not empty", "--force"])
    with monkeypatch.context() as patch:  # the tests may run as root, whom no mode bits stop
        patch.setattr("pathlib.Path.touch", lambda self, *a, **k: os.open("/proc/1/nope", os.O_CREAT | os.O_WRONLY))
        refused("harvest", "embedded", *text, "--out", tmp_path / "locked", says=["cannot write", "locked"])
    (tmp_path / "file").touch()
    refused("harvest", "embedded", *text, "--out", tmp_path / "file", says=["is a file"])
    refused("harvest", "embedded", *text, "--harvest.max_tokens", 10**13, "--out", tmp_path / "o", says=["TiB", "free"])

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    refused("harvest", "embedded", *text, "--out", tmp_path / "full", says=["no space left on the disk"])


@pytest.mark.parametrize("command", ["eval", "full", "compare", "find", "sparsify", "lazy", "pretrain"])
def test_a_mistake_with_force_costs_no_old_result(refused, made, tmp_path, command):
    sae, gone = made / "train" / "sae", tmp_path / "gone"
    line = {
        "eval": ("eval", sae, "--text", gone),
        "full": ("eval", sae, "--full", "--text", gone),
        "compare": ("compare", sae, gone),
        "find": ("circuits", "find", "--task", gone),
        "sparsify": ("sparsify", "embedded", "--calibration", gone),
        "lazy": ("lazy-neurons", "embedded", "--text", gone),
        "pretrain": ("pretrain", "configs/pretrain-pylm.yaml", "--train", gone),
    }[command]
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    write_manifest(old, "evaluation", {})
    for out in (old, new):
        refused(*line, "--out", out, "--force", says=["gone"])
    assert (old / "manifest.json").is_file()
    assert not new.exists()


def test_debug_shows_the_traceback(made):
    from saelab.cli.main import _run
    from saelab.core.errors import SaelabError

    with pytest.raises(SaelabError):
        _run(["--debug", "show", str(made / "nowhere")])


def test_json_output_is_one_object(made, capsys):
    capsys.readouterr()
    assert saelab("show", made / "train" / "sae", "--json") == 0
    assert json.loads(capsys.readouterr().out)["config"]["k"] == 8
    assert saelab("eval", made / "train" / "sae", "--text", made / "code.txt", "--max_tokens", 1000, "--json") == 0
    assert 0 < json.loads(capsys.readouterr().out)["fvu"] < 1
