"""SAELens: a folder with ``cfg.json`` and ``sae_weights.safetensors``, current (6) and older (flat) configs.

Read: ``standard``, ``topk``, ``jumprelu``, ``gated``, the final form of BatchTopK and Matryoshka (a JumpReLU), and
training checkpoints of all of these. Traps it minds:

* ``rescale_acts_by_decoder_norm`` stays true in final files whose decoder is already folded: the norms are folded
  whatever they are, which is then a no-op up to rounding.
* Checkpoints on the way are in scaled space, and the factor is only in ``activation_scaler.json`` beside them.
* BatchTopK checkpoints hold one float64 ``topk_threshold`` in norm-rescaled units.
* Old JumpReLU files hold ``log_threshold``.
"""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from saelab.core.artifacts import read_safetensors, write_json, write_safetensors
from saelab.core.errors import FormatError
from saelab.sae.formats.files import Weights, make_folder, read_settings
from saelab.sae.formats.portable import Portable

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
SCALER, WHITENING = "activation_scaler.json", "activation_whitening.safetensors"
WRITTEN_VERSION = "6.0.0"
"""Version of SAELens whose layout is written; older ones would be read as flat configs."""

_BATCH_KINDS = ("batchtopk", "matryoshka_batchtopk")
_KNOWN = ("standard", "topk", "jumprelu", "gated", *_BATCH_KINDS)
_NAMES = {"topk": "topk", "jumprelu": "jumprelu", "relu": "standard", "gated": "gated"}


def detect(path: Path) -> bool:
    """Return whether this looks like a SAELens folder."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def read(path: Path) -> Portable:
    """Read a SAELens folder."""
    config = _current(read_settings(path / CONFIG))
    weights = Weights(path / WEIGHTS, read_safetensors(path / WEIGHTS))
    architecture = config["architecture"]
    if architecture not in _KNOWN:
        raise FormatError(f"{path / CONFIG}: SAELens architecture '{architecture}' is none of {', '.join(_KNOWN)}")
    w_enc = weights.matrix("W_enc")
    d_in, d_sae = w_enc.shape
    common: dict[str, Any] = {
        "W_enc": w_enc,
        "W_dec": weights.decoder("W_dec", w_enc, transposed=False),
        "b_dec": weights.vector("b_dec", d_in),
        "centered": bool(config.get("apply_b_dec_to_input", True)),
        "meta": {"format": "saelens", **_meta(config)},
    }
    if architecture == "gated":
        b_mag, r_mag = weights.vector("b_mag", d_sae), weights.vector("r_mag", d_sae)
        sae = Portable(kind="gated", b_enc=weights.vector("b_gate", d_sae), b_mag=b_mag, r_mag=r_mag, **common)
    elif architecture == "topk":
        k = _k(path, config)
        sae = Portable(kind="topk", b_enc=weights.vector("b_enc", d_sae), k=int(k), **common)
    elif architecture == "standard":
        sae = Portable(kind="relu", b_enc=weights.vector("b_enc", d_sae), **common)
    else:
        threshold, (k_mean, prefixes) = _threshold(weights, d_sae), _batch(config, d_sae)
        b_enc = weights.vector("b_enc", d_sae)
        sae = Portable(kind="jumprelu", b_enc=b_enc, threshold=threshold, k=k_mean, prefixes=prefixes, **common)
    if "scaling_factor" in weights and config.get("finetuning_scaling_factor"):
        sae = replace(sae, W_dec=sae.W_dec * weights.vector("scaling_factor", d_sae).unsqueeze(1))
    if architecture in ("topk", *_BATCH_KINDS) and config.get("rescale_acts_by_decoder_norm", False):
        sae = sae.with_decoder_norms_folded()
    return _with_normalization(path, config, sae)


def write(sae: Portable, folder: Path) -> None:
    """Write a final SAELens folder; the scale is folded into the weights, so activations keep their units."""
    if sae.transcoder:
        raise FormatError("SAELens transcoders are not written; export a transcoder to the sparsify format")
    sae = sae.with_scale_in_weights()
    tensors = {"W_enc": sae.W_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    config: dict[str, Any] = {
        "architecture": _NAMES[sae.kind],
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.centered,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": WRITTEN_VERSION, "sae_lens_training_version": None, **sae.meta},
    }
    if sae.kind == "gated":
        assert sae.b_mag is not None
        assert sae.r_mag is not None
        tensors |= {"b_gate": sae.b_enc, "b_mag": sae.b_mag, "r_mag": sae.r_mag}
    else:
        tensors["b_enc"] = sae.b_enc
    if sae.threshold is not None:
        tensors["threshold"] = sae.threshold
    if sae.batch_topk:
        details = {"k": sae.k} | ({"matryoshka_widths": list(sae.prefixes)} if sae.prefixes else {})
        kind = _BATCH_KINDS[1] if sae.prefixes else _BATCH_KINDS[0]
        config["metadata"] |= {"training_architecture": kind, "training_architecture_details": details}
    if sae.kind == "topk":
        assert sae.k is not None
        config |= {"k": int(sae.k), "rescale_acts_by_decoder_norm": False}
    make_folder(folder)
    write_safetensors(folder / WEIGHTS, tensors)
    write_json(folder / CONFIG, config)


def _current(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config in the layout of version 6; older ones are flat and name some things otherwise."""
    metadata = config.get("metadata") or {}
    version = config.get("sae_lens_version") or metadata.get("sae_lens_version") or "0"
    if int(str(version).split(".", maxsplit=1)[0]) >= 6:
        return config
    renamed = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}
    config = {renamed.get(key, key): value for key, value in config.items()}
    config.setdefault("architecture", "standard")
    activation = config.get("activation_fn") or "relu"
    k = (config.get("activation_fn_kwargs") or {}).get("k")
    if activation == "topk" and k is not None:
        config |= {"architecture": "topk", "k": k}
    elif activation != "relu":
        raise FormatError(f"SAELens activation function '{activation}' has no counterpart here, expected relu or topk")
    if isinstance(config.get("normalize_activations"), bool):
        config["normalize_activations"] = "expected_average_only_in" if config["normalize_activations"] else "none"
    return config


