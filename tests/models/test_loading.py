import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from saelab.core.errors import FormatError, ModelError
from saelab.models.loading import fingerprint, quiet
from saelab.models.subject import load_model
from tests.models.tiny import VOCAB, tiny_gpt2, tokenizer_for


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gpt2(tmp_path_factory.mktemp("gpt2"))


def copy_of(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def test_loading_prints_nothing(gpt2: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_model(str(gpt2)).sites()
    assert capfd.readouterr() == ("", "")


def test_quiet_puts_everything_back() -> None:
    import logging

    from transformers.utils import logging as hf_logging

    before = (logging.root.manager.disable, hf_logging.get_verbosity(), sys.stdout)
    with pytest.raises(KeyError), quiet():
        raise KeyError
    assert (logging.root.manager.disable, hf_logging.get_verbosity(), sys.stdout) == before


def test_dtypes(gpt2: Path) -> None:
    tokens = torch.tensor([[1, 2, 3]])
    for name, dtype in [("float32", torch.float32), ("bfloat16", torch.bfloat16)]:
        model = load_model(str(gpt2), dtype=name)
        site = "blocks.1.hook_resid_post"
        assert model.dtype == model.read(tokens, site)[site].dtype == model.logits(tokens).dtype == dtype
    with pytest.raises(ModelError, match="unknown model dtype 'bfloat'; did you mean bfloat16"):
        load_model(str(gpt2), dtype="bfloat")


def test_no_parameter_needs_a_gradient(gpt2: Path) -> None:
    model = load_model(str(gpt2))
    assert not any(p.requires_grad for p in model.plain.parameters())
    assert not any(p.requires_grad for p in torch.nn.Module.parameters(model.bridge))


def test_the_bridge_shares_the_weights(gpt2: Path) -> None:
    model = load_model(str(gpt2))
    shared = {p.data_ptr() for p in model.plain.parameters()}
    assert model.bridge.original_model.lm_head.weight.data_ptr() in shared


def test_the_fingerprint_is_of_config_and_weights_only(gpt2: Path, tmp_path: Path) -> None:
    original = load_model(str(gpt2)).fingerprint
    elsewhere = copy_of(gpt2, tmp_path / "elsewhere")
    config = json.loads((elsewhere / "config.json").read_text())
    (elsewhere / "config.json").write_text(json.dumps({**config, "transformers_version": "0"}, indent=8))
    (elsewhere / "README.md").write_text("hello")
    assert load_model(str(elsewhere)).fingerprint == original
    (elsewhere / "config.json").write_text(json.dumps({**config, "layer_norm_epsilon": 1e-3}))
    assert load_model(str(elsewhere)).fingerprint != original
    changed = copy_of(gpt2, tmp_path / "changed")
    weights = bytearray((changed / "model.safetensors").read_bytes())
    weights[-3] ^= 1
    (changed / "model.safetensors").write_bytes(weights)
    assert fingerprint(changed, None) != original


def test_unknown_models_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"model folder .*nowhere does not exist; give a folder, a hub id or 'embedded'"
    ):
        load_model(str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match=r"unknown model 'no-such-model': .*HF_HUB_OFFLINE is set") as caught:
        load_model("no-such-model")
    assert "\n" not in str(caught.value)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelError, match="is a file"):
        load_model(str(tmp_path / "file"))


def test_incomplete_folders_are_one_line(gpt2: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_model(str(tmp_path))
    shutil.copy(gpt2 / "config.json", tmp_path)
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        load_model(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0 nonsense")
    with pytest.raises(ModelError, match="cannot load the model in") as caught:
        load_model(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_refused_unopened(gpt2: Path, tmp_path: Path) -> None:
    shutil.copy(gpt2 / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04 would be executed")
    with pytest.raises(FormatError, match=r"pytorch_model\.bin is a pickle, expected model\.safetensors"):
        load_model(str(tmp_path))


def test_an_unknown_architecture_is_one_line(gpt2: Path, tmp_path: Path) -> None:
    folder = copy_of(gpt2, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "nonesuch"}))
    with pytest.raises(ModelError, match="cannot load the model in") as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)


def test_a_model_without_tokenizer_works_on_token_ids(gpt2: Path) -> None:
    model = load_model(str(gpt2))
    assert model.logits(torch.tensor([[1, 2]])).shape == (1, 2, VOCAB)
    for _ in range(2):
        with pytest.raises(ModelError, match=r"has no tokenizer .*add the tokenizer's files"):
            model.tokenizer  # noqa: B018


def test_the_tokenizer_is_untouched_by_the_bridge(gpt2: Path, tmp_path: Path) -> None:
    folder = copy_of(gpt2, tmp_path / "m")
    tokenizer_for(folder)
    tokenizer = load_model(str(folder)).tokenizer
    assert tokenizer("a b c")["input_ids"] == [1, 2, 3]
    assert tokenizer.pad_token is None
    (folder / "tokenizer.json").write_text("{}")
    broken = load_model(str(folder))
    with pytest.raises(ModelError, match="cannot read the tokenizer"):
        broken.tokenizer  # noqa: B018


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gelu_new_runs_in_one_kernel_in_float32_and_gives_what_hugging_face_gives(gpt2: Path, dtype: str) -> None:
    from transformers import AutoModelForCausalLM

    ours = load_model(str(gpt2), dtype=dtype)
    theirs = AutoModelForCausalLM.from_pretrained(gpt2, dtype=ours.dtype).eval()
    fused = [module for module in ours.plain.modules() if isinstance(module, torch.nn.GELU)]
    assert len(fused) == (ours.n_layers if dtype == "float32" else 0)
    tokens = torch.arange(10).remainder(VOCAB)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(tokens), theirs(tokens).logits, atol=1e-6, rtol=1e-5)
