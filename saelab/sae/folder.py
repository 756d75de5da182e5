"""An SAE on disk: a folder with ``config.json``, ``weights.safetensors``, ``meta.json`` and ``manifest.json``.

Tensors are ``W_enc (d_in, d_sae)``, ``b_enc``, ``W_dec (d_sae, d_out)``, ``b_dec`` and what the architecture adds. The
manifest, written last, holds the checksum of the weights.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saelab.core.artifacts import (
    MANIFEST,
    file_checksum,
    output_error,
    read_json,
    read_manifest,
    read_safetensors,
    write_json,
    write_manifest,
    write_safetensors,
)
from saelab.core.config import parse_config
from saelab.core.errors import ConfigError, CorruptError, FormatError, nearest
from saelab.core.named import opened
from saelab.sae.base import SAE
from saelab.sae.registry import ARCHITECTURES, build_sae

if TYPE_CHECKING:
    from saelab.sae.formats.portable import Portable

CONFIG, WEIGHTS, META = "config.json", "weights.safetensors", "meta.json"
KIND = "sae"


def save_sae(sae: SAE, folder: str | Path, meta: Mapping[str, Any] | None = None) -> None:
    """Write an SAE folder; each file is written atomically and the manifest last.

    ``meta`` is JSON-able: what the SAE was trained on, final metrics, and whatever a reader should know.
    Raises :class:`OutputError`.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)  # while files change, the folder is not complete
    except OSError as error:
        raise output_error(folder, error) from error
    write_json(folder / CONFIG, sae.config.model_dump(mode="json"))
    write_safetensors(folder / WEIGHTS, sae.tensors())
    write_json(folder / META, dict(meta or {}))
    write_manifest(
        folder,
        KIND,
        {
            "architecture": sae.config.architecture,
            "d_in": sae.d_in,
            "d_sae": sae.d_sae,
            "input_scale": sae.input_scale,
            "checksums": {WEIGHTS: file_checksum(folder / WEIGHTS)},
        },
    )


def load_sae(folder: str | Path | SAE, device: str = "cpu") -> SAE:
    """Load an SAE folder, in evaluation mode and without gradients.

    A checkpoint of another library (SAELens, sparsify, dictionary_learning, OpenMOSS, OpenAI; folder or file) is loaded
    as :func:`saelab.sae.formats.import_sae` does: the format is found out, and the SAE takes raw activations.

    An SAE that is loaded already is returned as it is.

    Raises :class:`MissingFileError`, :class:`FormatError` (another kind of folder or a pickle), :class:`CorruptError`
    (weights that are not the ones written) or :class:`ConfigError` (an architecture this version does not know).
    """
    thing = opened(folder)
    if isinstance(thing, SAE):
        return thing
    assert not isinstance(folder, SAE)
    folder = Path(folder)
    if _is_foreign(folder):
        return _at_its_site(_foreign(folder).to_sae(device), folder)
    manifest = read_manifest(folder, KIND)
    data = read_json(folder / CONFIG)
    name = data.get("architecture") if isinstance(data, dict) else None
    if not isinstance(name, str):
        raise FormatError(f"{folder / CONFIG} does not name an architecture; it is not the config of a saelab SAE")
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ConfigError(
            f"{folder / CONFIG}: unknown architecture '{name}'{nearest(name, ARCHITECTURES)} (known: {known})"
        )
    config = parse_config(ARCHITECTURES[name].config, data, str(folder / CONFIG))
    tensors = read_safetensors(folder / WEIGHTS, device)
    if file_checksum(folder / WEIGHTS) != manifest.get("checksums", {}).get(WEIGHTS):
        raise CorruptError(f"{folder / WEIGHTS} is not what was written (checksum differs); copy or make it again")
    sae = build_sae(config, seed=None).to(device)
    _check_tensors(folder / WEIGHTS, sae.tensors(), tensors)
    sae.load_tensors(tensors)
    return _at_its_site(sae.eval().requires_grad_(False), folder)


def _at_its_site(sae: SAE, folder: Path) -> SAE:
    """Write down where the SAE belongs, as far as the folder says."""
    sae.folder = folder
    trained = load_meta(folder).get("provenance", {}) if _is_foreign(folder) or (folder / META).is_file() else {}
    sae.site, sae.target_site = trained.get("site"), trained.get("target_site")
    return sae


def load_meta(folder: str | Path) -> dict[str, Any]:
    """Return ``meta.json`` of an SAE folder; of another library's checkpoint, what its files say about it.

    Of an SAE that was made in memory nothing is recorded: {}.
    """
    thing = opened(folder)
    if isinstance(thing, SAE) and thing.folder is None:
        return {}
    if _is_foreign(Path(folder)):
        found = _foreign(Path(folder)).meta
        # SAELens names sites as saelab does; the others name modules.
        site = found.get("hook_name") if found.get("format") == "saelens" else None
        return {"imported": {**found, "path": str(folder)}, "provenance": {"site": site} if site else {}}
    read_manifest(folder, KIND)
    data = read_json(Path(folder) / META)
    if not isinstance(data, dict):
        raise CorruptError(f"{Path(folder) / META} must hold a mapping; make the folder again")
    return data


def _is_foreign(path: Path) -> bool:
    """Whether a path that exists is no folder of saelab's, whole or half-written."""
    return path.exists() and not ((path / MANIFEST).exists() or (path / WEIGHTS).exists())


def _foreign(path: Path) -> "Portable":
    """Read another library's checkpoint; one line says why it cannot be."""
    from saelab.sae.formats import read_checkpoint
    from saelab.sae.formats.files import PICKLES, load_pickle

    try:
        return read_checkpoint(path)
    except FormatError:
        if path.is_file() and path.suffix in PICKLES:
            load_pickle(path)  # says so if it is a pickle of more than tensors
        raise


def _check_tensors(path: Path, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        if name not in found:
            raise FormatError(f"{path} has no tensor '{name}'; it holds {', '.join(sorted(found)) or 'nothing'}")
        if found[name].shape != tensor.shape:
            raise FormatError(
                f"{path}: tensor '{name}' has shape {tuple(found[name].shape)}, its config says {tuple(tensor.shape)}"
            )
        if not torch.is_floating_point(found[name]) and torch.is_floating_point(tensor):
            raise FormatError(f"{path}: tensor '{name}' is {found[name].dtype}, expected floating point")
    if extra := sorted(found.keys() - expected.keys()):
        raise FormatError(f"{path} has unknown tensors: {', '.join(extra)}")
