"""The features of a store as a table: searched, filtered and sorted by its columns alone, a page at a time.

Columns are memory-mapped; a million features cost a few passes over one column each, and no frame is made of more rows
than are asked for.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int64

from saelab.core.errors import ConfigError
from saelab.features.notes import Note
from saelab.features.render import visible
from saelab.features.store import FeatureStore

if TYPE_CHECKING:
    import pandas as pd

PIECE = 4096
"""Rows exported at once."""
Extra = Mapping[str, np.ndarray]
"""Further columns by name, one number per feature."""
NOTHING: Extra = {}


@dataclass(frozen=True)
class Range:
    """A condition on one column: ``low <= value <= high``; None is no bound."""

    column: str
    """Name of the column."""
    low: float | None = None
    """Least value."""
    high: float | None = None
    """Largest value."""


@dataclass(frozen=True)
class Query:
    """Which features, and in which order."""

    text: str = ""
    """A feature's number, or a text looked for in labels, notes, explanations, the top token and promoted tokens."""
    ranges: tuple[Range, ...] = ()
    """Conditions that all hold."""
    starred: bool = False
    """Only features with a star."""
    sort: str = "feature"
    """Column to sort by, or ``feature``."""
    descending: bool = False
    """Largest first."""


def sortable(store: FeatureStore, extra: Extra = NOTHING) -> list[str]:
    """Names of the columns with one number per feature, those of ``extra`` first."""
    return [*extra, *(name for name in store.columns if store.column(name).ndim == 1)]


def choose(
    store: FeatureStore, query: Query, notes: Mapping[int, Note], extra: Extra = NOTHING
) -> Int64[np.ndarray, " n"]:
    """Return the features that a query asks for, in its order; equal values in order of their number, nan last.

    ``extra`` holds columns that are not in the store: a person's own, such as the cosine to a named direction.
    """
    keep = np.ones(store.n_features, np.bool_)
    for condition in query.ranges:
        values = _column(store, condition.column, extra)
        if condition.low is not None:
            keep &= values >= condition.low
        if condition.high is not None:
            keep &= values <= condition.high
    if query.starred:
        keep &= _members(store.n_features, [i for i, note in notes.items() if note.star])
    if query.text.strip():
        keep &= _matching(store, query.text.strip(), notes)
    found = np.flatnonzero(keep).astype(np.int64)
    if query.sort == "feature":
        return found[::-1].copy() if query.descending else found
    values = np.asarray(_column(store, query.sort, extra)[found])
    ordered: np.ndarray = found[stable_order(values, query.descending)]
    return ordered


