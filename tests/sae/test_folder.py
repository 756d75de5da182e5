import json

import pytest
import torch

from saelab.core.artifacts import file_checksum, write_safetensors
from saelab.core.errors import ConfigError, CorruptError, FormatError, MissingFileError
from saelab.sae import load_sae, save_sae
from saelab.sae.folder import load_meta
from tests.sae.test_contract import make


@pytest.fixture
def folder(tmp_path):
    save_sae(make("topk").float(), tmp_path / "sae", {"tokens": 5, "nan": float("nan")})
    return tmp_path / "sae"


def rewrite(folder, **tensors):
    """Replace the weights and make the manifest agree with them."""
    write_safetensors(folder / "weights.safetensors", tensors)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["checksums"]["weights.safetensors"] = file_checksum(folder / "weights.safetensors")
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_files_and_orientation(folder):
    assert {p.name for p in folder.iterdir()} == {"config.json", "weights.safetensors", "meta.json", "manifest.json"}
    from safetensors.torch import load_file

    tensors = load_file(folder / "weights.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "W_enc": (8, 32),
        "W_dec": (32, 8),
        "b_enc": (32,),
        "b_dec": (8,),
    }
    assert load_meta(folder) == {"tokens": 5, "nan": None}


def test_flipped_bit_is_found(folder):
    data = bytearray((folder / "weights.safetensors").read_bytes())
    data[-5] ^= 1
    (folder / "weights.safetensors").write_bytes(data)
    with pytest.raises(CorruptError, match="checksum"):
        load_sae(folder)


def test_truncated_weights_are_found(folder):
    path = folder / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CorruptError, match=r"weights\.safetensors"):
        load_sae(folder)


def test_pickle_is_refused(folder):
    torch.save({"W_enc": torch.zeros(2)}, folder / "weights.safetensors")
    with pytest.raises(FormatError, match="pickle"):
        load_sae(folder)


def test_missing_tensor(folder):
    rewrite(folder, W_enc=torch.zeros(8, 32), b_enc=torch.zeros(32), b_dec=torch.zeros(8))
    with pytest.raises(FormatError, match="no tensor 'W_dec'; it holds W_enc, b_dec, b_enc"):
        load_sae(folder)


def test_wrong_shape(folder):
    rewrite(folder, W_enc=torch.zeros(32, 8), b_enc=torch.zeros(32), b_dec=torch.zeros(8), W_dec=torch.zeros(32, 8))
    with pytest.raises(FormatError, match=r"'W_enc' has shape \(32, 8\), its config says \(8, 32\)"):
        load_sae(folder)


def test_unknown_tensor(folder):
    zeros = {name: torch.zeros(t.shape) for name, t in make("topk").tensors().items()}
    rewrite(folder, **zeros, extra=torch.zeros(1))
    with pytest.raises(FormatError, match="unknown tensors: extra"):
        load_sae(folder)


def test_unknown_architecture_names_the_nearest(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architecture": "topkk"}))
    with pytest.raises(ConfigError, match="unknown architecture 'topkk'; did you mean topk"):
        load_sae(folder)


def test_no_architecture(folder):
    (folder / "config.json").write_text("[]")
    with pytest.raises(FormatError, match="does not name an architecture"):
        load_sae(folder)


@pytest.mark.parametrize("name", ["config.json", "weights.safetensors"])
def test_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(MissingFileError, match=name.replace(".", r"\.")):
        load_sae(folder)


def test_half_saved_folder_is_not_an_sae(folder, monkeypatch):
    """A kill between the files of a second save leaves no manifest, so nobody reads a mixture."""
    monkeypatch.setattr("saelab.sae.folder.write_manifest", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_sae(make("topk").float(), folder)
    with pytest.raises(FormatError, match=r"manifest\.json"):
        load_sae(folder)
