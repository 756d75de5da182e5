"""Pretraining learns, resumes bit for bit, and writes a folder that transformers loads."""

import json
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saelab.core.artifacts import read_json, read_manifest, read_safetensors
from saelab.core.assets import resolve_config
from saelab.core.config import load_config, parse_config
from saelab.core.errors import ConfigError, OutputExistsError, ResumeError, TextError
from saelab.models.bpe import END_OF_TEXT, load_bpe, train_bpe
from saelab.models.crops import CropSampler
from saelab.models.gpt2 import backward, build_gpt2
from saelab.models.language import compression, induction, windows
from saelab.models.pretrain import PretrainConfig, pretrain
from saelab.models.pretrain_config import lr_at

TINY: dict[str, Any] = {
    "vocab_size": 300, "n_layers": 1, "d_model": 16, "n_heads": 2, "context": 16, "steps": 40, "batch_rows": 4,
    "micro_rows": 2, "lr": 0.01, "warmup_steps": 4, "precision": "float32", "eval_every": 20, "checkpoint_every": 5,
}  # fmt: skip


def write_text(path: Path, seed: int = 0, lines: int = 400) -> str:
    """Lines of a made-up language with something to learn."""
    choose = random.Random(seed)
    things = ("cat", "dog", "number", "list", "window", "harbour", "question", "feather", "mountain", "lantern")
    path.write_text("".join(f"the {choose.choice(things)} is {choose.choice(things)};\n" for _ in range(lines)))
    return str(path)


