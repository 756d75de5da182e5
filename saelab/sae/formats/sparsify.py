"""EleutherAI's sparsify: a folder with ``cfg.json`` and ``sae.safetensors``, one per hook point.

``W_dec`` is (d_sae, d_in). ReLU comes before TopK, which gives the same activations. ``num_latents = 0`` means
``d_in * expansion_factor``. A transcoder subtracts nothing from its input, and its skip path is ``x @ W_skip.T``.
"""

from pathlib import Path

from saelab.core.artifacts import read_safetensors, write_json, write_safetensors
from saelab.core.errors import FormatError
from saelab.sae.formats.files import Weights, make_folder, read_settings
from saelab.sae.formats.portable import Portable

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


def detect(path: Path) -> bool:
    """Return whether this looks like a sparsify folder."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def read(path: Path) -> Portable:
    """Read the folder of one hook point."""
    config = read_settings(path / CONFIG)
    activation = config.get("activation", "topk")
    if activation != "topk" or config.get("signed"):
        kind = "signed topk" if config.get("signed") else activation
        raise FormatError(f"{path / CONFIG}: sparsify activation '{kind}' has no counterpart here, expected topk")
    weights = Weights(path / WEIGHTS, read_safetensors(path / WEIGHTS))
    w_enc = weights.matrix("encoder.weight", transposed=True)
    d_in, d_sae = w_enc.shape
    said = int(config.get("num_latents") or 0) or d_in * int(config.get("expansion_factor", d_sae // d_in))
    if said != d_sae or config.get("d_in", d_in) != d_in:
        raise FormatError(
            f"{path}: {CONFIG} says d_in = {config.get('d_in')} and {said} latents, the weights have {d_in} and {d_sae}"
        )
    transcoder = bool(config.get("transcode"))
    return Portable(
        kind="topk",
        W_enc=w_enc,
        b_enc=weights.vector("encoder.bias", d_sae),
        W_dec=weights.decoder("W_dec", w_enc, transposed=False),
        b_dec=weights.vector("b_dec", d_in),
        k=int(config["k"]),
        W_skip=weights.matrix("W_skip", transposed=True) if "W_skip" in weights else None,
        centered=not transcoder,
        transcoder=transcoder,
        meta={"format": "sparsify", "hook_name": path.name},
    )


def write(sae: Portable, folder: Path) -> None:
    """Write the folder of one hook point; the scale is folded into the biases."""
    if sae.kind != "topk" or sae.d_in != sae.W_dec.shape[1]:
        raise FormatError(
            f"sparsify's format holds topk SAEs of equal input and output width only, this is {sae.architecture} "
            f"({sae.d_in} -> {sae.W_dec.shape[1]})"
        )
    sae = sae.with_centered(not sae.transcoder).with_scale_in_biases()
    tensors = {"encoder.weight": sae.W_enc.T, "encoder.bias": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    if sae.W_skip is not None:
        tensors["W_skip"] = sae.W_skip.T
    make_folder(folder)
    write_safetensors(folder / WEIGHTS, tensors)
    config = {
        "activation": "topk",
        "expansion_factor": max(1, sae.d_sae // sae.d_in),
        "normalize_decoder": not sae.transcoder,
        "num_latents": sae.d_sae,
        "k": int(sae.k or 0),
        "multi_topk": False,
        "skip_connection": sae.W_skip is not None,
        "transcode": sae.transcoder,
        "d_in": sae.d_in,
    }
    write_json(folder / CONFIG, config)
