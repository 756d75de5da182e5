"""dictionary_learning: a folder with ``ae.pt`` (a pickled state dict) and ``config.json``.

``config.json`` names the class. Traps it minds:

* BatchTopK and Matryoshka use a threshold at inference; -1 means that training was too short to have one, and then
  every positive pre-activation is on.
* JumpReLU subtracts nothing from its input.
* ``AutoEncoder`` and ``AutoEncoderNew`` differ in where the decoder bias lives and whether it is subtracted.
* An ``ae.pt`` left by an interrupted run is a backup with optimiser state, in scaled units.
"""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from saelab.core.artifacts import atomic_writer, write_json
from saelab.core.errors import FormatError
from saelab.sae.formats.files import Weights, load_pickle, make_folder, read_settings
from saelab.sae.formats.portable import Portable

CONFIG, WEIGHTS = "config.json", "ae.pt"

_WRITTEN = {
    "topk": "AutoEncoderTopK",
    "jumprelu": "JumpReluAutoEncoder",
    "relu": "AutoEncoder",
    "gated": "GatedAutoEncoder",
}


def detect(path: Path) -> bool:
    """Return whether this looks like a dictionary_learning folder."""
    return (path / WEIGHTS).is_file()


def read(path: Path) -> Portable:
    """Read the folder of one trainer."""
    config = read_settings(path / CONFIG)
    trainer = config.get("trainer")
    if not isinstance(trainer, dict) or not isinstance(trainer.get("dict_class"), str):
        raise FormatError(f"{path / CONFIG} does not name trainer.dict_class; it is not of a dictionary_learning run")
    state = load_pickle(path / WEIGHTS)
    scale = 1.0
    if isinstance(state.get("ae"), dict) and "optimizer" in state:  # a backup: unfolded, with its factor
        scale = 1.0 / float(state.get("norm_factor") or 1.0)
        state = state["ae"]
    weights, name = Weights(path / WEIGHTS, state), trainer["dict_class"]
    readers = {
        "AutoEncoder": _autoencoder,
        "AutoEncoderNew": _autoencoder_new,
        "GatedAutoEncoder": _gated,
        "JumpReluAutoEncoder": _jumprelu,
        "AutoEncoderTopK": _topk,
        "BatchTopKSAE": _batch_topk,
        "MatryoshkaBatchTopKSAE": _batch_topk,
    }
    if name not in readers:
        raise FormatError(f"{path / CONFIG}: dict_class '{name}' is none of {', '.join(readers)}")
    keys = ("lm_name", "submodule_name", "layer")
    meta = {"format": "dictionary_learning", **{key: trainer[key] for key in keys if trainer.get(key) is not None}}
    return replace(readers[name](weights), input_scale=scale, meta=meta)


def write(sae: Portable, folder: Path) -> None:
    """Write the folder of one trainer; the scale is folded into biases and thresholds."""
    if sae.transcoder:
        raise FormatError("dictionary_learning has no transcoders; export a transcoder to the sparsify format")
    name = _WRITTEN[sae.kind]
    if sae.batch_topk:
        name = "MatryoshkaBatchTopKSAE" if sae.prefixes else "BatchTopKSAE"
    sae = sae.with_centered(name != "JumpReluAutoEncoder").with_scale_in_biases()
    k = None if sae.k is None else max(1, round(sae.k))
    trainer = {"dict_class": name, "activation_dim": sae.d_in, "dict_size": sae.d_sae, "k": k}
    make_folder(folder)
    with atomic_writer(folder / WEIGHTS) as file:
        torch.save({key: tensor.contiguous() for key, tensor in _state(sae, name, k).items()}, file)
    write_json(folder / CONFIG, {"trainer": {key: value for key, value in trainer.items() if value is not None}})