def stable_order(values: np.ndarray, descending: bool = False) -> Int64[np.ndarray, " n"]:
    """Return the indices that put numbers in order: equal ones in order of their index, nan last.

    Key and index are packed into one 64-bit integer where they fit: numpy sorts integers with vector instructions,
    several times as fast as it finds a stable order of floats.
    """
    keys = _keys(values, descending)
    if keys is None:
        wide = values.astype(np.float64)
        return np.argsort(-wide if descending else wide, kind="stable").astype(np.int64)
    packed: np.ndarray = (keys.astype(np.uint64) << np.uint64(32)) | np.arange(len(keys), dtype=np.uint64)
    packed.sort()
    return (packed & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _keys(values: np.ndarray, descending: bool) -> np.ndarray | None:
    """Return integers from 0 to 2^32 - 1 in the order that is asked for; None when the values do not fit into them."""
    if not len(values):
        return values
    if values.dtype.kind in "iu":
        least, most = int(values.min()), int(values.max())
        if max(most, -least, most - least) >= 1 << 32:
            return None
        whole = values.astype(np.int64)
        return most - whole if descending else whole - least
    if values.dtype != np.float32:
        return None
    bits = ((-values if descending else values) + np.float32(0)).view(np.uint32)  # -0 becomes 0
    keys: np.ndarray = np.where(bits >> np.uint32(31), ~bits, bits | np.uint32(1 << 31))
    keys[np.isnan(values)] = 0xFFFFFFFF
    return keys


def _column(store: FeatureStore, name: str, extra: Extra) -> np.ndarray:
    values = extra[name] if name in extra else store.column(name)
    if values.ndim != 1:
        raise ConfigError(f"column '{name}' holds lists; give one of {', '.join(sortable(store))}")
    return values


def _members(n: int, features: Sequence[int]) -> np.ndarray:
    mask = np.zeros(n, np.bool_)
    mask[[i for i in features if 0 <= i < n]] = True
    return mask


def _matching(store: FeatureStore, text: str, notes: Mapping[int, Note]) -> np.ndarray:
    wanted = text.casefold()
    if wanted.isdecimal():
        return _members(store.n_features, [int(wanted)])
    named = [i for i, note in notes.items() if wanted in f"{note.label}\n{note.note}".casefold()]
    named += [i for i, explanation in store.texts.items() if wanted in explanation.casefold()]
    mask = _members(store.n_features, named)
    vocabulary = store.vocabulary
    matches = np.zeros(len(vocabulary) + 1, np.bool_)  # the last place is for token -1: no token
    for i, token in enumerate(vocabulary.strings(range(len(vocabulary)))):
        matches[i] = wanted in token.casefold()
    for name in ("top_token", "logit_top_ids"):
        if name in store.columns and matches.any():
            found = matches[store.column(name)]
            mask |= found if found.ndim == 1 else found.any(1)
    return mask


def page(
    store: FeatureStore,
    features: Int64[np.ndarray, " n"],
    columns: Sequence[str],
    notes: Mapping[int, Note],
    extra: Extra = NOTHING,
) -> "pd.DataFrame":
    """Return some features as a frame: number, star, label, explanation, tokens as texts, and the chosen columns."""
    import pandas as pd

    data: dict[str, Any] = {
        "feature": features,
        "star": ["★" if notes.get(i, Note()).star else "" for i in features.tolist()],
        "label": [notes.get(i, Note()).label for i in features.tolist()],
    }
    if store.texts:
        data["explanation"] = [store.texts.get(i, "") for i in features.tolist()]
    data["fires on"] = _top_tokens(store, features)
    if "logit_top_ids" in store.columns:
        ids = store.column("logit_top_ids")[features]
        data["promotes"] = [_joined(store, row[:5]) for row in ids]
    for name in columns:
        data[name] = np.array(_column(store, name, extra)[features])
    return pd.DataFrame(data)


def _top_tokens(store: FeatureStore, features: np.ndarray) -> list[str]:
    if "top_token" not in store.columns:
        return [""] * len(features)
    shares = store.column("top_token_share")[features].tolist()
    return [
        "" if i < 0 else f"{_joined(store, [i])} {share:.0%}"
        for i, share in zip(store.column("top_token")[features].tolist(), shares, strict=True)
    ]


def _joined(store: FeatureStore, ids: Sequence[int] | np.ndarray) -> str:
    return " ".join(quoted(text) for text in store.vocabulary.strings(ids))


def quoted(token: str) -> str:
    """Return a token in quotation marks, so that its spaces are seen; control characters by name."""
    return f"“{visible(token)}”"


def export(
    store: FeatureStore,
    features: Int64[np.ndarray, " n"],
    notes: Mapping[int, Note],
    form: str,
    extra: Extra = NOTHING,
) -> Iterator[bytes]:
    """Yield the table of some features, all columns, as ``csv`` or ``jsonl``, piece by piece.

    Token columns hold the texts as they are: a CSV or JSON reader gives back the exact characters.
    """
    if form not in ("csv", "jsonl"):
        raise ConfigError(f"the format is '{form}', expected 'csv' or 'jsonl'")
    names = sortable(store, extra)
    lists = [name for name in ("logit_top_ids", "logit_bottom_ids") if name in store.columns]
    heads = [
        "feature",
        "star",
        "label",
        "note",
        *(["explanation"] if store.texts else []),
        *names,
        "top_token_text",
        *(n.removesuffix("_ids") for n in lists),
    ]
    if form == "csv":
        yield _csv_line(heads)
    for k in range(0, len(features), PIECE):
        part = features[k : k + PIECE]
        columns = [_column(store, name, extra)[part].tolist() for name in names]
        tops = store.column("top_token")[part].tolist() if "top_token" in names else [-1] * len(part)
        texts = [store.vocabulary.strings([i])[0] if i >= 0 else "" for i in tops]
        tokens = [[store.vocabulary.strings(row) for row in store.column(name)[part]] for name in lists]
        lines = []
        for j, feature in enumerate(part.tolist()):
            note = notes.get(feature, Note())
            said = [store.texts.get(feature, "")] if store.texts else []
            cells = [feature, note.star, note.label, note.note, *said, *(_finite(c[j]) for c in columns), texts[j]]
            cells += [column[j] for column in tokens]
            if form == "jsonl":
                lines.append((json.dumps(dict(zip(heads, cells, strict=True)), ensure_ascii=False) + "\n").encode())
            else:
                lines.append(
                    _csv_line([json.dumps(c, ensure_ascii=False) if isinstance(c, list) else c for c in cells])
                )
        yield b"".join(lines)


def _finite(value: Any) -> Any:
    """NaN is no JSON; an empty cell in CSV."""
    return None if isinstance(value, float) and value != value else value  # noqa: PLR0124 - NaN is not itself


def _csv_line(cells: Sequence[Any]) -> bytes:
    line = io.StringIO()
    csv.writer(line).writerow(cells)
    return line.getvalue().encode()
