"""Futures and the order in which queued requests run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from veneer.engine.sampler import SampleRequest
from veneer.engine.trainer import PassRequest

T = TypeVar("T")


class EngineFuture(Generic[T]):
    """The answer to a queued request. Waiting for it runs the engine, so there is no thread and no polling.

    An ``await`` first lets every other coroutine that is ready queue its own work: ten loops that wait share one step.
    """

    def __init__(self, step: Callable[[], int]) -> None:
        self._step = step
        self._value: T | None = None
        self._error: BaseException | None = None
        self._done = False

    def set_result(self, value: T) -> None:
        self._value, self._done = value, True

    def set_error(self, error: BaseException) -> None:
        self._error, self._done = error, True

    def done(self) -> bool:
        return self._done

    def result(self) -> T:
        while not self._done:
            self._step()
        if self._error is not None:
            raise self._error
        return cast(T, self._value)

    def __await__(self) -> Generator[Any, None, T]:
        while not self._done:
            yield from asyncio.sleep(0).__await__()
            if not self._done:
                self._step()
        return self.result()


@dataclass
class Request:
    """A queued call: a sampling or training pass, which merges with others, or a barrier for its adapter alone."""

    adapter: str | None
    future: EngineFuture[Any]
    sample: SampleRequest | None = None
    train: PassRequest | None = None
    barrier: Callable[[], Any] | None = None


def plan(queue: list[Request]) -> tuple[list[Request], list[Request]]:
    """Split a queue into what can run in one step and what must wait.

    Passes of all adapters run together; a barrier (optimizer step, publish, save, load) runs when no pass of its adapter
    is ahead of it, and whatever the adapter queued behind a waiting barrier waits with it.
    """
    now: list[Request] = []
    later: list[Request] = []
    passing: set[str | None] = set()
    waiting: set[str | None] = set()
    for request in queue:
        if request.adapter in waiting or (request.barrier is not None and request.adapter in passing):
            waiting.add(request.adapter)
            later.append(request)
            continue
        if request.barrier is None:
            passing.add(request.adapter)
        now.append(request)
    return now, later
