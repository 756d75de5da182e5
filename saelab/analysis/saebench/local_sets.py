"""Data sets with labels that need no download: Python source labelled by Python itself, files, and the user's JSONL.

Token sets: an example is one token, its label that of its last character (a BPE token's leading blanks belong to what
follows them). Documents are either training or test. File set: an example is a window of a file, its label the file;
the first 70 % of a file's windows are training. JSONL: an example is a text; texts are split at random.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Int8, Int64
from torch import Tensor

from saelab.analysis.saebench.examples import LabelledSet, Pooled, collect
from saelab.analysis.saebench.python_labels import ATTRIBUTES, label_source
from saelab.core.errors import MissingFileError, TextError
from saelab.features.protocols import Dictionary, Model
from saelab.models.text import TextSource

TEST_SHARE, LEAST_TEXTS, MOST_FILES = 0.25, 40, 8


@dataclass(frozen=True, eq=False)
class Windows:
    """Rows of tokens of labelled files."""

    tokens: Int[Tensor, "r t"]
    """Token ids, BOS first where the tokenizer has one, padded on the right."""
    document: Int64[np.ndarray, " r"]
    """Number of the file."""
    real: np.ndarray
    """(r, t): not BOS, not padding."""
    labels: dict[str, Int8[np.ndarray, "r t"]]
    """Class of each token by attribute; -1 for none."""


def python_windows(source: TextSource, tokenizer: Any, *, context: int, max_tokens: int) -> Windows:
    """Cut Python files into labelled rows until ``max_tokens`` are reached; files that do not parse are left out.

    Raises :class:`TextError` when no file is valid Python.
    """
    rows: list[list[int]] = []
    documents: list[int] = []
    labels: dict[str, list[np.ndarray]] = {name: [] for name in ATTRIBUTES}
    head = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    body, used = context - len(head), 0
    for number, text in enumerate(source):
        found = label_source(text)
        if found is None:
            continue
        encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False, verbose=False)
        ids = encoded["input_ids"]
        last = np.array([max(end - 1, 0) for _, end in encoded["offset_mapping"]], np.int64)
        for start in range(0, len(ids), body):
            rows.append(head + ids[start : start + body])
            documents.append(number)
            at = last[start : start + body]
            for name, values in found.labels.items():
                labels[name].append(np.concatenate([np.full(len(head), -1, np.int8), values[at]]))
        used += len(ids)
        if used >= max_tokens:
            break
    if not rows:
        raise TextError(
            f"no document of {source.name} is valid Python; give Python files (--text), or a JSONL of texts (--labels)"
        )
    tokens, real = _padded(rows, context, len(head))
    padded = {name: np.full(real.shape, -1, np.int8) for name in labels}
    for name, parts in labels.items():
        for row, part in enumerate(parts):
            padded[name][row, : len(part)] = part
    return Windows(tokens, np.array(documents, np.int64), real, padded)


def token_sets(
    model: Model,
    site: str,
    dictionaries: Mapping[str, Dictionary],
    windows: Windows,
    *,
    per_class: int,
    seed: int,
) -> tuple[list[LabelledSet], dict[str, Any]]:
    """Return one set per attribute over a common sample of tokens, and the labels of all attributes on that sample.

    The labels come with ``train`` (the side of the split) and ``pooled`` (the sample's activations and codes).

    At most ``per_class`` tokens of each class are drawn for an attribute. Classes with fewer than 40 are dropped.
    """
    rng = np.random.default_rng([seed, 10])
    chosen = np.zeros(windows.real.shape, bool)
    for values in windows.labels.values():
        for value in range(int(values.max()) + 1):
            places = np.flatnonzero(values.ravel() == value)
            chosen.ravel()[rng.permutation(places)[:per_class]] = True
    example = np.full(chosen.shape, -1, np.int64)
    example[chosen] = np.arange(int(chosen.sum()))
    pooled = collect(model, site, dictionaries, windows.tokens, example, title="tokens")
    document = np.broadcast_to(windows.document[:, None], chosen.shape)[chosen]
    labels = {name: values[chosen].astype(np.int64) for name, values in windows.labels.items()}
    train = ~np.isin(document, _held_out(document, rng))
    sets = []
    for name, classes in ATTRIBUTES.items():
        made = _labelled(name, classes, pooled, labels[name], train)
        if made is not None:
            sets.append(made)
    return sets, {**labels, "train": train, "pooled": pooled}


def file_set(
    model: Model, site: str, dictionaries: Mapping[str, Dictionary], windows: Windows, *, per_class: int
) -> LabelledSet | None:
    """Return the set whose classes are the longest files; None when fewer than two files have 40 windows."""
    sizes = Counter(windows.document.tolist())
    files = [number for number, count in sizes.most_common(MOST_FILES) if count >= LEAST_TEXTS]
    if len(files) < 2:
        return None
    rows = np.concatenate([np.flatnonzero(windows.document == number)[:per_class] for number in files])
    y = np.concatenate([np.full(min(sizes[number], per_class), k) for k, number in enumerate(files)]).astype(np.int64)
    place = np.concatenate([np.linspace(0, 1, int((y == k).sum()), endpoint=False) for k in range(len(files))])
    example = np.where(windows.real[rows], np.arange(len(rows))[:, None], -1)
    pooled = collect(model, site, dictionaries, windows.tokens[torch.from_numpy(rows)], example, title="files")
    about = {"labels": "the file a window is from", "split": "first 70 % of the windows of each file are training"}
    return LabelledSet("file", tuple(f"file {n}" for n in files), pooled, y, place < 0.7, about)


def read_labelled_texts(path: str | Path) -> tuple[list[str], list[str]]:
    """Read a JSONL of ``{"text": ..., "label": ...}``; each problem is one line naming file and line number."""
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f'{path} does not exist; give a JSONL file of {{"text": ..., "label": ...}}')
    texts, labels = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            raise TextError(f'{path} line {number} is not JSON; expected {{"text": ..., "label": ...}}') from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str) or row.get("label") is None:
            raise TextError(f"{path} line {number} needs a string 'text' and a 'label'")
        texts.append(row["text"])
        labels.append(str(row["label"]))
    counts = Counter(labels)
    good = {label for label, count in counts.items() if count >= LEAST_TEXTS}
    if len(good) < 2:
        raise TextError(
            f"{path} has {len(good)} labels with at least {LEAST_TEXTS} texts "
            f"({', '.join(f'{label}: {count}' for label, count in counts.most_common(5))}); at least 2 are needed"
        )
    kept = [k for k, label in enumerate(labels) if label in good]
    return [texts[k] for k in kept], [labels[k] for k in kept]


def text_set(
    model: Model,
    site: str,
    dictionaries: Mapping[str, Dictionary],
    tokenizer: Any,
    path: str | Path,
    *,
    context: int,
    per_class: int,
    seed: int,
) -> LabelledSet:
    """Return the set of a JSONL file: texts cut at ``context`` tokens, mean-pooled, split at random."""
    texts, names = read_labelled_texts(path)
    rng = np.random.default_rng([seed, 11])
    classes = tuple(sorted(set(names)))
    y = np.array([classes.index(name) for name in names], np.int64)
    rows = np.concatenate([rng.permutation(np.flatnonzero(y == k))[:per_class] for k in range(len(classes))])
    head = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = [
        tokenizer(texts[k], add_special_tokens=False, verbose=False)["input_ids"][: context - len(head)] for k in rows
    ]
    full = np.array([bool(part) for part in ids])
    tokens, real = _padded([head + part for part, some in zip(ids, full, strict=True) if some], context, len(head))
    example = np.where(real, np.arange(len(real))[:, None], -1)
    pooled = collect(model, site, dictionaries, tokens, example, title="texts")
    train = rng.random(len(real)) >= TEST_SHARE
    about = {"labels": str(path), "split": "texts at random"}
    return LabelledSet(Path(path).stem, classes, pooled, y[rows][full], train, about)


def _labelled(
    name: str, classes: tuple[str, ...], pooled: Pooled, y: np.ndarray, train: np.ndarray
) -> LabelledSet | None:
    """Return the examples of an attribute; None when fewer than two classes have 40 on each side of the split."""
    good = [k for k in range(len(classes)) if min((y[train] == k).sum(), (y[~train] == k).sum()) >= LEAST_TEXTS]
    if len(good) < 2:
        return None
    rows = np.flatnonzero(np.isin(y, good))
    about = {"labels": "Python's tokenize and ast modules", "split": "by document"}
    renamed = np.searchsorted(good, y[rows]).astype(np.int64)
    return LabelledSet(name, tuple(classes[k] for k in good), pooled.at(rows), renamed, train[rows], about)


def _held_out(document: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw documents for the test side until they hold a quarter of the examples."""
    numbers, sizes = np.unique(document, return_counts=True)
    order = rng.permutation(len(numbers))
    before = np.cumsum(sizes[order]) - sizes[order]
    drawn: np.ndarray = numbers[order[before < TEST_SHARE * sizes.sum()]]
    return drawn


def _padded(rows: list[list[int]], context: int, head: int) -> tuple[Tensor, np.ndarray]:
    tokens = np.zeros((len(rows), context), np.int64)
    real = np.zeros((len(rows), context), bool)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = ids
        real[row, head : len(ids)] = True
    return torch.from_numpy(tokens), real
