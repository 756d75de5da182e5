"""A command's options without importing what it runs.

Options are made from config classes, and the modules these are declared in import torch: two processor seconds for a
page of help or a misspelt option. So the options of a config class are kept in ``~/.cache/saelab`` (below
``XDG_CACHE_HOME``, if that is set) for as long as no source file of saelab changes. Where that cannot be written they
are made each time.
"""

import contextlib
import hashlib
import importlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class OptionField:
    """One key of a config class, as an option shows it."""

    key: str
    """Dotted key, also the option's name."""
    metavar: str
    """What stands for its value in the help."""
    many: bool
    """Whether it may be given several times."""
    text: str
    """Its description, with the default."""


def find_class(place: str) -> type:
    """Import and return the class at ``package.module:Class``."""
    module, name = place.split(":")
    found = getattr(importlib.import_module(module), name)
    assert isinstance(found, type)
    return found


def kept_fields(place: str, make: Callable[[type], list[OptionField]]) -> list[OptionField]:
    """Return the options of the class at ``package.module:Class``: those kept, else what ``make`` makes of it."""
    file, state = _file(place), _state()
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        kept = json.loads(file.read_bytes())
        if kept["state"] == state:
            return [OptionField(**field) for field in kept["fields"]]
    fields = make(find_class(place))
    with contextlib.suppress(OSError):
        _write(file, json.dumps({"state": state, "fields": [asdict(field) for field in fields]}))
    return fields


def _file(place: str) -> Path:
    """Return where the options of a class of this installation are kept."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    installation = hashlib.blake2b(os.fsencode(PACKAGE), digest_size=6).hexdigest()
    return root / "saelab" / f"options-{installation}-{place.replace(':', '.')}.json"


def _state() -> str:
    """Return what changes when a source file of the package does: names, sizes and times of all of them."""
    digest = hashlib.blake2b(digest_size=16)
    for folder, folders, files in os.walk(PACKAGE):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted(files):
            if name.endswith(".py"):
                about = os.stat(os.path.join(folder, name))
                digest.update(f"{folder}/{name} {about.st_size} {about.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _write(file: Path, text: str) -> None:
    """Write whole or not at all, without the fsync that results get: what is lost is made again."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=file.name, delete=False) as made:
        made.write(text)
    os.replace(made.name, file)
