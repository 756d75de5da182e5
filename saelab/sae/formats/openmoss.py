"""OpenMOSS (Llamascopium, Language-Model-SAEs): ``config.json`` with ``sae_weights.safetensors`` (or ``.pt``), and the
older Llama-Scope layout, ``hyperparams.json`` with ``checkpoints/final.safetensors``.

Nothing is subtracted from the input. ``norm_activation = dataset-wise`` multiplies it by sqrt(d) / average norm, which
is kept as the input scale, so thresholds stay in the units they were trained in. ``inference`` means that OpenMOSS has
folded that factor itself; it divides the biases and leaves JumpReLU thresholds as they were, so such a file is read
as it is, with a warning. ``sparsity_include_decoder_norm`` compares ``z ||W_dec||``.
"""  # noqa: D205

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from saelab.core.artifacts import read_safetensors, write_json, write_safetensors
from saelab.core.errors import FormatError
from saelab.sae.formats.files import Weights, load_pickle, make_folder, read_settings
from saelab.sae.formats.portable import MIN_NORM, Kind, Portable

CONFIG, WEIGHTS, PICKLE = "config.json", "sae_weights.safetensors", "sae_weights.pt"
OLD_CONFIG, OLD_WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
LOG_THRESHOLD = "activation_function.log_jumprelu_threshold"
AVERAGE_NORM = "dataset_average_activation_norm"


def detect(path: Path) -> bool:
    """Return whether this looks like an OpenMOSS folder."""
    current = (path / CONFIG).is_file() and ((path / WEIGHTS).is_file() or (path / PICKLE).is_file())
    return current or ((path / OLD_CONFIG).is_file() and (path / OLD_WEIGHTS).is_file())


def read(path: Path) -> Portable:
    """Read a folder of either layout."""
    return _read_old(path) if (path / OLD_CONFIG).is_file() else _read_current(path)


def write(sae: Portable, folder: Path) -> None:
    """Write the current layout in its ``inference`` form: the scale is folded into biases and thresholds."""
    if sae.kind == "gated" or sae.transcoder:
        raise FormatError(f"the OpenMOSS export holds topk, jumprelu and relu SAEs, this is {sae.architecture}")
    sae = sae.with_centered(False).with_scale_in_biases()
    tensors = {"W_E": sae.W_enc, "b_E": sae.b_enc, "W_D": sae.W_dec, "b_D": sae.b_dec}
    if sae.threshold is not None:
        if (sae.threshold < 0).any():
            raise FormatError("OpenMOSS stores the logarithm of thresholds, and this SAE has negative ones")
        tensors[LOG_THRESHOLD] = sae.threshold.log()
    hook = str(sae.meta.get("hook_name", "unknown"))
    make_folder(folder)
    write_safetensors(folder / WEIGHTS, tensors)
    config = {
        "sae_type": "sae",
        "d_model": sae.d_in,
        "expansion_factor": sae.d_sae / sae.d_in,
        "use_decoder_bias": True,
        "act_fn": sae.kind,
        "norm_activation": "inference",
        "sparsity_include_decoder_norm": False,
        "top_k": round(sae.k or 50),
        "hook_point_in": hook,
        "hook_point_out": hook,
        "use_glu_encoder": False,
        "dtype": "torch.float32",
        "device": "cpu",
    }
    write_json(folder / CONFIG, config)


def _read_current(path: Path) -> Portable:
    config = read_settings(path / CONFIG)
    kind = _kind(path / CONFIG, config)
    safe = (path / WEIGHTS).is_file()
    weights = Weights(path / WEIGHTS, read_safetensors(path / WEIGHTS)) if safe else _pickled(path / PICKLE)
    w_enc = weights.matrix("W_E")
    d_in, d_sae = w_enc.shape
    w_dec = weights.decoder("W_D", w_enc, transposed=False)
    sae = Portable(
        kind=kind,
        W_enc=w_enc,
        b_enc=weights.vector("b_E", d_sae),
        W_dec=w_dec,
        b_dec=weights.vector("b_D", d_in) if "b_D" in weights else torch.zeros(d_in),
        k=int(config["top_k"]) if kind == "topk" else None,
        threshold=weights.vector(LOG_THRESHOLD, d_sae).exp() if kind == "jumprelu" else None,
        centered=False,
        meta={"format": "openmoss", "hook_name": config.get("hook_point_in")},
    )
    if config.get("sparsity_include_decoder_norm", True):
        sae = _compare_with_norms(sae)
    return replace(sae, input_scale=_scale(path, config, weights, d_in, kind))


