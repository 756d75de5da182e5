"""The neutral form, the registry of formats, and pickles."""

import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from saelab.core.errors import ConfigError, CorruptError, FormatError, MissingFileError
from saelab.sae.folder import save_sae
from saelab.sae.formats import FORMATS, Portable, detect_format, export_sae, import_sae, read_checkpoint
from saelab.sae.formats.files import load_pickle
from saelab.sae.registry import ARCHITECTURES, build_sae
from saelab.sae.topk import TopKConfig
from tests.sae.formats_helpers import D, K, M, close, folder, tensors, topk

KINDS = ("topk", "jumprelu", "relu", "gated")


def portable(kind: str, **changes: object) -> Portable:
    t = tensors()
    extra = {
        "topk": {"k": K},
        "jumprelu": {"threshold": t["threshold"]},
        "relu": {},
        "gated": {"b_mag": t["b_mag"], "r_mag": t["r_mag"]},
    }[kind]
    base = {name: t[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    return Portable(kind, **{**base, **extra, "input_scale": 0.4, **changes})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("centered", [True, False])
def test_folds_keep_the_function(kind: str, centered: bool) -> None:
    x, sae = tensors()["x"], portable(kind, centered=centered)
    acts, recon = sae.dense(x)
    close(sae.with_centered(not centered).dense(x), acts, recon)
    close(sae.with_scale_in_weights().dense(x), acts, recon)
    close(sae.with_scale_in_biases().dense(x), acts / 0.4, recon)
    assert sae.with_centered(not centered).b_enc.ne(sae.b_enc).any()


@pytest.mark.parametrize("kind", ["relu", "gated"])
def test_folding_decoder_norms_changes_the_unit_of_activations_only(kind: str) -> None:
    x, sae = tensors()["x"], portable(kind)
    acts, recon = sae.dense(x)
    folded = sae.with_decoder_norms_folded()
    close(folded.dense(x), acts * sae.W_dec.norm(dim=1), recon)
    torch.testing.assert_close(folded.W_dec.norm(dim=1), torch.ones(M))


def test_whitening_folds() -> None:
    x, sae = tensors()["x"], portable("relu", input_scale=1.0)
    matrix, mean = torch.eye(D) * 2 + torch.ones(D, D) * 0.3, torch.arange(D) * 0.1
    inverse = matrix.inverse()
    acts, recon = sae.dense((x - mean) @ matrix)
    close(sae.with_affine_input(mean, matrix, inverse).dense(x), acts, recon @ inverse + mean)


def test_topk_to_sae_and_back_through_every_format(tmp_path: Path) -> None:
    x = tensors()["x"]
    original = portable("topk").to_sae()
    code = original.encode(x)
    for name in ("saelens", "sparsify", "dictionary_learning", "openmoss"):
        back = import_sae(export_sae(original, tmp_path / name, name))
        assert detect_format(tmp_path / name) == name
        assert back.config.architecture == "topk"
        unit = 1.0 if name == "saelens" else 0.4
        close((back.encode(x).to_dense() * unit, back(x)), code.to_dense(), original.decode(code))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["saelens", "dictionary_learning", "openmoss", "openai"])
def test_written_files_read_back(kind: str, name: str, tmp_path: Path) -> None:
    x, sae = tensors()["x"], portable(kind)
    write = FORMATS[name].write
    assert write is not None
    refused = {("gated", "openmoss"), ("topk", "openai"), ("jumprelu", "openai"), ("gated", "openai")}
    if (kind, name) in refused:
        with pytest.raises(FormatError, match=r"holds .* this is"):
            write(sae, tmp_path)
        return
    write(sae, tmp_path)
    acts, recon = sae.dense(x)
    if (kind, name) == ("jumprelu", "openmoss"):
        with pytest.warns(UserWarning, match="not into JumpReLU thresholds"):
            back = read_checkpoint(tmp_path)
    else:
        back = read_checkpoint(tmp_path)
    assert back.kind == kind
    unit = 1.0 if name == "saelens" else 0.4
    close((back.dense(x)[0] * unit, back.dense(x)[1]), acts, recon)


@pytest.mark.parametrize("prefixes", [None, (5, 10, M)])
def test_batch_topk_keeps_its_name_and_k(tmp_path: Path, prefixes: tuple[int, ...] | None) -> None:
    x = tensors()["x"]
    sae = portable("jumprelu", threshold=torch.full((M,), 0.7), k=3.0, prefixes=prefixes)
    architecture = "matryoshka" if prefixes else "mutual_choice"
    assert sae.architecture == architecture
    for name in ("saelens", "dictionary_learning"):
        write = FORMATS[name].write
        assert write is not None
        write(sae, tmp_path / name)
        back = read_checkpoint(tmp_path / name)
        assert (back.architecture, back.k, back.prefixes) == (architecture, 3, prefixes)
        loaded = import_sae(tmp_path / name)
        close((loaded.encode(x).to_dense(), loaded(x)), *back.dense(x))
        again = Portable.from_sae(loaded)
        assert (again.architecture, again.k, again.prefixes) == (architecture, 3, prefixes)
        assert torch.equal(again.dense(x)[0], back.dense(x)[0])


def test_transcoder_to_sae_and_back(tmp_path: Path) -> None:
    t = tensors()
    skip = torch.randn(D, D, generator=torch.Generator().manual_seed(3))
    sae = portable("topk", transcoder=True, centered=False, W_skip=skip).to_sae()
    z = (t["x"] * 0.4) @ t["W_enc"] + t["b_enc"]
    acts = topk(z, K)
    recon = (acts @ t["W_dec"] + t["b_dec"]) / 0.4 + t["x"] @ skip
    close((sae.encode(t["x"]).to_dense(), sae(t["x"])), acts, recon)
    back = import_sae(export_sae(sae, tmp_path / "sparsify", "sparsify"))
    assert back.config.architecture == "transcoder"
    close((back.encode(t["x"]).to_dense() * 0.4, back(t["x"])), acts, recon)
    for name in ("saelens", "dictionary_learning", "openmoss", "openai"):
        with pytest.raises(FormatError, match=r"transcoder|ReLU SAEs only"):
            export_sae(sae, tmp_path / name, name)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_an_sae_with_the_same_function(kind: str) -> None:
    x = tensors()["x"]
    for centered in (True, False):
        original = portable(kind, centered=centered)
        sae = original.to_sae()
        close((sae.encode(x).to_dense(), sae(x)), *original.dense(x))
        back = Portable.from_sae(sae)
        assert back.kind == kind
        close(back.dense(x), *original.dense(x))


def test_gradient_and_feature_choice_sae_are_exported_as_they_infer(tmp_path: Path) -> None:
    x = tensors()["x"]
    gradient = build_sae(ARCHITECTURES["gradient"].config(architecture="gradient", d_in=D, d_sae=M, k=K))
    back = import_sae(export_sae(gradient, tmp_path / "g", "saelens"))
    assert back.config.architecture == "topk"
    close((back.encode(x).to_dense(), back(x)), gradient.encode(x).to_dense(), gradient(x))
    choice = build_sae(ARCHITECTURES["feature_choice"].config(architecture="feature_choice", d_in=D, d_sae=M, k=K))
    with pytest.raises(FormatError, match="other library's format can hold the architecture 'feature_choice'"):
        export_sae(choice, tmp_path / "f", "saelens")  # it has no thresholds before training
    with torch.no_grad():
        choice.get_buffer("batches").fill_(1)
        choice.get_buffer("thetas").fill_(1)
        choice.get_buffer("thetas")[0] = 0  # a feature that never fired has no threshold and stays off
        choice.get_buffer("theta").copy_(torch.linspace(0.1, 1, M))
    for name in ("saelens", "dictionary_learning"):
        back = import_sae(export_sae(choice, tmp_path / name, name))
        assert back.config.architecture == "jumprelu"
        close((back.encode(x).to_dense(), back(x)), choice.encode(x).to_dense(), choice(x))


def test_unregistered_architecture_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(ARCHITECTURES._items, "relu")
    with pytest.raises(FormatError, match="is a relu SAE, an architecture this version of saelab does not have"):
        portable("relu").to_sae()


def test_an_architecture_no_format_holds_is_refused(tmp_path: Path) -> None:
    sae = build_sae(TopKConfig(d_in=D, d_sae=M, k=K))
    sae.config = sae.config.model_copy(update={"architecture": "other"})
    with pytest.raises(FormatError, match="no other library's format can hold the architecture 'other'"):
        export_sae(sae, tmp_path, "saelens")


def test_a_transcoder_of_other_width_cannot_be_centered() -> None:
    sae = portable("topk", centered=False, transcoder=True, W_dec=torch.zeros(M, D + 1), b_dec=torch.zeros(D + 1))
    with pytest.raises(FormatError, match="cannot be subtracted"):
        sae.with_centered(True)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError):
        import_sae(tmp_path / "nothing")
    with pytest.raises(FormatError, match="in no format known here"):
        import_sae(tmp_path)
    save_sae(build_sae(TopKConfig(d_in=D, d_sae=M, k=K)), tmp_path / "own")
    with pytest.raises(FormatError, match="open it with load_sae"):
        import_sae(tmp_path / "own")
    with pytest.raises(ConfigError, match="did you mean saelens"):
        import_sae(tmp_path, format="saelen")
    with pytest.raises(FormatError, match="read but not written"):
        export_sae(portable("topk").to_sae(), tmp_path, "ai-safety-foundation")


