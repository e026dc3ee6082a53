"""Ctrl-C while libraries load: some of them catch whatever is raised, so that it was pressed is remembered."""

from __future__ import annotations

import signal
import threading

_pressed = threading.Event()


def remember_interrupts() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt as before, and ``check_interrupted`` knows of it."""
    _pressed.clear()

    def handle(_signal: int, _frame: object) -> None:
        _pressed.set()
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, handle)


def check_interrupted() -> None:
    """Raises:
    KeyboardInterrupt: it was pressed, and something has caught it.
    """
    if _pressed.is_set():
        raise KeyboardInterrupt
