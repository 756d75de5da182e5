"""sparsify, dictionary_learning, OpenAI, OpenMOSS and ai-safety-foundation, against formulas written down here."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from saelab.core.errors import FormatError
from saelab.sae.formats import detect_format, import_sae, read_checkpoint
from tests.sae.formats_helpers import D, K, M, close, folder, tensors, topk

# sparsify

SPARSIFY: dict[str, Any] = {"activation": "topk", "expansion_factor": 32, "num_latents": M, "k": K, "d_in": D}


def sparsify(path: Path, config: dict[str, Any], **extra: torch.Tensor) -> Path:
    t = tensors()
    weights = {"encoder.weight": t["W_enc"].T, "encoder.bias": t["b_enc"], "W_dec": t["W_dec"], "b_dec": t["b_dec"]}
    return folder(path, {"cfg.json": config, "sae.safetensors": {**weights, **extra}})


def test_sparsify_relu_comes_before_topk(tmp_path: Path) -> None:
    t = tensors()
    # biases so low that few of the k chosen are positive: relu before or after must not matter
    sae = import_sae(sparsify(tmp_path, {**SPARSIFY, "k": 15}, **{"encoder.bias": t["b_enc"] - 3}))
    z = ((t["x"] - t["b_dec"]) @ t["W_enc"] + t["b_enc"] - 3).relu()
    values, indices = z.topk(15, dim=1)
    acts = torch.zeros_like(z).scatter(1, indices, values)
    assert (values == 0).any()
    close((sae.encode(t["x"]).to_dense(), sae(t["x"])), acts, acts @ t["W_dec"] + t["b_dec"])


def test_sparsify_num_latents_zero_means_the_expansion_factor(tmp_path: Path) -> None:
    t = tensors()
    d_sae = 2 * D
    cut = {"encoder.weight": t["W_enc"].T[:d_sae], "encoder.bias": t["b_enc"][:d_sae], "W_dec": t["W_dec"][:d_sae]}
    path = sparsify(tmp_path / "a", {**SPARSIFY, "num_latents": 0, "expansion_factor": 2}, **cut)
    assert import_sae(path).d_sae == d_sae
    with pytest.raises(FormatError, match="says d_in = 6 and 18 latents, the weights have 6 and 12"):
        import_sae(sparsify(tmp_path / "b", {**SPARSIFY, "num_latents": 0, "expansion_factor": 3}, **cut))


def test_sparsify_transcoder_subtracts_nothing(tmp_path: Path) -> None:
    t = tensors()
    skip = torch.randn(D, D, generator=torch.Generator().manual_seed(1))
    config = {**SPARSIFY, "transcode": True, "skip_connection": True}
    read = read_checkpoint(sparsify(tmp_path, config, W_skip=skip))
    acts = topk(t["x"] @ t["W_enc"] + t["b_enc"], K)
    close(read.dense(t["x"]), acts, acts @ t["W_dec"] + t["b_dec"] + t["x"] @ skip.T)
    assert read.transcoder


@pytest.mark.parametrize("change", [{"activation": "groupmax"}, {"signed": True}])
def test_sparsify_other_activations_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match="has no counterpart"):
        import_sae(sparsify(tmp_path, {**SPARSIFY, **change}))


# dictionary_learning


def dl(path: Path, name: str, state: dict[str, Any]) -> Path:
    return folder(path, {"config.json": {"trainer": {"dict_class": name, "lm_name": "m"}}, "ae.pt": state})


def linear() -> dict[str, torch.Tensor]:
    t = tensors()
    return {"encoder.weight": t["W_enc"].T, "decoder.weight": t["W_dec"].T}


def numbers(threshold: float) -> dict[str, torch.Tensor]:
    return {"k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(threshold)}


def test_dl_autoencoders_differ_in_their_bias(tmp_path: Path) -> None:
    t = tensors()
    old = dl(tmp_path / "o", "AutoEncoder", {**linear(), "encoder.bias": t["b_enc"], "bias": t["b_dec"]})
    acts = ((t["x"] - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
    close(read_checkpoint(old).dense(t["x"]), acts, acts @ t["W_dec"] + t["b_dec"])
    new = dl(tmp_path / "n", "AutoEncoderNew", {**linear(), "encoder.bias": t["b_enc"], "decoder.bias": t["b_dec"]})
    acts = (t["x"] @ t["W_enc"] + t["b_enc"]).relu()
    close(read_checkpoint(new).dense(t["x"]), acts, acts @ t["W_dec"] + t["b_dec"])


def test_dl_topk_ignores_its_threshold(tmp_path: Path) -> None:
    t = tensors()
    state = {**linear(), **numbers(-1.0), "encoder.bias": t["b_enc"], "b_dec": t["b_dec"]}
    sae = import_sae(dl(tmp_path, "AutoEncoderTopK", state))
    acts = topk((t["x"] - t["b_dec"]) @ t["W_enc"] + t["b_enc"], K)
    close((sae.encode(t["x"]).to_dense(), sae(t["x"])), acts, acts @ t["W_dec"] + t["b_dec"])


@pytest.mark.parametrize("name", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
def test_dl_batchtopk_uses_its_threshold(tmp_path: Path, name: str) -> None:
    t = tensors()
    if name == "BatchTopKSAE":
        weights = {**linear(), "encoder.bias": t["b_enc"], "b_dec": t["b_dec"]}
    else:
        weights = {key: t[key] for key in ("W_enc", "b_enc", "W_dec", "b_dec")} | {"group_sizes": torch.tensor([5, 15])}
    z = ((t["x"] - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
    acts = z * (z > 1.5)
    read = read_checkpoint(dl(tmp_path / "a", name, {**weights, **numbers(1.5)}))
    close(read.dense(t["x"]), acts, acts @ t["W_dec"] + t["b_dec"])
    with pytest.warns(UserWarning, match="training never measured it"):
        read = read_checkpoint(dl(tmp_path / "b", name, {**weights, **numbers(-1.0)}))
    close(read.dense(t["x"]), z, z @ t["W_dec"] + t["b_dec"])


def test_dl_jumprelu_subtracts_nothing(tmp_path: Path) -> None:
    t = tensors()
    state = {key: t[key] for key in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
    z = t["x"] @ t["W_enc"] + t["b_enc"]
    acts = z * (z > t["threshold"])
    read = read_checkpoint(dl(tmp_path, "JumpReluAutoEncoder", state))
    close(read.dense(t["x"]), acts, acts @ t["W_dec"] + t["b_dec"])


def test_dl_gated(tmp_path: Path) -> None:
    t = tensors()
    state = {**linear(), "decoder_bias": t["b_dec"], "gate_bias": t["b_enc"], "mag_bias": t["b_mag"]}
    read = read_checkpoint(dl(tmp_path, "GatedAutoEncoder", {**state, "r_mag": t["r_mag"]}))
    pre = (t["x"] - t["b_dec"]) @ t["W_enc"]
    acts = (pre + t["b_enc"] > 0) * (t["r_mag"].exp() * pre + t["b_mag"]).relu()
    close(read.dense(t["x"]), acts, acts @ t["W_dec"] + t["b_dec"])


def test_dl_backup_is_unfolded(tmp_path: Path) -> None:
    t = tensors()
    state = {**linear(), **numbers(-1.0), "encoder.bias": t["b_enc"], "b_dec": t["b_dec"]}
    backup = {"step": 7, "ae": state, "optimizer": {}, "config": {}, "norm_factor": 2.5}
    sae = import_sae(dl(tmp_path, "AutoEncoderTopK", backup))
    acts = topk((t["x"] / 2.5 - t["b_dec"]) @ t["W_enc"] + t["b_enc"], K)
    close((sae.encode(t["x"]).to_dense(), sae(t["x"])), acts, (acts @ t["W_dec"] + t["b_dec"]) * 2.5)


def test_dl_unknown_class(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="dict_class 'IdentityDict' is none of"):
        import_sae(dl(tmp_path / "a", "IdentityDict", {}))
    with pytest.raises(FormatError, match=r"does not name trainer\.dict_class"):
        import_sae(folder(tmp_path / "b", {"config.json": {}, "ae.pt": {}}))


# OpenAI


def openai(path: Path, **extra: Any) -> Path:
    t = tensors()
    state = {"pre_bias": t["b_dec"], "latent_bias": t["b_enc"], **linear(), "stats_last_nonzero": torch.zeros(M).long()}
    return folder(path, {"0.pt": {**state, **extra}}) / "0.pt"


def test_openai_relu(tmp_path: Path) -> None:
    t = tensors()
    read = read_checkpoint(openai(tmp_path, activation="ReLU", activation_state_dict={}))
    acts = ((t["x"] - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
    close(read.dense(t["x"]), acts, acts @ t["W_dec"] + t["b_dec"])


def test_openai_topk_normalises_tokens_and_is_refused(tmp_path: Path) -> None:
    file = openai(tmp_path, activation="TopK", activation_state_dict={"k": K, "postact_fn": "ReLU"})
    assert detect_format(file) == "openai"
    with pytest.raises(FormatError, match="normalise each token"):
        import_sae(file)
    with pytest.raises(FormatError, match="activation 'Identity' has no counterpart"):
        import_sae(openai(tmp_path / "i", activation="Identity"))


# OpenMOSS

MOSS: dict[str, Any] = {
    "sae_type": "sae",
    "d_model": D,
    "act_fn": "jumprelu",
    "top_k": K,
    "norm_activation": "dataset-wise",
    "sparsity_include_decoder_norm": False,
    "hook_point_in": "h",
    "hook_point_out": "h",
}


def moss(path: Path, **change: Any) -> Path:
    t = tensors()
    weights = {"W_E": t["W_enc"], "b_E": t["b_enc"], "W_D": t["W_dec"], "b_D": t["b_dec"]}
    norms = {"dataset_average_activation_norm.h": torch.tensor(change.pop("norm", 9.0))}
    logs = {"activation_function.log_jumprelu_threshold": t["threshold"].log()}
    return folder(path, {"config.json": {**MOSS, **change}, "sae_weights.safetensors": {**weights, **norms, **logs}})


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("act_fn", ["relu", "jumprelu", "topk"])
def test_openmoss_dataset_wise(tmp_path: Path, act_fn: str, include: bool) -> None:
    t, s = tensors(), D**0.5 / 9.0
    read = read_checkpoint(moss(tmp_path, act_fn=act_fn, sparsity_include_decoder_norm=include))
    norms = t["W_dec"].norm(dim=1) if include else torch.ones(M)
    z = (t["x"] * s) @ t["W_enc"] + t["b_enc"]
    scores = z * norms
    kept = {"relu": scores.relu(), "jumprelu": scores * (scores > t["threshold"]), "topk": topk(scores, K)}[act_fn]
    recon = (kept / norms @ t["W_dec"] + t["b_dec"]) / s
    close(read.dense(t["x"]), kept if act_fn == "topk" else kept / norms, recon)


def test_openmoss_threshold_is_folded_with_the_scale(tmp_path: Path) -> None:
    """OpenMOSS' own folding leaves the threshold and so changes which features are on."""
    t, s = tensors(), D**0.5 / 9.0
    read = read_checkpoint(moss(tmp_path))
    folded = read.with_scale_in_biases()
    assert folded.threshold is not None
    torch.testing.assert_close(folded.threshold, t["threshold"] / s)
    acts, recon = read.dense(t["x"])
    close(folded.dense(t["x"]), acts / s, recon)