class _Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_not_executed(tmp_path: Path, zipped: bool) -> None:
    file, marker = tmp_path / "ae.pt", tmp_path / "executed"
    if zipped:
        torch.save({"encoder.weight": torch.zeros(1), "evil": _Evil(marker)}, file)
    else:
        file.write_bytes(pickle.dumps({"evil": _Evil(marker)}))
    with pytest.raises(FormatError, match="does not execute it") as error:
        load_pickle(file)
    assert "\n" not in str(error.value)
    assert not marker.exists()


def test_broken_pickles(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(100)}, tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:300])
    with pytest.raises((CorruptError, FormatError)):
        load_pickle(tmp_path / "cut.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    with pytest.raises(FormatError, match="holds a Tensor"):
        load_pickle(tmp_path / "tensor.pt")


def test_misshapen_weights_are_one_line(tmp_path: Path) -> None:
    t = tensors()
    files = {"cfg.json": {"architecture": "standard", "sae_lens_version": "6.0.0"}}
    weights = {name: t[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    for change, message in (
        ({"W_dec": t["W_dec"].T}, "'W_dec' is for 6 features and the encoder for 20"),
        ({"b_enc": t["b_dec"]}, r"'b_enc' has shape \(6,\), expected \(20,\)"),
        ({"W_enc": t["b_enc"]}, "expected a matrix"),
    ):
        folder(tmp_path, {**files, "sae_weights.safetensors": {**weights, **change}})
        with pytest.raises(FormatError, match=message):
            import_sae(tmp_path)
    folder(tmp_path, {**files, "sae_weights.safetensors": {"W_enc": t["W_enc"]}})
    with pytest.raises(FormatError, match="has no tensor 'W_dec'; it holds W_enc"):
        import_sae(tmp_path)


def test_negative_threshold_is_not_taken_for_batch_topk() -> None:
    sae = replace(portable("jumprelu"), threshold=torch.full((M,), -1.0), k=3.0)
    assert sae.architecture == "jumprelu"
