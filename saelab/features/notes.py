"""What people write about features: a star, a label, a note. Kept in a file beside the store, not in it.

``features.notes.json`` beside ``features/`` holds, for each SAE (by the fingerprint of its weights) and feature, what
was written. So a store that is built again keeps its notes, and a store of another SAE in its place does not get them.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from saelab.core.artifacts import output_error, read_json, write_json
from saelab.core.errors import CorruptError
from saelab.features.store import FeatureStore

KIND = "feature-notes"


@dataclass(frozen=True)
class Note:
    """What is written about one feature."""

    label: str = ""
    """A few words: what the feature seems to stand for."""
    note: str = ""
    """Anything longer."""
    star: bool = False
    """Worth coming back to."""
    changed: str = ""
    """When it was last saved, UTC, ISO 8601."""


class Notes:
    """The notes on the features of one store. Reading sees what every process has saved; saving loses nothing."""

    def __init__(self, store: FeatureStore) -> None:
        self.path = store.path.resolve().with_name(store.path.resolve().name + ".notes.json")
        """Where the notes are."""
        self._sae = str(store.manifest.get("sae_fingerprint", ""))
        self._seen: tuple[int, int] | None = None
        self._all: dict[int, Note] = {}

    def all(self) -> dict[int, Note]:
        """Return the note of every feature that has one. Raises :class:`CorruptError`."""
        try:
            about = self.path.stat()
        except FileNotFoundError:
            return {}
        state = (about.st_mtime_ns, about.st_ino)
        if state != self._seen:
            self._all, self._seen = self._parsed(self._read()), state
        return dict(self._all)

    def of(self, feature: int) -> Note:
        """Return the note of a feature, an empty one when it has none."""
        return self.all().get(feature, Note())

    def save(self, feature: int, *, label: str, note: str, star: bool) -> Note:
        """Write the note of a feature, atomically; an empty one is removed. Raises :class:`OutputError`."""
        new = Note(label.strip(), note.strip(), star, datetime.now(UTC).isoformat(timespec="seconds"))
        with self._locked():
            data: dict[str, Any] = self._read() if self.path.exists() else {"kind": KIND, "saes": {}}
            mine = data["saes"].setdefault(self._sae, {})
            if new.label or new.note or new.star:
                mine[str(feature)] = asdict(new)
            else:
                mine.pop(str(feature), None)
            write_json(self.path, data)
        return self.of(feature)

    def _read(self) -> dict[str, Any]:
        data = read_json(self.path)
        if not isinstance(data, dict) or data.get("kind") != KIND or not isinstance(data.get("saes"), dict):
            raise CorruptError(f"{self.path} does not hold notes on features; mend it or move it away")
        return data

    def _parsed(self, data: dict[str, Any]) -> dict[int, Note]:
        try:
            return {int(feature): Note(**about) for feature, about in data["saes"].get(self._sae, {}).items()}
        except (TypeError, ValueError, AttributeError):
            raise CorruptError(f"{self.path} does not hold notes on features; mend it or move it away") from None

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Let one process at a time read and write."""
        lock = self.path.with_name(f".{self.path.name}.lock")
        try:
            file = open(lock, "a")  # noqa: SIM115 - held open for as long as the lock
        except OSError as error:
            raise output_error(self.path, error) from error
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
