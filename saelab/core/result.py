"""``Result``: what every result can do in a notebook: a frame of numbers, figures, a line of text, a table."""

from abc import ABC, abstractmethod
from html import escape
from typing import TYPE_CHECKING

from saelab.core.errors import ConfigError, nearest

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

SHOWN_ROWS = 10
"""Rows of a frame that a notebook shows of a result."""


class Result(ABC):
    """Base of results: ``to_frame``, ``plot``, ``figures``, a short ``repr``, and a table as a notebook's display."""

    @abstractmethod
    def to_frame(self) -> "pd.DataFrame":
        """Return the numbers as a frame."""

    @abstractmethod
    def figures(self) -> "dict[str, tuple[Figure, pd.DataFrame]]":
        """Return every figure by name, the headline first, each with the frame of the numbers it draws."""

    @abstractmethod
    def __repr__(self) -> str:
        """Return one line: what it is of, and the headline numbers."""

    def plot(self, name: str | None = None) -> "Figure":
        """Return one figure by name (``figures()`` lists them); the headline one without a name."""
        known = self.figures()
        if name is None:
            return next(iter(known.values()))[0]
        if name not in known:
            raise ConfigError(f"no figure '{name}'{nearest(name, known)} (there are {', '.join(known)})")
        return known[name][0]

    def _repr_html_(self) -> str:
        """Notebook display: the line, and the first rows of the frame (one row is shown as a column)."""
        return f"<p><code>{escape(repr(self))}</code></p>{frame_html(self.to_frame())}"


def frame_html(frame: "pd.DataFrame", rows: int = SHOWN_ROWS) -> str:
    """Return the first rows of a frame as an HTML table, every text escaped; one row is shown as a column."""
    shown, more = frame.head(rows), len(frame) - rows
    if len(frame) == 1:
        shown, more = frame.T.set_axis(["value"], axis=1), 0
    numbered = len(frame) != 1 and list(frame.index[:2]) == [0, 1]
    table = str(shown.to_html(index=not numbered, float_format="{:.4g}".format, border=0))
    return table + (f"<p>and {more:,} more rows; <code>to_frame()</code> has all</p>" if more > 0 else "")
