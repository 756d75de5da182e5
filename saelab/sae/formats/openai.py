"""OpenAI's sparse_autoencoder: one torch pickle per SAE, tensors beside the name of the activation function.

``pre_bias`` is both subtracted from the input and added to the output. TopK files (version 5 on) also normalise every
token to mean 0 and standard deviation 1 and undo it on the reconstruction: a per-token map that no weights can hold.
"""

from pathlib import Path
from typing import Any

import torch

from saelab.core.artifacts import atomic_writer
from saelab.core.errors import FormatError
from saelab.sae.formats.files import Weights, load_pickle, make_folder
from saelab.sae.formats.portable import Portable

WRITTEN = "autoencoder.pt"


def detect(path: Path) -> bool:
    """Return whether this looks like one of OpenAI's files."""
    file = path / WRITTEN if path.is_dir() else path
    if not file.is_file() or file.suffix != ".pt":
        return False
    try:
        return {"pre_bias", "latent_bias"} <= load_pickle(file).keys()
    except FormatError:
        return False


def read(path: Path) -> Portable:
    """Read a file, or the folder that :func:`write` made."""
    file = path / WRITTEN if path.is_dir() else path
    state = load_pickle(file)
    activation = state.get("activation", "ReLU")
    if activation == "TopK":
        raise FormatError(
            f"{file}: OpenAI's TopK SAEs normalise each token to mean 0 and variance 1 before encoding and undo it "
            "after; that per-token map cannot be represented by a saelab SAE"
        )
    if activation != "ReLU":
        raise FormatError(f"{file}: activation '{activation}' has no counterpart here, expected ReLU")
    weights = Weights(file, state)
    w_enc = weights.matrix("encoder.weight", transposed=True)
    d_in, d_sae = w_enc.shape
    return Portable(
        kind="relu",
        W_enc=w_enc,
        b_enc=weights.vector("latent_bias", d_sae),
        W_dec=weights.decoder("decoder.weight", w_enc, transposed=True),
        b_dec=weights.vector("pre_bias", d_in),
        meta={"format": "openai"},
    )


def write(sae: Portable, folder: Path) -> None:
    """Write ``autoencoder.pt``; the scale is folded into the biases."""
    if sae.kind != "relu" or sae.transcoder:
        raise FormatError(
            f"OpenAI's format holds plain ReLU SAEs only (its TopK normalises tokens), this is {sae.kind}"
        )
    sae = sae.with_centered(True).with_scale_in_biases()
    state: dict[str, Any] = {
        "pre_bias": sae.b_dec,
        "encoder.weight": sae.W_enc.T.contiguous(),
        "latent_bias": sae.b_enc,
        "decoder.weight": sae.W_dec.T.contiguous(),
        "stats_last_nonzero": torch.zeros(sae.d_sae, dtype=torch.int64),
        "latents_activation_frequency": torch.zeros(sae.d_sae),
        "latents_mean_square": torch.zeros(sae.d_sae),
        "activation": "ReLU",
        "activation_state_dict": {},
    }
    make_folder(folder)
    with atomic_writer(folder / WRITTEN) as file:
        torch.save(state, file)
