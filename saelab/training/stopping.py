"""Stopping in good order: SIGINT and SIGTERM are noted, the loop ends its step, saves, and says how to go on."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from saelab.core.errors import SaelabError


class Stopped(SaelabError):
    """A signal ended the run after everything was saved."""

    exit_code = 130


@contextmanager
def stop_requests() -> Iterator[Callable[[], str | None]]:
    """Yield a function that says which signal has come (``"SIGINT"``), or None; old handlers return at the end.

    A second signal acts as if nothing were caught, so that a run that hangs can be ended. Outside the main thread,
    where Python allows no handlers, the function always says None.
    """
    received: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def note(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number).name)
        restore()

    for number in previous:
        signal.signal(number, note)
    try:
        yield lambda: received[0] if received else None
    finally:
        restore()
