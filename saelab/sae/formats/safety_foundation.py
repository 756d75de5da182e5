"""ai-safety-foundation's sparse_autoencoder: ReLU SAEs with a tied bias, ``sae_weights.safetensors`` or ``.pt``.

f = relu((x - tied_bias) encoder.weight.T + encoder.bias) ;  x_hat = f decoder.weight.T + tied_bias
"""

from pathlib import Path

from saelab.core.artifacts import read_safetensors
from saelab.core.errors import CorruptError, FormatError, MissingFileError
from saelab.sae.formats.files import Weights, load_pickle
from saelab.sae.formats.portable import Portable

NAMES = ("sae_weights.safetensors", "sparse_autoencoder.safetensors", "sparse_autoencoder.pt")


def detect(path: Path) -> bool:
    """Return whether this looks like one of its files, or a folder with one."""
    try:
        return "tied_bias" in _weights(path)
    except (CorruptError, FormatError, MissingFileError):
        return False


def read(path: Path) -> Portable:
    """Read a file, or a folder with one."""
    weights = _weights(path)
    w_enc = weights.matrix("encoder.weight", transposed=True)
    d_in, d_sae = w_enc.shape
    return Portable(
        kind="relu",
        W_enc=w_enc,
        b_enc=weights.vector("encoder.bias", d_sae),
        W_dec=weights.decoder("decoder.weight", w_enc, transposed=True),
        b_dec=weights.vector("tied_bias", d_in),
        meta={"format": "ai-safety-foundation"},
    )


def _weights(path: Path) -> Weights:
    files = [path / name for name in NAMES if (path / name).is_file()] if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise MissingFileError(f"{path} holds none of {', '.join(NAMES)}")
    file = files[0]
    return Weights(file, load_pickle(file) if file.suffix == ".pt" else read_safetensors(file))
