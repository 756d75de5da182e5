"""A sparse model as a folder: a normal Hugging Face one, with masks, report and manifest beside the weights."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saelab.core.artifacts import read_safetensors, write_json, write_manifest, write_safetensors
from saelab.core.errors import CorruptError
from saelab.models.loading import quiet
from saelab.sparsity.layers import linear_layers
from saelab.sparsity.methods.spqr import QuantisedLayer

MASKS, EXTRAS, REPORT = "masks.safetensors", "quantised.safetensors", "sparsity.json"
_NOT_TOKENIZER = (".safetensors", ".bin", ".pt", ".index.json", ".md")
_REPLACED = {"config.json", "manifest.json", "training.json", "config.yaml", "generation_config.json", REPORT}


def write_model(
    model: Any, out: Path, masks: Mapping[str, Tensor], extras: Mapping[str, Tensor], report: Mapping[str, Any]
) -> None:
    """Write a subject model to ``out`` (an empty folder): weights, config, tokenizer, masks, report; manifest last."""
    with quiet():
        model.plain.save_pretrained(out, safe_serialization=True)
    for path in sorted(model.folder.iterdir()) if model.folder is not None else []:
        if path.is_file() and path.name not in _REPLACED and not path.name.endswith(_NOT_TOKENIZER):
            shutil.copyfile(path, out / path.name)
    if masks:
        write_masks(out, masks)
    if extras:
        write_safetensors(out / EXTRAS, extras)
    write_json(out / REPORT, report)
    write_manifest(out, "model", {"name": report["model"], "sparsity": report["sparsity"], "recipe": report["recipe"]})


def write_masks(folder: Path, masks: Mapping[str, Tensor]) -> None:
    """Write masks, one bit per weight, beside a model (or an SAE)."""
    packed = {name: torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1))) for name, mask in masks.items()}
    shapes = json.dumps({name: list(mask.shape) for name, mask in masks.items()})
    write_safetensors(folder / MASKS, packed, {"shapes": shapes})


def load_masks(folder: str | Path) -> dict[str, Tensor]:
    """Read the masks of a folder: True where a weight stays, (out, in) by layer. Raises :class:`CorruptError`."""
    from safetensors import safe_open

    path = Path(folder) / MASKS
    packed = read_safetensors(path)
    with safe_open(path, "pt") as file:
        shapes = json.loads((file.metadata() or {}).get("shapes", "{}"))
    if set(shapes) != set(packed):
        raise CorruptError(f"{path} does not say the shapes of its masks; make the folder again")
    found = {}
    for name, bits in packed.items():
        rows, columns = shapes[name]
        flat = np.unpackbits(bits.numpy(), count=rows * columns)
        found[name] = torch.from_numpy(flat.astype(bool)).view(rows, columns)
    return found


def load_quantised(folder: str | Path) -> dict[str, QuantisedLayer]:
    """Read the quantised layers of a folder, by layer. Raises :class:`CorruptError`."""
    stored = read_safetensors(Path(folder) / EXTRAS)
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in stored.items():
        layer, _, part = name.rpartition(".")
        layers.setdefault(layer, {})[part] = value
    return {layer: QuantisedLayer.from_tensors(parts) for layer, parts in layers.items()}


def check_masks(model: Any, masks: Mapping[str, Tensor]) -> list[str]:
    """Return the names of layers that hold a weight where their mask says there is none."""
    layers = {layer.name: layer for layer in linear_layers(model.plain)}
    return [name for name, mask in masks.items() if bool((layers[name].weight.cpu()[~mask] != 0).any())]
