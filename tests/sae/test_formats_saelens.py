"""SAELens folders, against formulas written down here."""

from pathlib import Path
from typing import Any

import pytest
import torch

from saelab.core.errors import FormatError
from saelab.sae.formats import import_sae, read_checkpoint
from tests.sae.formats_helpers import D, K, M, close, folder, tensors, topk

V6: dict[str, Any] = {
    "d_in": D,
    "d_sae": M,
    "dtype": "float32",
    "device": "cpu",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "metadata": {"sae_lens_version": "6.54.12", "model_name": "gpt2", "hook_name": "blocks.0.hook_resid_pre"},
}


def write(path: Path, config: dict[str, Any], names: str, extra: dict[str, Any] | None = None, **files: Any) -> Path:
    t = tensors()
    weights = {name: t[name] for name in names.split()} | (extra or {})
    return folder(path, {"cfg.json": config, "sae_weights.safetensors": weights, **files})


FOUR = "W_enc b_enc W_dec b_dec"


@pytest.mark.parametrize("subtract", [True, False])
def test_standard_and_jumprelu(tmp_path: Path, subtract: bool) -> None:
    t = tensors()
    z = (t["x"] - t["b_dec"] * subtract) @ t["W_enc"] + t["b_enc"]
    standard = {**V6, "architecture": "standard", "apply_b_dec_to_input": subtract}
    read = read_checkpoint(write(tmp_path / "s", standard, FOUR))
    close(read.dense(t["x"]), z.relu(), z.relu() @ t["W_dec"] + t["b_dec"])
    assert read.meta["hook_name"] == "blocks.0.hook_resid_pre"
    jump = {**standard, "architecture": "jumprelu"}
    acts = z.relu() * (z > t["threshold"])
    close(
        read_checkpoint(write(tmp_path / "j", jump, FOUR + " threshold")).dense(t["x"]),
        acts,
        acts @ t["W_dec"] + t["b_dec"],
    )
    logs = {"log_threshold": t["threshold"].log()}
    close(read_checkpoint(write(tmp_path / "l", jump, FOUR, logs)).dense(t["x"]), acts, acts @ t["W_dec"] + t["b_dec"])


def test_jumprelu_without_the_flag_subtracts_b_dec(tmp_path: Path) -> None:
    config = {key: value for key, value in V6.items() if key != "apply_b_dec_to_input"}
    read = read_checkpoint(write(tmp_path, {**config, "architecture": "jumprelu"}, FOUR + " threshold"))
    assert read.centered


def test_gated(tmp_path: Path) -> None:
    t = tensors()
    extra = {"b_gate": t["b_enc"]}
    read = read_checkpoint(write(tmp_path, {**V6, "architecture": "gated"}, "W_enc W_dec b_dec b_mag r_mag", extra))
    pre = (t["x"] - t["b_dec"]) @ t["W_enc"]
    acts = (pre * t["r_mag"].exp() + t["b_mag"]).relu() * (pre + t["b_enc"] > 0)
    close(read.dense(t["x"]), acts, acts @ t["W_dec"] + t["b_dec"])


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("unit", [True, False])
def test_topk_with_the_rescale_flag(tmp_path: Path, rescale: bool, unit: bool) -> None:
    t = tensors()
    w_dec = torch.nn.functional.normalize(t["W_dec"], dim=1) if unit else t["W_dec"]
    config = {**V6, "architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": rescale}
    sae = import_sae(write(tmp_path, config, "W_enc b_enc b_dec", {"W_dec": w_dec}))
    norms = w_dec.norm(dim=1) if rescale else torch.ones(M)
    acts = topk(((t["x"] - t["b_dec"]) @ t["W_enc"] + t["b_enc"]) * norms, K)
    close((sae.encode(t["x"]).to_dense(), sae(t["x"])), acts, acts / norms @ w_dec + t["b_dec"])


def test_checkpoint_on_the_way_is_in_scaled_space(tmp_path: Path) -> None:
    t, s = tensors(), 0.3
    config = {**V6, "architecture": "topk", "k": K, "normalize_activations": "expected_average_only_in"}
    scaler = {"activation_scaler.json": {"scaling_factor": s, "has_whitening": False}}
    path = write(tmp_path, {**config, "rescale_acts_by_decoder_norm": False}, FOUR, **scaler)
    sae = import_sae(path)
    assert sae.input_scale == s
    acts = topk((t["x"] * s - t["b_dec"]) @ t["W_enc"] + t["b_enc"], K)
    close((sae.encode(t["x"]).to_dense(), sae(t["x"])), acts, (acts @ t["W_dec"] + t["b_dec"]) / s)
    (path / "activation_scaler.json").unlink()
    with pytest.warns(UserWarning, match="taken as already folded"):
        assert import_sae(path).input_scale == 1.0


