"""``load_sae`` opens other libraries' checkpoints; each known trap of their formats, through the front door."""

import pickle
from pathlib import Path

import pytest
import torch

from saelab.core.errors import FormatError
from saelab.sae import load_sae, save_sae
from saelab.sae.folder import load_meta
from saelab.sae.formats import export_sae
from tests.sae.formats_helpers import D, K, close, folder, tensors, topk
from tests.sae.test_contract import make
from tests.sae.test_formats import portable

FOUR = ("W_enc", "b_enc", "W_dec", "b_dec")


def weights(*names: str) -> dict[str, torch.Tensor]:
    return {name: tensors()[name] for name in names}


def saelens(path: Path, extra: dict[str, object] | None = None, *names: str, **config: object) -> Path:
    cfg = {"architecture": "standard", "metadata": {"sae_lens_version": "6.1.0", "hook_name": "blocks.1.x"}, **config}
    return folder(path, {"cfg.json": cfg, "sae_weights.safetensors": weights(*FOUR, *names), **(extra or {})})


@pytest.mark.parametrize("name", ["saelens", "sparsify", "dictionary_learning", "openmoss", "openai"])
def test_every_format_is_found_out(tmp_path: Path, name: str) -> None:
    original = portable("relu" if name == "openai" else "topk").to_sae()
    export_sae(original, tmp_path / name, name)
    x = tensors()["x"]
    loaded = load_sae(tmp_path / name)
    torch.testing.assert_close(loaded(x), original(x), rtol=1e-5, atol=1e-5)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert load_meta(tmp_path / name)["imported"]["format"] == name


def test_a_single_file_is_enough_where_it_says_everything(tmp_path: Path) -> None:
    export_sae(portable("relu").to_sae(), tmp_path, "openai")
    file = next(tmp_path.glob("*.pt"))
    torch.testing.assert_close(load_sae(file)(tensors()["x"]), load_sae(tmp_path)(tensors()["x"]))


def test_flat_saelens_config_of_before_version_6(tmp_path: Path) -> None:
    cfg = {"hook_point": "blocks.1.hook_resid_post", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
    path = folder(tmp_path, {"cfg.json": {**cfg, "d_in": D}, "sae_weights.safetensors": weights(*FOUR)})
    t, sae = tensors(), load_sae(path)
    acts = topk((t["x"] - t["b_dec"]) @ t["W_enc"] + t["b_enc"], K)
    close((sae.encode(t["x"]).to_dense(), sae(t["x"])), acts, acts @ t["W_dec"] + t["b_dec"])
    assert load_meta(path)["imported"]["hook_name"] == "blocks.1.hook_resid_post"


def test_trap_num_latents_zero(tmp_path: Path) -> None:
    t = {name: value[: 2 * D] for name, value in (("W_dec", tensors()["W_dec"]), ("b", tensors()["b_enc"]))}
    files = {"encoder.weight": tensors()["W_enc"].T[: 2 * D], "encoder.bias": t["b"], "W_dec": t["W_dec"]}
    cfg = {"activation": "topk", "num_latents": 0, "expansion_factor": 2, "k": K, "d_in": D, "transcode": False}
    path = folder(tmp_path, {"cfg.json": cfg, "sae.safetensors": {**files, "b_dec": tensors()["b_dec"]}})
    assert load_sae(path).d_sae == 2 * D


def test_trap_unfolded_scale_and_threshold(tmp_path: Path) -> None:
    """A SAELens checkpoint on the way is in scaled space, its factor in another file: threshold and biases follow."""
    scaler = {"activation_scaler.json": {"scaling_factor": 2.5}}
    config = {"architecture": "jumprelu", "normalize_activations": "expected_average_only_in"}
    t, sae = tensors(), load_sae(saelens(tmp_path, scaler, "threshold", **config))
    z = (2.5 * t["x"] - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    acts = z.relu() * (z > t["threshold"])
    close((sae.encode(t["x"]).to_dense(), sae(t["x"])), acts, (acts @ t["W_dec"] + t["b_dec"]) / 2.5)
    folded = sae.fold_scale()
    close((folded.encode(t["x"]).to_dense() * 2.5, folded(t["x"])), acts, (acts @ t["W_dec"] + t["b_dec"]) / 2.5)


def test_trap_jumprelu_without_its_flag(tmp_path: Path) -> None:
    """SAELens takes a missing apply_b_dec_to_input for true; dictionary_learning's JumpReLU subtracts nothing."""
    t = tensors()
    ours = load_sae(saelens(tmp_path / "sl", None, "threshold", architecture="jumprelu"))
    z = (t["x"] - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    acts = z.relu() * (z > t["threshold"])
    close((ours.encode(t["x"]).to_dense(), ours(t["x"])), acts, acts @ t["W_dec"] + t["b_dec"])
    config = {"config.json": {"trainer": {"dict_class": "JumpReluAutoEncoder"}}}
    theirs = load_sae(folder(tmp_path / "dl", {**config, "ae.pt": weights(*FOUR, "threshold")}))
    z = t["x"] @ t["W_enc"] + t["b_enc"]
    acts = z.relu() * (z > t["threshold"])
    close((theirs.encode(t["x"]).to_dense(), theirs(t["x"])), acts, acts @ t["W_dec"] + t["b_dec"])


def test_trap_threshold_minus_one(tmp_path: Path) -> None:
    """dictionary_learning's threshold was never measured: dense at inference, as there, and said so."""
    t = tensors()
    state = {"encoder.weight": t["W_enc"].T, "decoder.weight": t["W_dec"].T, "encoder.bias": t["b_enc"]}
    state |= {"b_dec": t["b_dec"], "k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(-1.0)}
    path = folder(tmp_path, {"config.json": {"trainer": {"dict_class": "BatchTopKSAE"}}, "ae.pt": state})
    with pytest.warns(UserWarning, match="training never measured it"):
        sae = load_sae(path)
    acts = ((t["x"] - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
    close((sae.encode(t["x"]).to_dense(), sae(t["x"])), acts, acts @ t["W_dec"] + t["b_dec"])


class _Call:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("executed",)


@pytest.mark.parametrize("name", ["sae.pt", "sae.pkl", "sae.bin"])
def test_a_pickle_with_code_is_one_line(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).write_bytes(pickle.dumps({"weights": _Call()}))
    with pytest.raises(FormatError, match="saelab does not execute it") as error:
        load_sae(tmp_path / name)
    assert "\n" not in str(error.value)
    assert "executed" not in capsys.readouterr().out


def test_unknown_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"in no format known here \(.*saelens.*\); it holds nothing"):
        load_sae(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(FormatError, match=r"it holds notes\.txt") as error:
            load_sae(path)
        assert "\n" not in str(error.value)
    torch.save({"some": torch.zeros(2)}, tmp_path / "x.pt")  # tensors only, and of nothing known
    with pytest.raises(FormatError, match="in no format known here"):
        load_sae(tmp_path / "x.pt")


def test_own_folders_stay_own(tmp_path: Path) -> None:
    save_sae(make("topk").float(), tmp_path / "s", {"note": 1})
    assert load_meta(tmp_path / "s") == {"note": 1}
    (tmp_path / "s" / "manifest.json").unlink()
    with pytest.raises(FormatError, match="interrupted"):
        load_sae(tmp_path / "s")
