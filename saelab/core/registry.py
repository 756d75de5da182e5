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

    def register(self, name: str, item: T) -> T:
        """Add ``item`` under ``name``; a name is given once."""
        assert name not in self._items, f"{self.kind} {name!r} is registered twice"
        self._items[name] = item
        return item

    def __getitem__(self, name: str) -> T:
        if name not in self._items:
            raise ConfigError(
                f"unknown {self.kind} '{name}'{nearest(name, self._items)} (known: {', '.join(self._items)})"
            )
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def items(self) -> Iterator[tuple[str, T]]:
        """Yield ``(name, item)`` in registration order."""
        return iter(self._items.items())
