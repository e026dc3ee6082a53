"""Waiting for one's turn: time that an environment's call spends in a queue of the process is not its own, and no time limit counts it."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar


class Turns:
    """What one call waits for."""

    def __init__(self) -> None:
        self._begun: list[threading.Event] = []

    @property
    def waiting(self) -> bool:
        """Whether something that the call has asked for has not begun yet."""
        self._begun = [event for event in self._begun if not event.is_set()]
        return bool(self._begun)

    def add(self, begun: threading.Event) -> None:
        self._begun.append(begun)


_CURRENT: ContextVar[Turns | None] = ContextVar("turns", default=None)


@contextmanager
def taking_turns(turns: Turns) -> Generator[None, None, None]:
    """Tasks that are made inside tell ``turns`` when they wait."""
    token = _CURRENT.set(turns)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def in_line(begun: threading.Event) -> None:
    """The call at hand waits until ``begun`` is set, by whatever thread."""
    turns = _CURRENT.get()
    if turns is not None:
        turns.add(begun)
