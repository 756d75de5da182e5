"""Where the files that ship with saelab are: ``data/``, ``configs/`` and ``app/``.

In a checkout they stand at the top level; in an installed wheel they are packed below ``saelab/_bundled/``.
"""

from pathlib import Path

from saelab.core.errors import MissingFileError

_PACKAGE = Path(__file__).resolve().parents[1]


def asset(*parts: str) -> Path:
    """Return the path of a shipped file or folder, such as ``asset("configs", "demo-topk.yaml")``."""
    for root in (_PACKAGE / "_bundled", _PACKAGE.parent):
        path = root.joinpath(*parts)
        if path.exists():
            return path
    raise MissingFileError(f"saelab's own file {'/'.join(parts)} is missing; reinstall saelab")


def resolve_config(path: str | Path) -> Path:
    """Return ``path`` if it exists, else the shipped file of that name (``configs/x.yaml`` works from anywhere)."""
    path = Path(path)
    if path.exists():
        return path
    parts = path.parts[path.parts.index("configs") :] if "configs" in path.parts else ("configs", *path.parts)
    try:
        return asset(*parts)
    except MissingFileError:
        return path


EMBEDDED_MODEL = "embedded"
"""The name under which the shipped subject model is loaded."""


def embedded_model_dir() -> Path:
    """Folder of the embedded language model."""
    return asset("data", "pylm")