def test_whitened_checkpoint(tmp_path: Path) -> None:
    t = tensors()
    matrix, mean = torch.eye(D) * 2 + torch.ones(D, D) * 0.3, torch.arange(D) * 0.1
    stored = {"mean": mean, "matrix": matrix, "inverse_matrix": matrix.inverse()}
    config = {**V6, "architecture": "standard", "normalize_activations": "covariance_whitening"}
    files = {
        "activation_scaler.json": {"scaling_factor": None, "has_whitening": True},
        "activation_whitening.safetensors": stored,
    }
    read = read_checkpoint(write(tmp_path, config, FOUR, **files))
    acts = (((t["x"] - mean) @ matrix - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
    close(read.dense(t["x"]), acts, (acts @ t["W_dec"] + t["b_dec"]) @ matrix.inverse() + mean)


@pytest.mark.parametrize("kind", ["batchtopk", "matryoshka_batchtopk"])
def test_batchtopk_checkpoint_and_final(tmp_path: Path, kind: str) -> None:
    t = tensors()
    norms = t["W_dec"].norm(dim=1)
    config = {**V6, "architecture": kind, "k": 4.0, "rescale_acts_by_decoder_norm": True}
    extra = {"topk_threshold": torch.tensor(0.7, dtype=torch.float64)}
    read = read_checkpoint(write(tmp_path / "c", config, FOUR, extra))
    z = ((t["x"] - t["b_dec"]) @ t["W_enc"] + t["b_enc"]) * norms
    acts = z * (z > 0.7)
    close(read.dense(t["x"]), acts, acts / norms @ t["W_dec"] + t["b_dec"])
    assert read.k == 4
    metadata = {**V6["metadata"], "training_architecture": kind, "training_architecture_details": {"k": 4.0}}
    final = {**V6, "architecture": "jumprelu", "metadata": metadata}
    assert read_checkpoint(write(tmp_path / "f", final, FOUR, {"threshold": torch.full((M,), 0.7)})).batch_topk
    plain = {**V6, "architecture": "jumprelu"}
    assert not read_checkpoint(write(tmp_path / "p", plain, FOUR, {"threshold": torch.full((M,), 0.7)})).batch_topk


def test_flat_configs_of_before_version_6(tmp_path: Path) -> None:
    t = tensors()
    z = (t["x"] - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    flat = {"d_in": D, "d_sae": M, "hook_point": "blocks.0.hook_mlp_out", "activation_fn_str": "relu"}
    read = read_checkpoint(write(tmp_path / "r", flat, FOUR))
    close(read.dense(t["x"]), z.relu(), z.relu() @ t["W_dec"] + t["b_dec"])
    assert read.meta["hook_name"] == "blocks.0.hook_mlp_out"
    flat_topk = {**flat, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "normalize_activations": False}
    close(
        read_checkpoint(write(tmp_path / "t", flat_topk, FOUR)).dense(t["x"]),
        topk(z, K),
        topk(z, K) @ t["W_dec"] + t["b_dec"],
    )
    factor = torch.linspace(0.5, 2, M)
    tuned = write(tmp_path / "f", {**flat, "finetuning_scaling_factor": True}, FOUR, {"scaling_factor": factor})
    close(read_checkpoint(tuned).dense(t["x"]), z.relu(), (z.relu() * factor) @ t["W_dec"] + t["b_dec"])
    with pytest.raises(FormatError, match="'tanh-relu' has no counterpart"):
        read_checkpoint(write(tmp_path / "h", {**flat, "activation_fn_str": "tanh-relu"}, FOUR))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "matching_pursuit"}, "'matching_pursuit' is none of standard"),
        ({"architecture": "standard", "normalize_activations": "layer_norm"}, "layer_norm scales every token"),
        ({"architecture": "standard", "normalize_activations": "constant_norm_rescale"}, "cannot be folded"),
        ({"architecture": "topk"}, "needs 'k', got None"),
    ],
)
def test_what_cannot_be_represented(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read_checkpoint(write(tmp_path, {**V6, **change}, FOUR))
