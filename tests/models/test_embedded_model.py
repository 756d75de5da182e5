"""The model that ships with saelab is real: small, loadable, and good at Python for its size."""

import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import torch

from saelab.core.artifacts import file_checksum, read_manifest
from saelab.core.assets import embedded_model_dir, resolve_config
from saelab.core.config import load_config
from saelab.models.bpe import END_OF_TEXT
from saelab.models.language import compression, induction
from saelab.models.pretrain import PretrainConfig
from saelab.models.probes import probe
from saelab.models.text import open_text
from saelab.models.tokens import TokenRows, TokensConfig

FILES, CHARACTERS = 12, 5000


@pytest.fixture(scope="module")
def folder() -> Path:
    return embedded_model_dir()


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def documents() -> list[str]:
    """The beginnings of some held-out files of the running Python."""
    source = [document for document in open_text("stdlib:heldout") if len(document) > CHARACTERS]
    return [document[:CHARACTERS] for document in source[:FILES]]


def test_the_folder_is_whole_and_small(folder: Path) -> None:
    manifest = read_manifest(folder, "model")
    for name, checksum in manifest["files"].items():
        assert file_checksum(folder / name) == checksum, name
    assert sum(path.stat().st_size for path in folder.rglob("*")) <= 8_000_000
    training = json.loads((folder / "training.json").read_text())
    config = load_config(PretrainConfig, resolve_config("configs/pretrain-pylm.yaml"))
    assert PretrainConfig(**training["config"]) == config


def test_it_is_a_gpt2_loaded_in_float32_with_its_own_tokenizer(model: Any, tokenizer: Any) -> None:
    assert model.config.model_type == "gpt2"
    assert model.dtype == torch.float32
    assert (model.config.n_layer, model.config.n_positions) == (4, 256)
    assert len(tokenizer) == model.config.vocab_size == 4096
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == model.config.bos_token_id == 0
    text = "def f(self):\n\t\treturn 'é日🙂'  \n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_it_predicts_heldout_files_far_better_than_xz(model: Any, tokenizer: Any, documents: list[str]) -> None:
    measured = compression(model, tokenizer, documents, context=256)
    data = "".join(documents).encode()
    assert measured.utf8_bytes == len(data)
    assert measured.bits_per_byte < 1.5
    assert measured.bits_per_byte < 0.75 * 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)


def test_it_repeats_what_it_has_seen(model: Any, tokenizer: Any, documents: list[str]) -> None:
    uniform = induction(model, torch.arange(1, 4096), bos=0, sequences=16)
    assert uniform.score > 2
    usual = induction(model, torch.tensor(tokenizer("".join(documents))["input_ids"]), bos=0, sequences=16)
    assert usual.score > 3.5
    assert usual.accuracy > 0.15


def test_it_closes_brackets_indents_and_knows_self(model: Any, tokenizer: Any, documents: list[str]) -> None:
    found = probe(model, tokenizer, documents, context=256)
    assert found.bracket.places > 100
    assert found.bracket.accuracy > 0.95 > found.bracket.chance
    assert found.indent.accuracy > 0.8 > found.indent.chance
    assert found.self_.accuracy > 0.9
    assert found.next_token.accuracy > 0.4


def test_rows_for_it_begin_with_its_bos(tokenizer: Any) -> None:
    rows = TokenRows(tokenizer, open_text("stdlib:heldout"), TokensConfig(max_rows=4), n_ctx=256)
    (batch,) = rows.batches(4)
    assert batch.tokens.shape == (4, 256)
    assert (batch.tokens[:, 0] == 0).all()
    assert not batch.keep[:, 0].any()
    assert tokenizer.decode(batch.tokens[0, 1:]) in END_OF_TEXT.join(open_text("stdlib:heldout"))
