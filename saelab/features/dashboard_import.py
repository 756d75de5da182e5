"""Feature stores made of SAEDashboard's and Neuronpedia's files, so that they can be browsed like one's own.

Each context of the files becomes a row of text, on which only its own feature is known. So densities are those that the
files say, counts and histograms are those of the contexts, and nothing can be said of features that fire together.
"""

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saelab.core.artifacts import (
    MANIFEST,
    checksum,
    file_checksum,
    prepare_output,
    write_json,
    write_manifest,
)
from saelab.core.code import SparseCode
from saelab.core.errors import FormatError, MissingFileError
from saelab.features.arrays import write_npy
from saelab.features.encode import encoder
from saelab.features.explanations import Explanation, Explanations
from saelab.features.layout import SUMMARY
from saelab.features.ragged import Array
from saelab.features.rows import Piece
from saelab.features.store import KIND, FeatureStore, open_features
from saelab.features.transpose import Transposer
from saelab.features.vocabulary import write_vocabulary
from saelab.features.weights import LOGIT_TOKENS

PROGRESS = "progress.json"
MEMORY = 256 << 20
"""Bytes of the transposition."""
MOST_FEATURES = 1 << 22
"""Largest feature number that is believed."""


@dataclass
class Imported:
    """What the files say of one feature."""

    contexts: list[tuple[list[str], list[float]]] = field(default_factory=list)
    """Tokens and values, no context twice."""
    density: float = 0.0
    """Share of tokens on which it fires."""
    promoted: tuple[list[str], list[float]] = field(default_factory=lambda: ([], []))
    """Most promoted tokens and their logits."""
    suppressed: tuple[list[str], list[float]] = field(default_factory=lambda: ([], []))
    """Most suppressed tokens and their logits."""


@dataclass
class Contents:
    """What all files say."""

    model: str = "unknown"
    """Name of the model."""
    source: str = "unknown"
    """Name of the SAE."""
    features: dict[int, Imported] = field(default_factory=dict)
    """By number."""
    explanations: list[Explanation] = field(default_factory=list)
    """All explanations."""


def read_dashboards(path: str | Path) -> Contents:
    """Read a ``batch-N.json`` file, a folder of them, or a folder of a Neuronpedia export (anywhere below ``path``).

    Raises :class:`MissingFileError`, :class:`FormatError` naming the file and what is wrong with it.
    """
    path = Path(path)
    if not path.exists():
        raise MissingFileError(f"{path} does not exist; give a batch-N.json, a folder of them, or a Neuronpedia export")
    contents = Contents()
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*batch-*") if f.is_file())
    for file in files:
        try:
            if file.suffix == ".json":
                _read_dashboard(json.loads(file.read_bytes()), contents)
            else:
                for row in _lines(file):
                    _READERS[file.parent.name](row, contents)
        except (KeyError, TypeError, ValueError, AttributeError, OSError, EOFError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]
            raise FormatError(
                f"{file} is neither SAEDashboard's nor Neuronpedia's ({reason}); give their batch files as they are"
            ) from None
    if not contents.features:
        raise FormatError(f"{path} holds no features; expected batch-N.json or features/batch-N.jsonl.gz")
    return contents


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    for line in data.decode().splitlines():
        if line.strip():
            yield json.loads(line)


def _feature(contents: Contents, number: Any) -> Imported:
    index = int(number)
    if not 0 <= index < MOST_FEATURES:
        raise ValueError(f"feature number {index}")
    return contents.features.setdefault(index, Imported())


def _describe(found: Imported, data: dict[str, Any]) -> None:
    found.density = float(data.get("frac_nonzero") or 0.0)
    for name, sign in (("promoted", "pos"), ("suppressed", "neg")):
        words, values = data.get(f"{sign}_str") or [], data.get(f"{sign}_values") or []
        setattr(found, name, ([str(w) for w in words], [float(v) for v in values][: len(words)]))


def _context(found: Imported, tokens: Any, values: Any) -> None:
    words, numbers = [str(token) for token in tokens], [float(v) for v in values]
    if len(words) != len(numbers) or not words:
        raise ValueError(f"{len(words)} tokens and {len(numbers)} values")
    if not all(np.isfinite(numbers)):
        raise ValueError("a value is not finite")
    if (words, numbers) not in found.contexts:
        found.contexts.append((words, numbers))


def _read_dashboard(data: Any, contents: Contents) -> None:
    contents.model = str(data.get("model_id") or contents.model)
    contents.source = f"{data.get('layer')}-{data.get('sae_set')}"
    for one in data["features"]:
        found = _feature(contents, one["feature_index"])
        _describe(found, one)
        for activation in one["activations"]:
            _context(found, activation["tokens"], activation["values"])


def _read_feature(row: dict[str, Any], contents: Contents) -> None:
    contents.model, contents.source = str(row["modelId"]), str(row["layer"])
    _describe(_feature(contents, row["index"]), row)


def _read_activation(row: dict[str, Any], contents: Contents) -> None:
    _context(_feature(contents, row["index"]), row["tokens"], row["values"])


