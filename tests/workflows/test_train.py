"""Training from a YAML file: a grid on one pass, live data, resume after kill -9 through the command line."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from saelab.core.artifacts import file_checksum
from saelab.core.errors import ConfigError
from saelab.features.store import open_features
from saelab.features.weights import unembedding
from saelab.models.subject import load_model
from saelab.sae.folder import load_meta, load_sae
from saelab.workflows.train import TrainJob, run_train
from tests.made import SITE, saelab

SMALL = {"d_sae": 128, "k": 8, "architecture": "topk"}
TRAINING = {"tokens": 6000, "batch_size": 500, "checkpoint_every": 3, "log_every": 2}


def test_grid_trains_all_combinations_on_one_pass(made, tmp_path):
    job = TrainJob(
        store=str(made / "store"), sae=SMALL, training=TRAINING, grid={"sae.k": [4, 8], "training.lr": [1e-3, 3e-3]}
    )
    results = run_train(job, tmp_path / "grid")
    assert [r.name for r in results] == ["k=4_lr=0.001", "k=4_lr=0.003", "k=8_lr=0.001", "k=8_lr=0.003"]
    alone = run_train(
        TrainJob(store=str(made / "store"), sae=SMALL, training={**TRAINING, "lr": 3e-3}), tmp_path / "one"
    )
    assert file_checksum(results[3].path / "weights.safetensors") == file_checksum(
        alone[0].path / "weights.safetensors"
    )
    meta = load_meta(alone[0].path)["provenance"]
    assert meta["model"] == "embedded"
    assert meta["site"] == SITE


def test_live_training_needs_no_store(made, tmp_path):
    live = {"model": "embedded", "text": str(made / "code.txt"), "tokens": {"context": 64}, "buffer_rows": 2000}
    (result,) = run_train(TrainJob(live=live, site=SITE, sae=SMALL, training=TRAINING), tmp_path / "live")
    assert load_sae(result.path).d_in == 192
    assert result.metrics["fvu"] < 0.9


def test_transcoder_trains_between_sites_and_is_evaluated(made, tmp_path, capsys):
    text = ["--text", made / "code.txt", "--tokens.context", 64, "--sites", SITE, "--sites", "blocks.1.hook_mlp_out"]
    assert saelab("harvest", "embedded", *text, "--out", tmp_path / "two") == 0
    small = ["--training.tokens", 6000, "--training.batch_size", 500, "--sae.d_sae", 128]
    sites = ["--site", "blocks.1.hook_mlp_out", "--target_site", SITE]
    command = ["train", "configs/transcoder.yaml", "--store", tmp_path / "two", *sites, *small]
    assert saelab(*command, "--out", tmp_path / "t") == 0
    (folder,) = [p.parent for p in (tmp_path / "t").glob("*/weights.safetensors")]
    capsys.readouterr()
    assert saelab("eval", folder, "--text", made / "code.txt", "--max_tokens", 3000, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["site"], found["target_site"]) == ("blocks.1.hook_mlp_out", SITE)
    assert found["fvu"] < 0.9
    assert 0.1 < found["ce_recovered"] < 1
    text = ["--text", made / "code.txt", "--max_tokens", 1500]
    assert saelab("build", folder, *text, "--out", tmp_path / "features") == 0
    store = open_features(tmp_path / "features")
    direction = load_sae(folder).W_dec[3]  # what a feature writes for is read where it writes: the residual stream
    expected = unembedding(load_model("embedded"), SITE, 192)
    assert expected is not None
    assert int(store.column("logit_top_ids")[3][0]) == int((direction @ expected).argmax())


def test_exactly_one_source(made):
    for sae in (SMALL, {**SMALL, "d_in": 4}):
        with pytest.raises(ValueError, match="nothing given to train on; give exactly one of store"):
            TrainJob(sae=sae)
        with pytest.raises(ValueError, match="store and live given to train on"):
            TrainJob(sae=sae, store=str(made / "store"), live={"model": "embedded"})
    with pytest.raises(ConfigError, match=r"unknown key 'sae.kk'"):
        TrainJob(store=str(made / "store"), sae=SMALL, grid={"sae.kk": [1]}).runs()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kill_minus_9_and_resume_gives_the_same_bits(made, tmp_path):
    """The whole command, killed at random moments until it gets through, ends where an undisturbed one ends."""
    arguments = [
        "train", "configs/demo-topk.yaml", "--store", str(made / "store"), "--site", SITE, "--sae.d_sae", "128",
        "--sae.k", "8", "--training.tokens", "200000", "--training.batch_size", "100",
        "--training.checkpoint_every", "20",
    ]  # fmt: skip
    assert saelab(*arguments, "--out", tmp_path / "whole") == 0
    rng, kills = random.Random(0), 0
    command = [sys.executable, "-m", "saelab", "--quiet", *arguments, "--out", str(tmp_path / "killed"), "--resume"]
    checkpoint = tmp_path / "killed" / "checkpoint.safetensors"
    while kills < 3:
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and (not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before):
            time.sleep(0.01)
        time.sleep(0.3 * rng.random())
        assert process.poll() is None, "the run was over before it could be killed"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    for name in ("weights.safetensors", "config.json", "meta.json"):
        assert file_checksum(tmp_path / "whole/sae" / name) == file_checksum(tmp_path / "killed/sae" / name), name
    logs = [(tmp_path / run / "sae/training.jsonl").read_text().splitlines() for run in ("whole", "killed")]
    strip = [[{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in log] for log in logs]
    assert strip[0] == strip[1]


def evaluated(folder, made, capsys):
    capsys.readouterr()
    assert saelab("eval", folder, "--text", made / "code.txt", "--max_tokens", 4000, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_end_to_end_fine_tuning_recovers_more_of_the_loss(made, tmp_path, capsys):
    """On the embedded model: the SAE costs the model less than before, at the same number of features."""
    start = made / "train" / "sae"
    small = ["--training.tokens", 15000, "--training.batch_size", 512, "--training.lr", 3e-4]
    assert saelab("train", "configs/end-to-end.yaml", "--start", start, *small, "--out", tmp_path / "e2e") == 0
    before, after = evaluated(start, made, capsys), evaluated(tmp_path / "e2e" / "sae", made, capsys)
    assert after["ce_recovered"] > before["ce_recovered"] + 0.2 * (1 - before["ce_recovered"])
    assert after["kl_sae"] < 0.7 * before["kl_sae"]
    assert (after["l0"], after["site"]) == (before["l0"], SITE)
    provenance = load_meta(tmp_path / "e2e" / "sae")["provenance"]
    assert provenance["start"] == str(start)
    assert provenance["end_to_end"]["loss"] == "kl"
    assert provenance["model_fingerprint"] == load_meta(start)["provenance"]["model_fingerprint"]


def test_what_end_to_end_and_pairs_need(made, tmp_path, capsys):
    out = ["--out", tmp_path / "x"]
    assert saelab("train", "configs/end-to-end.yaml", *out) == 1
    assert "give start (an SAE" in capsys.readouterr().err
    assert saelab("train", "configs/end-to-end.yaml", "--store", made / "store", "--sae.d_sae", 64, *out) == 1
    assert "runs the model" in capsys.readouterr().err
    assert saelab("train", "configs/contrastive.yaml", "--store", made / "store", "--site", SITE, *out) == 1
    assert "exactly one" in capsys.readouterr().err
    command = ["train", "configs/relu.yaml", "--store", made / "store", "--sae.architecture", "contrastive"]
    assert saelab(*command, "--sae.sparsity", 1, "--site", SITE, *out) == 1
    assert "is trained on pairs" in capsys.readouterr().err
