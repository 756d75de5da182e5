"""Named things that users choose by name: architectures, scores, recipes."""

from collections.abc import Iterator
from typing import Generic, TypeVar

from saelab.core.errors import ConfigError, nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """A name-to-thing table whose look-up error names the nearest known name."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}
        self._aliases: dict[str, str] = {}

    def register(self, name: str, item: T) -> T:
        """Add ``item`` under ``name``; a name is given once."""
        assert name not in self, f"{self.kind} {name!r} is registered twice"
        self._items[name] = item
        return item

    def alias(self, other: str, name: str) -> None:
        """Let ``other`` be a second name of ``name``: it can be looked up, and is not listed."""
        assert other not in self, f"{self.kind} {other!r} is registered twice"
        assert name in self._items, f"{self.kind} {name!r} is not registered"
        self._aliases[other] = name

    def __getitem__(self, name: str) -> T:
        if name not in self:
            known = [*self._items, *self._aliases]
            raise ConfigError(f"unknown {self.kind} '{name}'{nearest(name, known)} (known: {', '.join(self._items)})")
        return self._items[self._aliases.get(name, name)]

    def __contains__(self, name: object) -> bool:
        return name in self._items or name in self._aliases

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def items(self) -> Iterator[tuple[str, T]]:
        """Yield ``(name, item)`` in registration order."""
        return iter(self._items.items())