def test_openmoss_inference_form_is_taken_as_it_is(tmp_path: Path) -> None:
    t = tensors()
    with pytest.warns(UserWarning, match="not into JumpReLU thresholds"):
        read = read_checkpoint(moss(tmp_path, norm_activation="inference"))
    z = t["x"] @ t["W_enc"] + t["b_enc"]
    acts = z * (z > t["threshold"])
    close(read.dense(t["x"]), acts, acts @ t["W_dec"] + t["b_dec"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": float("nan")}, "was never set"),
        ({"norm_activation": "token-wise"}, "cannot be folded"),
        ({"act_fn": "batchtopk"}, "no form for single tokens"),
        ({"use_glu_encoder": True}, "sigmoid gate"),
        ({"hook_point_out": "other"}, "maps h to other"),
        ({"sae_type": "clt"}, "not an autoencoder of one site"),
    ],
)
def test_openmoss_what_cannot_be_represented(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read_checkpoint(moss(tmp_path, **change))


def test_llama_scope(tmp_path: Path) -> None:
    t, s = tensors(), D**0.5 / 5.0
    config = {"dataset_average_activation_norm": {"in": 5.0, "out": 5.0}, "jump_relu_threshold": 0.9}
    weights = {**linear(), "encoder.bias": t["b_enc"], "decoder.bias": t["b_dec"]}
    read = read_checkpoint(folder(tmp_path, {"hyperparams.json": config, "checkpoints/final.safetensors": weights}))
    z = (t["x"] * s) @ t["W_enc"] + t["b_enc"]
    acts = z * (z / s > 0.9)
    close(read.dense(t["x"]), acts, (acts @ t["W_dec"] + t["b_dec"]) / s)
    with pytest.raises(FormatError, match="needs dataset_average_activation_norm"):
        read_checkpoint(folder(tmp_path, {"hyperparams.json": {"jump_relu_threshold": 0.9}}))


# ai-safety-foundation


def test_ai_safety_foundation(shared: Path) -> None:
    path = shared / "sae-gpt2-ioi-300"
    assert detect_format(path) == "ai-safety-foundation"
    read, t = read_checkpoint(path), load_file(path / "sae_weights.safetensors")
    x = t["tied_bias"] + torch.randn(32, 768, generator=torch.Generator().manual_seed(0))
    acts = ((x - t["tied_bias"]) @ t["encoder.weight"].T + t["encoder.bias"]).relu()
    assert (read.d_in, read.d_sae) == (768, 300)
    close(read.dense(x), acts, acts @ t["decoder.weight"].T + t["tied_bias"])
