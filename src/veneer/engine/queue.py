"""Futures and the order in which queued requests run."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from veneer.engine.packing import PassRequest
from veneer.engine.request import SampleRequest
from veneer.types import AdamParams

T = TypeVar("T")
LOG = logging.getLogger("veneer.engine")


class EngineFuture(Generic[T]):
    """The answer to a queued request. Waiting for it runs the engine, so there is no thread and no polling.

    An ``await`` first lets every other coroutine that is ready queue its own work: ten loops that wait share one step.
    """

    def __init__(self, step: Callable[[], int], cancel: Callable[[EngineFuture[Any]], None]) -> None:
        self._step, self._cancel = step, cancel
        self._value: T | None = None
        self._error: BaseException | None = None
        self._done = False
        self._callbacks: deque[Callable[[EngineFuture[T]], None]] = deque()

    def set_result(self, value: T) -> None:
        self._value, self._done = value, True
        self._call_back()

    def set_error(self, error: BaseException) -> None:
        self._error, self._done = error, True
        self._call_back()

    def add_done_callback(self, callback: Callable[[EngineFuture[T]], None]) -> None:
        """Call it with this future, once, when the result or an error is set, on the thread that sets it; at once if it is there. That is
        in the middle of a step, so it must neither run nor change the engine. What it raises is logged and goes no further."""
        self._callbacks.append(callback)
        if self._done:
            self._call_back()

    def _call_back(self) -> None:
        while self._callbacks:
            try:
                callback = self._callbacks.popleft()  # whoever takes it calls it, so that two threads do not call it twice
            except IndexError:
                return
            try:
                callback(self)
            except Exception:
                LOG.exception("a callback of a future failed")

    def done(self) -> bool:
        return self._done

    def cancel(self) -> bool:
        """Give the request up and free its place in the batch. False: it is answered already. A cancelled task cancels what it awaits."""
        if self._done:
            return False
        self._cancel(self)
        self.set_error(asyncio.CancelledError())
        return True

    def result(self) -> T:
        while not self._done:
            self._step()
        if self._error is not None:
            raise self._error
        return cast(T, self._value)

    def __await__(self) -> Generator[Any, None, T]:
        while not self._done:
            try:
                yield from asyncio.sleep(0).__await__()
            except (asyncio.CancelledError, GeneratorExit):
                self.cancel()
                raise
            if not self._done:
                self._step()
        return self.result()


@dataclass
class Request:
    """A queued call: a sampling or training pass or an optimizer step, which merge with others, or a barrier for its adapter alone.
    An optimizer step is a barrier for its adapter too."""

    adapter: str | None
    future: EngineFuture[Any]
    later: tuple[str | None, ...] = ()
    """Adapters to which a sampling pass will switch."""
    sample: SampleRequest | None = None
    train: PassRequest | None = None
    optim: AdamParams | None = None
    need_gradient: bool = True
    """An optimizer step that is refused where no gradient waits."""
    barrier: Callable[[], Any] | None = None
    changes_samples: bool = False
    """A barrier that replaces what completions are drawn from."""

    @property
    def adapters(self) -> tuple[str | None, ...]:
        """All that it needs."""
        return (self.adapter, *self.later)


def plan(queue: list[Request], sampling: set[str | None]) -> tuple[list[Request], list[Request]]:
    """Split a queue into what can run in one step and what must wait.

    Passes of all adapters run together. A barrier (optimizer step, publish, save, load) runs when no training pass of its
    adapter is ahead of it, and one that changes what is sampled when no completion of its adapter is ahead of it or running
    (``sampling``). Whatever the adapter queued behind a waiting barrier waits with it. A completion is of every adapter to which
    it switches: it waits for the barriers of all of them, and what would change one of them waits for it.
    """
    now: list[Request] = []
    later: list[Request] = []
    sampled, trained, waiting = set(sampling), set[str | None](), set[str | None]()
    for request in queue:
        name, is_pass = request.adapter, request.sample is not None or request.train is not None
        if request.sample is not None:
            sampled.update(request.adapters)  # also while it waits: what it names must not change before its turn
        if not waiting.isdisjoint(request.adapters) or (not is_pass and (name in trained or (request.changes_samples and name in sampled))):
            if request.sample is None:
                waiting.add(name)
            later.append(request)
            continue
        if request.train is not None:
            trained.add(name)
        now.append(request)
    return now, later