def _read_explanation(row: dict[str, Any], contents: Contents) -> None:
    name, model = str(row.get("typeName") or ""), str(row.get("explanationModelName") or "")
    author = str(row.get("authorId") or ":".join(filter(None, (name, model))) or "imported")
    text = str(row["description"])
    contents.explanations.append(Explanation(int(row["index"]), author, text, explainer=name, model=model))


_READERS = {"features": _read_feature, "activations": _read_activation, "explanations": _read_explanation}


def import_dashboards(path: str | Path, out: str | Path, *, force: bool = False) -> FeatureStore:
    """Write the feature store ``out`` from such files, and their explanations beside it.

    Raises also :class:`OutputExistsError`, :class:`OutputError`.
    """
    contents = read_dashboards(path)
    folder = prepare_output(out, force=force)
    write_json(folder / PROGRESS, {"kind": KIND, "state": "building"})
    vocabulary = _Vocabulary()
    n_features = max(contents.features) + 1
    with encoder(folder, n_features) as writer:
        for feature in sorted(contents.features):
            for tokens, values in contents.features[feature].contexts:
                writer.add(*_row(vocabulary, feature, tokens, values, n_features))
    totals = writer.totals
    logits = _logits(contents, vocabulary, n_features)
    columns = Transposer(folder, totals, len(vocabulary.words), MEMORY).run()
    mean = np.divide(totals.total, totals.count, out=np.zeros(n_features), where=totals.count > 0)
    density = np.zeros(n_features)
    for feature, found in contents.features.items():
        density[feature] = found.density
    counts: dict[str, Array] = {
        "count": totals.count,
        "density": density,
        "dead": totals.count == 0,
        "max": totals.maximum,
        "mean": mean.astype(np.float32),
    }
    columns = counts | columns | logits
    for name, column in columns.items():
        write_npy(folder / SUMMARY / f"{name}.npy", column)
    write_vocabulary(folder, [word.encode("utf-8", "surrogatepass") for word in vocabulary.words])
    fingerprint = checksum(json.dumps([contents.model, contents.source, sorted(contents.features)]).encode())
    about = {
        **{"model": contents.model, "model_fingerprint": "", "site": contents.source, "sae": "imported"},
        **{"source": str(Path(path).name), "source_fingerprint": fingerprint, "sae_fingerprint": fingerprint},
        **{"rows": {}, "d_in": 0, "n_features": n_features, "n_tokens": totals.n_tokens, "n_kept": totals.n_kept},
        **{"n_rows": totals.n_rows, "nnz": totals.nnz, "l0": totals.nnz / max(totals.n_kept, 1)},
        "dead_fraction": float((totals.count == 0).mean()),
        "imported": True,
        "columns": list(columns),
        "files": {
            p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "crc32": file_checksum(p)}
            for p in sorted(folder.rglob("*"))
            if p.is_file() and p.name not in (MANIFEST, PROGRESS)
        },
    }
    write_manifest(folder, KIND, about)
    (folder / PROGRESS).unlink()
    store = open_features(folder)
    Explanations(store).add(e for e in contents.explanations if 0 <= e.feature < n_features)
    return store


class _Vocabulary:
    """Numbers for token texts, in the order they come."""

    def __init__(self) -> None:
        self.words: list[str] = []
        self._number: dict[str, int] = {}

    def number(self, word: str) -> int:
        if word not in self._number:
            self._number[word] = len(self.words)
            self.words.append(word)
        return self._number[word]


def _row(
    vocabulary: _Vocabulary, feature: int, tokens: list[str], values: list[float], n_features: int
) -> tuple[Piece, SparseCode]:
    ids = torch.tensor([[vocabulary.number(word) for word in tokens]])
    dense = torch.tensor(values, dtype=torch.float32)
    active = dense > 0
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), active.cumsum(0)])
    code = SparseCode(torch.full((int(active.sum()),), feature), dense[active], offsets, n_features)
    return Piece(0, ids, torch.ones_like(ids, dtype=torch.bool)), code


def _logits(contents: Contents, vocabulary: _Vocabulary, n_features: int) -> dict[str, Array]:
    """Logit columns, when every feature has a full list (Neuronpedia's have ten)."""
    lists = [
        one for found in contents.features.values() for one in (found.promoted, found.suppressed) if found.contexts
    ]
    if not lists or any(len(words) < LOGIT_TOKENS or len(values) < LOGIT_TOKENS for words, values in lists):
        return {}
    made: dict[str, Array] = {}
    for name in ("top", "bottom"):
        made[f"logit_{name}_ids"] = np.zeros((n_features, LOGIT_TOKENS), np.int32)
        made[f"logit_{name}"] = np.zeros((n_features, LOGIT_TOKENS), np.float32)
    for feature, found in contents.features.items():
        for name, (words, values) in (("top", found.promoted), ("bottom", found.suppressed)):
            if len(words) >= LOGIT_TOKENS:
                made[f"logit_{name}_ids"][feature] = [vocabulary.number(w) for w in words[:LOGIT_TOKENS]]
                made[f"logit_{name}"][feature] = values[:LOGIT_TOKENS]
    return made
