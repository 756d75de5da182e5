"""The runtime checker of the import hook: as mypy sees it, an int is a float; ``Self`` is left to mypy."""

from collections.abc import Callable
from typing import Any, Self

from beartype import BeartypeConf, beartype

_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check calls of ``function`` against its annotations (beartype knows Self only on decorated classes)."""
    hints = getattr(function, "__annotations__", {})
    for name, hint in hints.items():
        if hint is Self:
            hints[name] = Any
    return _beartype(function)
