"""Progress bars with rate and ETA on standard error; silent when told so or when nobody is watching."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

_state = {"enabled": True}


@runtime_checkable
class Bar(Protocol):
    """What a long-running function reports to."""

    def advance(self, amount: float) -> None:
        """Say that ``amount`` more units are done."""

    def note(self, text: str) -> None:
        """Show a short text (a loss, say) beside the bar."""


class _Silent:
    def advance(self, amount: float) -> None:
        return

    def note(self, text: str) -> None:
        return


def set_progress(enabled: bool) -> None:
    """Turn all progress bars on or off (``--quiet`` and ``--json`` turn them off)."""
    _state["enabled"] = enabled


@contextmanager
def progress(title: str, total: float | None, unit: str = "tokens", done: float = 0) -> Iterator[Bar]:
    """Show a bar for ``total`` units of work, of which ``done`` are already there (a resumed run).

    Yields an object with ``advance(n)`` and ``note(text)``. On a pipe and in a notebook only the finished line shows.
    """
    if not _state["enabled"]:
        yield _Silent()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        ProgressColumn,
        Task,
        TaskID,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{human_count(speed)} {unit}/s" if speed else f"- {unit}/s", style="cyan")

    # In a notebook rich wants ipywidgets, and a kernel that says it is a terminal would keep every frame of the bar.
    notebook = "ipykernel" in sys.modules
    bar = Progress(
        TextColumn("{task.description:<10}"),
        BarColumn(bar_width=30),
        TaskProgressColumn(),
        Rate(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(file=sys.stderr, force_jupyter=False, force_terminal=False if notebook else None),
    )

    class Live:
        def __init__(self, task: TaskID) -> None:
            self.task = task

        def advance(self, amount: float) -> None:
            bar.advance(self.task, amount)

        def note(self, text: str) -> None:
            bar.update(self.task, note=text)

    with bar:
        yield Live(bar.add_task(title, total=total, completed=int(done), note=""))


def human_count(n: float) -> str:
    """``12345 -> '12.3k'``."""
    for unit in ("", "k", "M", "G"):
        if abs(n) < 1000:
            return f"{n:.0f}" if unit == "" else f"{n:.1f}{unit}"
        n /= 1000
    return f"{n:.1f}T"