def _k(path: Path, config: dict[str, Any]) -> float:
    k = config.get("k")
    if not isinstance(k, int | float) or k < 1:
        raise FormatError(f"{path / CONFIG}: a topk SAE needs 'k', got {k!r}")
    return float(k)


def _batch(config: dict[str, Any], d_sae: int) -> tuple[float | None, tuple[int, ...] | None]:
    """Return average k and nested widths of an SAE that was trained as BatchTopK or Matryoshka, else None twice."""
    metadata = config.get("metadata") or {}
    if config["architecture"] in _BATCH_KINDS:
        details, kind = config, config["architecture"]
    else:
        details, kind = metadata.get("training_architecture_details") or {}, metadata.get("training_architecture")
    k, widths = details.get("k"), details.get("matryoshka_widths")
    if kind not in _BATCH_KINDS or not isinstance(k, int | float) or k <= 0:
        return None, None
    return float(k), tuple(sorted({*widths, d_sae})) if widths else None


def _threshold(weights: Weights, d_sae: int) -> torch.Tensor:
    if "log_threshold" in weights:
        return weights.vector("log_threshold", d_sae).exp()
    return weights.vector("topk_threshold" if "topk_threshold" in weights else "threshold", d_sae)


def _with_normalization(path: Path, config: dict[str, Any], sae: Portable) -> Portable:
    mode = config.get("normalize_activations") or "none"
    if mode in ("layer_norm", "constant_norm_rescale"):
        raise FormatError(
            f"{path / CONFIG}: normalize_activations = {mode} scales every token by itself, which cannot be folded "
            "into weights; train with expected_average_only_in"
        )
    scaler = read_settings(path / SCALER) if (path / SCALER).is_file() else {}
    if scaler.get("has_whitening") and (path / WHITENING).is_file():
        stored = read_safetensors(path / WHITENING)
        return sae.with_affine_input(stored["mean"], stored["matrix"], stored["inverse_matrix"])
    if scaler.get("scaling_factor") is not None:
        return replace(sae, input_scale=float(scaler["scaling_factor"]))
    if mode != "none":
        warnings.warn(
            f"{path}: normalize_activations = {mode} without {SCALER}; taken as already folded into the weights",
            stacklevel=2,
        )
    return sae


def _meta(config: dict[str, Any]) -> dict[str, Any]:
    """What a reader wants to know: model, site, training."""
    source = {**config, **(config.get("metadata") or {})}
    keys = ("model_name", "hook_name", "hook_head_index", "context_size", "prepend_bos", "dataset_path")
    return {key: source[key] for key in keys if source.get(key) is not None}
