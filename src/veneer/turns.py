"""Waiting for one's turn: time that an environment's call spends in a queue of the process is not its own, and no time limit counts it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import Executor, Future
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")


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


def submit(pool: Executor, work: Callable[[], T]) -> Future[T]:
    """Have it done by a pool. The call at hand waits for its turn until it begins."""
    begun = threading.Event()
    in_line(begun)

    def done() -> T:
        begun.set()
        return work()

    future = pool.submit(done)
    future.add_done_callback(lambda _: begun.set())  # it may be given up before it begins
    return future


@asynccontextmanager
async def holding(lock: asyncio.Lock | asyncio.Semaphore) -> AsyncGenerator[None, None]:
    """``async with lock``; until it is held the call at hand waits for its turn."""
    begun = threading.Event()
    in_line(begun)
    try:
        async with lock:
            begun.set()
            yield
    finally:
        begun.set()
