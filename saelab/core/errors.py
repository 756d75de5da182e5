"""What a user can get wrong, as exceptions.

Every message is one line that says what was given, what was expected and what to do. The CLI prints it and exits with
``exit_code``; a traceback appears only with ``--debug``. ``assert`` is kept for our own invariants.
"""

import difflib
from collections.abc import Iterable


class SaelabError(Exception):
    """Base of all errors that a user can cause and mend."""

    exit_code = 1


class UsageError(SaelabError):
    """The command line itself is wrong (unknown option, missing argument)."""

    exit_code = 2


class ConfigError(SaelabError):
    """A config file or an override holds an unknown key or a value of the wrong type or range."""


class MissingFileError(SaelabError):
    """A path that was named does not exist."""


class ModelError(SaelabError):
    """A subject model (or its tokenizer) cannot be loaded."""


class SiteError(SaelabError):
    """A site (hook name) the model does not have."""


class TextError(SaelabError):
    """A text source is empty, unreadable or too short."""


class StoreError(SaelabError):
    """An activation store cannot be used for what was asked."""


class CorruptError(SaelabError):
    """A file that saelab wrote does not have the content it had: truncated, bit-flipped, half-written."""


class ActivationError(SaelabError):
    """Activations hold NaN or infinity, or have the wrong width."""


class FormatError(SaelabError):
    """A folder or file is of another kind or format than the one expected (a pickle, for one)."""


class OutputExistsError(SaelabError):
    """The output folder already holds something and ``--force`` was not given."""


class OutputError(SaelabError):
    """The output folder cannot be written: permissions, or a full disk."""


class ResumeError(SaelabError):
    """A run cannot be resumed: nothing to resume, or its settings differ."""


def nearest(name: str, known: Iterable[str], n: int = 3) -> str:
    """Return ``"; did you mean a, b?"`` for the known names nearest to ``name``, or ``""`` when none is near."""
    matches = difflib.get_close_matches(name, sorted(set(known)), n=n, cutoff=0.5)
    return f"; did you mean {', '.join(matches)}?" if matches else ""
