"""Tables and notes of the command line, in one look."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table

from saelab.core.progress import set_progress

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """Write a note for the person at the terminal (standard error, so that pipes see results only)."""
    err.print(text, style="dim", markup=False)


@contextmanager
def quiet_if(quiet: bool) -> Iterator[None]:
    """Switch the progress bars off while machine-readable output is being made."""
    if quiet:
        set_progress(False)
    yield


def key_value_table(title: str, values: Mapping[str, Any], notes: Mapping[str, str] | None = None) -> Table:
    """A two-column table, with an optional third column saying what a value means."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(justify="right")
    if notes:
        table.add_column(style="dim")
    for key, value in values.items():
        cells = [key, format_value(value)]
        table.add_row(*cells, *([notes.get(key, "")] if notes else []))
    return table


def format_value(value: Any) -> str:
    """A number with four significant digits; everything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if abs(value) < 10000 else f"{value:,.0f}"