@pytest.fixture
def tiny(tmp_path: Path) -> PretrainConfig:
    return PretrainConfig(
        train=write_text(tmp_path / "train.txt"), heldout=write_text(tmp_path / "heldout.txt", 1, 40), **TINY
    )


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_tiny_model_learns_and_its_folder_loads(tiny: PretrainConfig, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    before = torch.random.get_rng_state()
    result = pretrain(tiny, tmp_path / "out")
    assert torch.equal(before, torch.random.get_rng_state())
    curve = result.training["curve"]
    assert [point["step"] for point in curve] == [20, 40]
    assert curve[1]["heldout_loss"] < curve[0]["heldout_loss"] < math.log(300)
    assert result.heldout.bits_per_byte < 3
    assert result.heldout.utf8_bytes == len((tmp_path / "heldout.txt").read_bytes())
    assert result.training == read_json(tmp_path / "out" / "training.json")
    assert result.training["config"]["seed"] == 0
    assert set(read_manifest(tmp_path / "out", "model")["files"]) >= {"model.safetensors", "tokenizer.json"}
    assert not (tmp_path / "out" / "checkpoint.safetensors").exists()

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32
    assert read_safetensors(tmp_path / "out" / "model.safetensors")["transformer.wte.weight"].dtype == torch.float16
    assert tokenizer.bos_token == tokenizer.eos_token == END_OF_TEXT
    assert tokenizer.decode(tokenizer("the cat is é\n    日;")["input_ids"]) == "the cat is é\n    日;"
    again = compression(model, tokenizer, [(tmp_path / "heldout.txt").read_text()], context=16)
    assert again.nats == pytest.approx(result.heldout.nats, rel=1e-4)
    # A finished run that is resumed answers with what it has.
    assert pretrain(tiny, tmp_path / "out", resume=True) == result


KILLED = """
import os, signal, sys, torch
torch.set_num_threads(1)
from saelab.core.config import load_config
from saelab.core.progress import set_progress
from saelab.models import pretrain
set_progress(False)
step = pretrain._Run._step
def step_or_die(self, number):
    if number == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, number)
pretrain._Run._step = step_or_die
pretrain.pretrain(load_config(pretrain.PretrainConfig, sys.argv[1]), sys.argv[2], resume=True)
"""


def test_a_killed_run_resumes_bit_for_bit(tiny: PretrainConfig, tmp_path: Path) -> None:
    tiny = tiny.model_copy(update={"save_dtype": "float32"})
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    (tmp_path / "config.yaml").write_text(json.dumps(tiny.model_dump(mode="json")))
    pretrain(tiny, whole)
    # At step 23: after the look at step 20, between two checkpoints.
    arguments = [sys.executable, "-c", KILLED, str(tmp_path / "config.yaml"), str(killed), "23"]
    died = subprocess.run(arguments, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert (killed / "checkpoint.safetensors").exists()
    assert not (killed / "manifest.json").exists()
    resumed = pretrain(tiny, killed, resume=True)
    expected, found = (read_safetensors(folder / "model.safetensors") for folder in (whole, killed))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert resumed.training["curve"] == read_json(whole / "training.json")["curve"]
    assert resumed.training["seconds"] > 0


def test_bad_input_is_one_line(tiny: PretrainConfig, tmp_path: Path) -> None:
    for data, message in (
        ({"d_model": 10, "n_heads": 3}, "n_heads 3 does not divide d_model 10"),
        ({"stepz": 3}, "unknown key 'stepz'; did you mean steps"),
        ({"steps": 5, "warmup_steps": 9}, "warmup_steps 9 must be below steps 5"),
        ({"vocab_size": 100}, "'vocab_size': input should be greater than or equal to 257"),
    ):
        with pytest.raises(ConfigError) as error:
            parse_config(PretrainConfig, data)
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(TextError, match=r"gives only .* tokens of vocabulary, fewer than vocab_size 4000"):
        pretrain(tiny.model_copy(update={"vocab_size": 4000}), tmp_path / "a")
    with pytest.raises(TextError, match="too few for one batch of 999 rows of 16"):
        pretrain(tiny.model_copy(update={"batch_rows": 999}), tmp_path / "b")
    with pytest.raises(OutputExistsError):
        pretrain(tiny, tmp_path / "b")
    with pytest.raises(ResumeError, match="begun with another batch_rows"):
        pretrain(tiny, tmp_path / "b", resume=True)


def test_the_shipped_config_is_the_one_data_pylm_was_made_with() -> None:
    config = load_config(PretrainConfig, resolve_config("configs/pretrain-pylm.yaml"))
    assert (config.n_layers, config.context, config.vocab_size) == (4, 256, 4096)


def test_learning_rate_warms_up_and_falls() -> None:
    config = PretrainConfig(steps=100, warmup_steps=10, lr=1.0, lr_final=0.1)
    rates = [lr_at(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_gradient_in_pieces_is_the_gradient() -> None:
    config = PretrainConfig(**TINY)
    model = build_gpt2(config, 0)
    tokens = torch.randint(300, (4, 17), generator=torch.Generator().manual_seed(0))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    loss = torch.nn.functional.cross_entropy(model(input_ids=inputs).logits.flatten(0, 1), targets.flatten())
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    total = 0.0
    for part in (slice(0, 1), slice(1, 4)):
        total += backward(model, inputs[part], targets[part], tokens=targets.numel(), precision="float32", piece=7)
    assert total == pytest.approx(loss.item(), rel=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-7)


def test_crops_are_a_function_of_their_number_and_cover_an_epoch() -> None:
    documents = [np.arange(1 + 100 * i, 1 + 100 * i + 60, dtype=np.int32) for i in range(5)]
    crops = CropSampler(documents, separator=0, context=8, bos_share=0.0, seed=1)
    n = crops.rows_per_epoch
    inputs, targets = crops.rows(0, 3 * n)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    fresh = CropSampler(documents, separator=0, context=8, bos_share=0.0, seed=1)
    assert torch.equal(fresh.rows(n - 2, n)[0], inputs[n - 2 : 2 * n - 2])
    seen = targets[:n].flatten().tolist()
    words = [token for token in seen if token]
    assert len(words) == len(set(words))
    assert len(seen) >= 5 * 61 - 2 * 8
    assert not torch.equal(inputs[:n], inputs[n : 2 * n])
    started = CropSampler(documents, separator=0, context=8, bos_share=1.0, seed=1).rows(0, n)
    assert (started[0][:, 0] == 0).all()
    assert torch.equal(started[1], targets[:n])


def test_repeated_rows_are_text_over_and_over_and_leave_the_others_as_they_are() -> None:
    documents = [np.arange(1, 2000, dtype=np.int32)]
    settings: dict[str, Any] = {"separator": 0, "context": 16, "bos_share": 0.5, "seed": 3}
    plain = CropSampler(documents, **settings)
    some = CropSampler(documents, **settings, repeat_share=0.3, repeat_from=20)
    n = 2 * plain.rows_per_epoch
    (inputs, targets), (plain_inputs, plain_targets) = some.rows(0, n), plain.rows(0, n)
    assert torch.equal(inputs[:, 0], plain_inputs[:, 0])
    changed = (targets != plain_targets).any(1)
    assert not changed[:20].any()
    assert 0.15 < changed[20:].float().mean() < 0.45
    for row, original in zip(targets[changed], plain_targets[changed], strict=True):
        length = len(set(row.tolist()))
        assert 2 <= length <= 8
        assert torch.equal(row[:length], original[:length])
        assert torch.equal(row[length:], row[:-length])


def test_bpe_is_lossless_deterministic_and_has_one_special_token(tmp_path: Path) -> None:
    documents = ["def f(x):\n    return x\n" * 20, "class A:\n    pass\n" * 20]
    tokenizer = train_bpe(documents, 270, 32)
    assert len(tokenizer) == 270
    assert tokenizer.backend_tokenizer.to_str() == train_bpe(documents, 270, 32).backend_tokenizer.to_str()
    assert tokenizer.convert_tokens_to_ids(END_OF_TEXT) == 0
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "def é():\r\n\t 日本 \u200b🙂  "
    assert load_bpe(tmp_path, 32).decode(tokenizer(text)["input_ids"]) == text


def test_windows_predict_each_token_once_with_the_context_promised() -> None:
    for n in (1, 7, 8, 9, 16, 23, 100):
        predicted: list[int] = []
        for start, scored in windows(n, 8, 4):
            end = min(start + 8, n)
            predicted += range(end - scored, end)
            assert start == 0 or end - scored - start >= 4
        assert predicted == list(range(n))


class Uniform:
    """A model that knows nothing: every token is equally likely."""

    def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 270)})


def test_compression_of_a_model_that_knows_nothing_is_the_uniform_code() -> None:
    tokenizer = train_bpe(["def f(x):\n    return x\n" * 20], 270, 32)
    documents = ["def f(x): return é" * 5, "x"]
    measured = compression(Uniform(), tokenizer, documents, context=8, rows=3)
    n = sum(len(tokenizer(document)["input_ids"]) for document in documents)
    assert measured.tokens == n
    assert measured.utf8_bytes == sum(len(document.encode()) for document in documents)
    assert measured.loss == pytest.approx(math.log(270))
    assert measured.bits_per_byte == pytest.approx(n * math.log2(270) / measured.utf8_bytes)
    with pytest.raises(TextError, match="no token to predict"):
        compression(Uniform(), tokenizer, [], context=8)


class Copier:
    """A perfect induction head: predicts what followed the last earlier occurrence of the current token."""

    def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        logits = torch.zeros(*input_ids.shape, 1000)
        for row, ids in enumerate(input_ids.tolist()):
            for at, token in enumerate(ids):
                if token in ids[:at]:
                    earlier = max(i for i in range(at) if ids[i] == token)
                    logits[row, at, ids[earlier + 1]] = 20.0
        return type("Output", (), {"logits": logits})


def test_induction_score_of_a_perfect_copier_and_of_a_model_that_knows_nothing() -> None:
    perfect = induction(Copier(), torch.arange(1, 1000), 0, length=8, sequences=16)
    assert perfect.first == pytest.approx(math.log(1000), rel=0.2)
    assert perfect.accuracy > 0.9
    assert perfect.second < 1.0
    assert perfect.score == perfect.first - perfect.second
    nothing = induction(Uniform(), torch.arange(1, 270), 0, length=8, sequences=16)
    assert nothing.score == pytest.approx(0, abs=1e-5)