def _state(sae: Portable, name: str, k: int | None) -> dict[str, torch.Tensor]:
    """Return the state dict of a class."""
    square = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    if name == "JumpReluAutoEncoder":
        assert sae.threshold is not None
        return {**square, "threshold": sae.threshold}
    linear = {"encoder.weight": sae.W_enc.T, "decoder.weight": sae.W_dec.T}
    if name == "GatedAutoEncoder":
        assert sae.b_mag is not None
        assert sae.r_mag is not None
        biases = {"decoder_bias": sae.b_dec, "gate_bias": sae.b_enc, "mag_bias": sae.b_mag}
        return {**linear, **biases, "r_mag": sae.r_mag}
    if name == "AutoEncoder":
        return {**linear, "bias": sae.b_dec, "encoder.bias": sae.b_enc}
    threshold = torch.tensor(-1.0) if sae.threshold is None else sae.threshold[0].clone()
    numbers = {"k": torch.tensor(k, dtype=torch.int32), "threshold": threshold}
    if sae.prefixes:
        return {**square, **numbers, "group_sizes": torch.tensor(sae.prefixes).diff(prepend=torch.tensor([0]))}
    return {**linear, "b_dec": sae.b_dec, "encoder.bias": sae.b_enc, **numbers}


def _linear(weights: Weights) -> dict[str, Any]:
    w_enc = weights.matrix("encoder.weight", transposed=True)
    return {"W_enc": w_enc, "W_dec": weights.decoder("decoder.weight", w_enc, transposed=True)}


def _autoencoder(weights: Weights) -> Portable:
    pair = _linear(weights)
    d_in, d_sae = pair["W_enc"].shape
    return Portable("relu", b_enc=weights.vector("encoder.bias", d_sae), b_dec=weights.vector("bias", d_in), **pair)


def _autoencoder_new(weights: Weights) -> Portable:
    pair = _linear(weights)
    d_in, d_sae = pair["W_enc"].shape
    b_dec = weights.vector("decoder.bias", d_in)
    return Portable("relu", b_enc=weights.vector("encoder.bias", d_sae), b_dec=b_dec, centered=False, **pair)


def _gated(weights: Weights) -> Portable:
    pair = _linear(weights)
    d_in, d_sae = pair["W_enc"].shape
    return Portable(
        "gated",
        b_enc=weights.vector("gate_bias", d_sae),
        b_mag=weights.vector("mag_bias", d_sae),
        r_mag=weights.vector("r_mag", d_sae),
        b_dec=weights.vector("decoder_bias", d_in),
        **pair,
    )


def _jumprelu(weights: Weights) -> Portable:
    w_enc = weights.matrix("W_enc")
    d_in, d_sae = w_enc.shape
    return Portable(
        "jumprelu",
        W_enc=w_enc,
        b_enc=weights.vector("b_enc", d_sae),
        W_dec=weights.decoder("W_dec", w_enc, transposed=False),
        b_dec=weights.vector("b_dec", d_in),
        threshold=weights.vector("threshold", d_sae),
        centered=False,
    )


def _topk(weights: Weights) -> Portable:
    pair = _linear(weights)
    d_in, d_sae = pair["W_enc"].shape
    b_enc, b_dec = weights.vector("encoder.bias", d_sae), weights.vector("b_dec", d_in)
    return Portable("topk", b_enc=b_enc, b_dec=b_dec, k=int(weights.number("k")), **pair)


def _batch_topk(weights: Weights) -> Portable:
    if "W_enc" in weights:
        w_enc = weights.matrix("W_enc")
        pair: dict[str, Any] = {"W_enc": w_enc, "W_dec": weights.decoder("W_dec", w_enc, transposed=False)}
        b_enc = weights.vector("b_enc", w_enc.shape[1])
    else:
        pair = _linear(weights)
        b_enc = weights.vector("encoder.bias", pair["W_enc"].shape[1])
    d_in, d_sae = pair["W_enc"].shape
    b_dec, threshold = weights.vector("b_dec", d_in), weights.number("threshold")
    if threshold < 0:
        warnings.warn(
            f"{weights.path}: the threshold is {threshold:g}, which means that training never measured it; as in "
            f"dictionary_learning every positive pre-activation is on (k = {int(weights.number('k'))} is not kept)",
            stacklevel=2,
        )
        return Portable("relu", b_enc=b_enc, b_dec=b_dec, **pair)
    prefixes = tuple(weights.tensors["group_sizes"].cumsum(0).tolist()) if "group_sizes" in weights else None
    rest: dict[str, Any] = {
        "threshold": weights.vector("threshold", d_sae),
        "k": weights.number("k"),
        "prefixes": prefixes,
    }
    return Portable("jumprelu", b_enc=b_enc, b_dec=b_dec, **rest, **pair)