def _kind(path: Path, config: dict[str, Any]) -> Kind:
    """Return the activation, or say what about this file is not an SAE saelab knows."""
    act_fn = config.get("act_fn", "relu")
    kinds: dict[str, Kind] = {"relu": "relu", "jumprelu": "jumprelu", "topk": "topk"}
    if config.get("sae_type", "sae") != "sae":
        raise FormatError(f"{path}: sae_type '{config['sae_type']}' is not an autoencoder of one site")
    if config.get("use_glu_encoder"):
        raise FormatError(f"{path}: use_glu_encoder multiplies the encoder by a sigmoid gate, which has no counterpart")
    if config.get("hook_point_in") != config.get("hook_point_out"):
        raise FormatError(
            f"{path}: it maps {config.get('hook_point_in')} to {config.get('hook_point_out')}; OpenMOSS transcoders "
            "are not imported"
        )
    if act_fn not in kinds:
        raise FormatError(f"{path}: act_fn '{act_fn}' has no form for single tokens, expected {', '.join(kinds)}")
    return kinds[act_fn]


def _compare_with_norms(sae: Portable) -> Portable:
    """Threshold or rank ``z ||W_dec||`` as the file does.

    A threshold is divided by the norm, which leaves activations as they are; a ranking needs the norms in the
    encoder, which multiplies activations by them.
    """
    if sae.kind == "jumprelu" and sae.threshold is not None:
        norms = sae.W_dec.double().norm(dim=1).clamp(min=MIN_NORM)
        return replace(sae, threshold=(sae.threshold.double() / norms).float())
    return sae.with_decoder_norms_folded() if sae.kind == "topk" else sae


def _scale(path: Path, config: dict[str, Any], weights: Weights, d_in: int, kind: Kind) -> float:
    mode = config.get("norm_activation", "dataset-wise")
    if mode == "dataset-wise":
        norm = weights.number(f"{AVERAGE_NORM}.{config.get('hook_point_in')}")
        if not (math.isfinite(norm) and norm > 0):
            raise FormatError(f"{path}: {AVERAGE_NORM} is {norm:g}, so it was never set; the input scale is lost")
        return math.sqrt(d_in) / norm
    if mode != "inference":
        raise FormatError(
            f"{path / CONFIG}: norm_activation = {mode} scales tokens or batches by themselves, which cannot be folded"
        )
    if kind == "jumprelu":
        warnings.warn(
            f"{path}: OpenMOSS folds the input scale into biases but not into JumpReLU thresholds; they are taken as "
            "they are, as OpenMOSS does (import the dataset-wise checkpoint if there is one)",
            stacklevel=2,
        )
    return 1.0


def _pickled(path: Path) -> Weights:
    state = load_pickle(path)
    return Weights(path, state["sae"] if isinstance(state.get("sae"), dict) else state)


def _read_old(path: Path) -> Portable:
    """Llama-Scope: one threshold for all features, in raw units."""
    config = read_settings(path / OLD_CONFIG)
    weights = Weights(path / OLD_WEIGHTS, read_safetensors(path / OLD_WEIGHTS))
    w_enc = weights.matrix("encoder.weight", transposed=True)
    d_in, d_sae = w_enc.shape
    norm = (config.get(AVERAGE_NORM) or {}).get("in")
    if not isinstance(norm, int | float) or norm <= 0 or not isinstance(config.get("jump_relu_threshold"), int | float):
        raise FormatError(
            f"{path / OLD_CONFIG} needs {AVERAGE_NORM}.in and jump_relu_threshold, as Llama-Scope has them"
        )
    scale = math.sqrt(d_in) / norm
    return Portable(
        kind="jumprelu",
        W_enc=w_enc,
        b_enc=weights.vector("encoder.bias", d_sae),
        W_dec=weights.decoder("decoder.weight", w_enc, transposed=True),
        b_dec=weights.vector("decoder.bias", d_in) if "decoder.bias" in weights else torch.zeros(d_in),
        threshold=torch.full((d_sae,), config["jump_relu_threshold"] * scale),
        centered=False,
        input_scale=scale,
        meta={"format": "openmoss", "hook_name": config.get("hook_point_in")},
    )
