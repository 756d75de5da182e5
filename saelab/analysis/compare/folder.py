"""A comparison on disk: ``comparison.json`` (summaries), ``arrays.npz`` (per feature), ``report.html``, manifest."""

import io
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from saelab.analysis.compare.baseline import Baseline
from saelab.analysis.compare.lasso import OneToMany
from saelab.analysis.compare.matching import Matching
from saelab.analysis.compare.result import Comparison, SideInfo
from saelab.analysis.compare.spectral import Cluster
from saelab.analysis.compare.splitting import Splitting
from saelab.core.artifacts import (
    atomic_writer,
    file_checksum,
    prepare_output,
    read_json,
    read_manifest,
    write_json,
    write_manifest,
)
from saelab.core.errors import CorruptError

KIND = "comparison"
DATA, ARRAYS, REPORT = "comparison.json", "arrays.npz", "report.html"
_PARTS: dict[str, type] = {
    "decoders": Matching,
    "activations": Matching,
    "decoder_baseline": Baseline,
    "activation_baseline": Baseline,
    "b_from_a": OneToMany,
    "a_from_b": OneToMany,
    "splitting": Splitting,
}


def save_comparison(comparison: Comparison, folder: str | Path, *, force: bool = False) -> Path:
    """Write a comparison folder and return its path. Raises :class:`OutputExistsError`, :class:`OutputError`."""
    from saelab.analysis.compare.report import report

    folder = prepare_output(folder, force=force)
    arrays: dict[str, np.ndarray] = {f"pairs.{name}": values for name, values in comparison.pairs.items()}
    plain = {name: _pack(name, getattr(comparison, name), arrays) for name in _PARTS}
    if comparison.clusters is not None:
        for name in ("a", "b", "canonical", "angles"):
            _pack_ragged(f"clusters.{name}", [getattr(cluster, name) for cluster in comparison.clusters], arrays)
    summary = comparison.to_dict()
    write_json(folder / DATA, {"summary": summary, "parts": plain, "clusters": comparison.clusters is not None})
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    with atomic_writer(folder / ARRAYS) as file:
        file.write(buffer.getvalue())
    with atomic_writer(folder / REPORT) as file:
        file.write(report(comparison).encode())
    headline = {
        "a": comparison.a.name,
        "b": comparison.b.name,
        "features_a": comparison.a.n_features,
        "features_b": comparison.b.n_features,
        "n_tokens": comparison.n_tokens,
        "matched_cosine": None if comparison.decoders is None else summary["decoders"]["mean_matched"],
        "matched_correlation": None if comparison.activations is None else summary["activations"]["mean_matched"],
    }
    checksums = {name: file_checksum(folder / name) for name in (DATA, ARRAYS)}
    write_manifest(folder, KIND, {**headline, "checksums": checksums})
    return folder


def load_comparison(folder: str | Path) -> Comparison:
    """Read what :func:`save_comparison` wrote. Raises :class:`CorruptError` for a file that is not what was written."""
    folder = Path(folder)
    manifest = read_manifest(folder, KIND)
    for name in (DATA, ARRAYS):
        if not (folder / name).is_file() or file_checksum(folder / name) != manifest["checksums"].get(name):
            raise CorruptError(f"{folder / name} is missing or not what was written; compare again")
    data = read_json(folder / DATA)
    with np.load(folder / ARRAYS, allow_pickle=False) as file:
        arrays = dict(file)
    summary = data["summary"]
    found = None
    if data["clusters"]:
        columns = [_unpack_ragged(f"clusters.{name}", arrays) for name in ("a", "b", "canonical", "angles")]
        found = tuple(Cluster(*row) for row in zip(*columns, strict=True))
    return Comparison(
        a=SideInfo(**summary["a"]),
        b=SideInfo(**summary["b"]),
        pairs={name.removeprefix("pairs."): values for name, values in arrays.items() if name.startswith("pairs.")},
        clusters=found,
        n_tokens=summary["n_tokens"],
        text=summary["text"],
        seed=summary["seed"],
        settings=summary["settings"],
        skipped=tuple(summary["skipped"]),
        saelab_version=summary["saelab_version"],
        **{name: _unpack(name, cls, data["parts"][name], arrays) for name, cls in _PARTS.items()},
    )


def _pack(name: str, part: Any, arrays: dict[str, np.ndarray]) -> dict[str, Any] | None:
    """Move the arrays of a dataclass to ``arrays`` and return the rest."""
    if part is None:
        return None
    plain: dict[str, Any] = {}
    for field in fields(part):
        value = getattr(part, field.name)
        key = f"{name}.{field.name}"
        if isinstance(value, np.ndarray):
            arrays[key] = value
        elif isinstance(value, tuple) and field.name == "groups":
            _pack_ragged(key, list(value), arrays)
        else:
            plain[field.name] = value
    return plain


def _unpack(name: str, cls: type, plain: dict[str, Any] | None, arrays: dict[str, np.ndarray]) -> Any:
    if plain is None:
        return None
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in plain.items()}
    for field in fields(cls):
        key = f"{name}.{field.name}"
        if key in arrays:
            values[field.name] = arrays[key]
        elif f"{key}.offsets" in arrays:
            values[field.name] = tuple(_unpack_ragged(key, arrays))
    return cls(**values)


def _pack_ragged(key: str, rows: list[np.ndarray], arrays: dict[str, np.ndarray]) -> None:
    arrays[f"{key}.offsets"] = np.cumsum([0, *(len(row) for row in rows)])
    arrays[f"{key}.values"] = np.concatenate(rows) if rows else np.zeros(0)


def _unpack_ragged(key: str, arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
    return (
        np.split(arrays[f"{key}.values"], arrays[f"{key}.offsets"][1:-1]) if len(arrays[f"{key}.offsets"]) > 1 else []
    )
