"""Prompt files of other projects, recognised by their keys.

========================================================  ==========================================================
``.csv`` clean, corrupted, label                           greater-than of EAP-IG: label is the year's last two digits
``.csv`` clean, corrupted, correct_idx, incorrect_idx      IOI of EAP-IG. The ids are some tokenizer's, so answers are
                                                           taken from the text: the name said once, and the other one
``.jsonl`` clean_prefix, patch_prefix, clean_answer, ...   sparse feature circuits
``.json`` a list of strings                                IOI prompts ("!" padding is cut); corrupted gets other names
========================================================  ==========================================================
"""

import csv
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from saelab.analysis.circuits.tasks import Prompt
from saelab.core.errors import FormatError, MissingFileError

_PAIR = re.compile(r"\b([A-Z][a-z]+) and ([A-Z][a-z]+)\b")
_WORD = re.compile(r"\b[A-Z][a-z]+\b")
_OTHER_NAMES = ("Oliver", "Simon", "Victor", "Harry", "Martin", "Diana", "Grace", "Ellen", "Irene", "Clara")


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read a prompt file; :class:`FormatError` says which layouts are known and what was found."""
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"prompt file {path} does not exist")
    try:
        rows = _rows(path)
        return [prompt for row in rows if (prompt := _prompt(row)) is not None]
    except (KeyError, ValueError, TypeError) as error:
        raise FormatError(
            f"{path} is no prompt file that saelab knows ({type(error).__name__}: {error}); expected clean and "
            "corrupted (CSV), clean_prefix and patch_prefix (JSONL), or a list of texts (JSON)"
        ) from None


def _rows(path: Path) -> Iterable[Mapping[str, str] | str]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".csv":
        return list(csv.DictReader(text.splitlines()))
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    found = json.loads(text)
    if not isinstance(found, list):
        raise ValueError("the JSON is not a list")
    return found


def _prompt(row: Mapping[str, str] | str) -> Prompt | None:
    if isinstance(row, str):
        return _from_text(row.rstrip("!"))
    if "clean_prefix" in row:
        return Prompt(row["clean_prefix"], row["patch_prefix"], (row["clean_answer"],), (row["patch_answer"],))
    clean, corrupted = row["clean"], row["corrupted"]
    if "label" in row:
        year = int(row["label"])
        right, wrong = range(year + 1, 100), range(year + 1)
        return Prompt(clean, corrupted, tuple(f"{y:02d}" for y in right), tuple(f"{y:02d}" for y in wrong))
    answers = _names(clean)
    return None if answers is None else Prompt(clean, corrupted, (f" {answers[0]}",), (f" {answers[1]}",))


def _names(text: str) -> tuple[str, str] | None:
    """(said once, said again) among the two names joined by "and"; None when the text is no such prompt."""
    pair = _PAIR.search(text)
    if pair is None:
        return None
    counts = {name: len(re.findall(rf"\b{name}\b", text)) for name in pair.groups()}
    once = [name for name, n in counts.items() if n == 1]
    again = [name for name, n in counts.items() if n > 1]
    return (once[0], again[0]) if len(once) == 1 and len(again) == 1 else None


def _from_text(text: str) -> Prompt | None:
    """An unpaired IOI prompt: its corrupted side has three names that are not in it."""
    answers = _names(text)
    if answers is None:
        return None
    once, again = answers
    spare = iter(name for name in _OTHER_NAMES if name not in text)
    replaced: dict[int, str] = {}
    for match in _WORD.finditer(text):
        if match[0] in (once, again):
            replaced[match.start()] = next(spare)
    corrupted = text
    for start in sorted(replaced, reverse=True):
        end = start + len(_WORD.match(text, start)[0])  # type: ignore[index]
        corrupted = corrupted[:start] + replaced[start] + corrupted[end:]
    return Prompt(text, corrupted, (f" {once}",), (f" {again}",))
