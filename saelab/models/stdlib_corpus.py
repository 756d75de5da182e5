r"""The running Python's own standard library as a text corpus: real code on every machine, nothing to download.

Which files belong to it, in this order of rules:

1. ``*.py`` below the standard library's folder, third-party packages (``site-packages``, ``dist-packages``) left out;
2. no tests: nothing below a folder named ``test``, ``tests`` or ``idle_test``;
3. no ``lib2to3`` (another parser's grammar and fixers), no ``pydoc_data`` (the manual as one literal), no
   ``_sysconfigdata*`` (this machine's build settings);
4. no generated tables: a file in which more than a third of the non-blank lines only hold a literal of a table
   (``'\u0410'  #  0x80 -> ...``, ``0x0e: 0x2c,``), as the code pages in ``encodings`` and ``html.entities`` do;
5. nothing shorter than 200 bytes (package markers).

Train and held-out files are told apart by a hash of the path relative to that folder, so that a file is on the same
side on every machine and for every Python version.
"""

import hashlib
import re
import sysconfig
from functools import lru_cache
from pathlib import Path

from saelab.core.errors import TextError

HELDOUT_SHARE = 0.08
"""Share of the files that are held out (by number of files; by bytes it is about the same)."""

SPLITS = ("train", "heldout")

_NO_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "pydoc_data", "__pycache__"}
)
_TABLE_LINE = re.compile(
    r"""^\s*[\[(]?\s*(0[xX][0-9a-fA-F]+|-?\d+|[rbu]?'(?:[^'\\]|\\.)*'|[rbu]?"(?:[^"\\]|\\.)*")"""
    r"""(\s*[,:+]\s*(0[xX][0-9a-fA-F]+|-?\d+|None|[rbu]?'(?:[^'\\]|\\.)*'|[rbu]?"(?:[^"\\]|\\.)*"))*\s*[\])]?[,:+]?\s*(\#.*)?$"""
)
_TABLE_SHARE = 1 / 3
_TABLE_SAMPLE = 200
_MIN_BYTES = 200


def path_hash(relative: str, salt: str = "split") -> float:
    """Map a path to a number in [0, 1) that depends on nothing but its letters."""
    digest = hashlib.sha256(f"{salt}:{relative}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_of(relative: str) -> str:
    """Say on which side, ``train`` or ``heldout``, the file at this path (relative, with slashes) is."""
    return "heldout" if path_hash(relative) < HELDOUT_SHARE else "train"


def is_table(text: str) -> bool:
    """Say whether more than a third of the non-blank lines (of some 200 spread over the file) are table entries."""
    lines = [line for line in text.splitlines() if line.strip()]
    lines = lines[:: max(1, len(lines) // _TABLE_SAMPLE)]
    return sum(bool(_TABLE_LINE.match(line)) for line in lines) > _TABLE_SHARE * len(lines)


def stdlib_folder() -> Path:
    """Folder of the running Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


@lru_cache(maxsize=8)
def stdlib_files(split: str, folder: Path | None = None) -> tuple[tuple[str, Path], ...]:
    """List ``(relative path, path)`` of one split, in an order fixed by a hash of the path.

    The order mixes the packages, so that the first n files are a fair sample. ``folder`` is for tests; by default it is
    the running Python's. Raises :class:`TextError` when there are no source files (a zipped or stripped Python).
    """
    if split not in SPLITS:
        raise TextError(f"unknown split '{split}' of the standard library; use stdlib:train or stdlib:heldout")
    root = folder or stdlib_folder()
    found = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if _NO_FOLDERS.intersection(relative.parts[:-1]) or path.name.startswith("_sysconfigdata"):
            continue
        name = relative.as_posix()
        if split_of(name) != split or not path.is_file() or path.stat().st_size < _MIN_BYTES:
            continue
        if not is_table(path.read_text(encoding="utf-8", errors="replace")):
            found.append((name, path))
    if not found:
        raise TextError(
            f"no {split} source files of the standard library in {root}; is this Python zipped or stripped?"
        )
    return tuple(sorted(found, key=lambda item: path_hash(item[0], "order")))
