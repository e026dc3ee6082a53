"""Futures and the order in which queued requests run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from veneer.engine.batch import SampleRequest
from veneer.engine.packing import PassRequest
from veneer.types import AdamParams

T = TypeVar("T")


class EngineFuture(Generic[T]):
    """The answer to a queued request. Waiting for it runs the engine, so there is no thread and no polling.

    An ``await`` first lets every other coroutine that is ready queue its own work: ten loops that wait share one step.
    """

    def __init__(self, step: Callable[[], int], cancel: Callable[[EngineFuture[Any]], None]) -> None:
        self._step, self._cancel = step, cancel
        self._value: T | None = None
        self._error: BaseException | None = None
        self._done = False

    def set_result(self, value: T) -> None:
        self._value, self._done = value, True

    def set_error(self, error: BaseException) -> None:
        self._error, self._done = error, True

    def done(self) -> bool:
        return self._done

    def cancel(self) -> bool:
        """Give the request up and free its place in the batch. False: it is answered already. A cancelled task cancels what it awaits."""
        if self._done:
            return False
        self.set_error(asyncio.CancelledError())
        self._cancel(self)
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
    sample: SampleRequest | None = None
    train: PassRequest | None = None
    optim: AdamParams | None = None
    need_gradient: bool = True
    """An optimizer step that is refused where no gradient waits."""
    barrier: Callable[[], Any] | None = None
    changes_samples: bool = False
    """A barrier that replaces what completions are drawn from."""


def plan(queue: list[Request], sampling: set[str | None]) -> tuple[list[Request], list[Request]]:
    """Split a queue into what can run in one step and what must wait.

    Passes of all adapters run together. A barrier (optimizer step, publish, save, load) runs when no training pass of its
    adapter is ahead of it, and one that changes what is sampled when no completion of its adapter is ahead of it or running
    (``sampling``). Whatever the adapter queued behind a waiting barrier waits with it.
    """
    now: list[Request] = []
    later: list[Request] = []
    sampled, trained, waiting = set(sampling), set[str | None](), set[str | None]()
    for request in queue:
        name, is_pass = request.adapter, request.sample is not None or request.train is not None
        if name in waiting or (not is_pass and (name in trained or (request.changes_samples and name in sampled))):
            waiting.add(name)
            later.append(request)
            continue
        if request.sample is not None:
            sampled.add(name)
        elif request.train is not None:
            trained.add(name)
        now.append(request)
    return now, later
