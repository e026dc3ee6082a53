"""The one thread on which engines run, and the way to it from the event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

from veneer.types import Engine, Future, RunError

T = TypeVar("T")
LOG = logging.getLogger("veneer.server")
PAUSE, LONGEST = 0.002, 0.05
"""Seconds within which another request of a crowd comes, if any does, and for which an engine that has nothing to do waits at most."""
TURNS = 8
"""Of the event loop after that, which may have been kept from what came: from a socket to ``Worker.ask`` a request takes some."""
LAST_STEP = 30.0
"""Seconds that a step may take when the server ends."""


class Worker:
    """Engines are single-threaded: whatever is asked of them is asked here. Everything that has arrived is queued on its engine before
    the next step, so that the steps of many clients are merged."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = list(engines)
        self.turned = time.monotonic()
        """When the thread began the turn that it is in."""
        self.on_answer: list[Callable[[Engine, object], None]] = []
        """Called with every answer of an engine, on the engines' thread."""
        self._calls: deque[Callable[[], None]] = deque()
        self._awake = threading.Event()
        self._open: dict[Engine, set[Future[object]]] = {engine: set() for engine in engines}
        self._stopping = self._crowd = False
        self._end_of_crowd: asyncio.Handle | None = None
        self._thread = threading.Thread(target=self._work, name="veneer-engines", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    @property
    def waiting(self) -> int:
        """Requests that the engines have not answered."""
        return sum(len(futures) for futures in self._open.values())

    def stop(self) -> None:
        """End the thread after the step at hand; one that hangs is left behind."""
        self._stopping = True
        self._awake.set()
        self._thread.join(LAST_STEP)

    # ------------------------------------------------ from the event loop

    def run(self, call: Callable[[], T]) -> asyncio.Future[T]:
        """``call`` between two steps, on the engines' thread. Await the result."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def do() -> None:
            try:
                result = call()
            except Exception as error:
                loop.call_soon_threadsafe(_set_error, answer, error)
            else:
                loop.call_soon_threadsafe(_set_result, answer, result)

        self._post(do)
        return answer

    def ask(self, engine: Engine, call: Callable[[], Future[T]], *, crowd: bool = False) -> asyncio.Future[T]:
        """Queue what ``call`` asks of an engine, in the order of these calls. Await the answer; cancelling it gives the request up.
        ``crowd``: others like it may follow at once, as a client asks for all the prompts of a batch, and are cheaper together."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()
        asked: list[Future[T]] = []
        if crowd:
            self._expect_more(loop)

        def do() -> None:
            if answer.cancelled():
                return
            try:
                future = call()
            except Exception as error:
                loop.call_soon_threadsafe(_set_error, answer, error)
                return
            asked.append(future)
            self._open[engine].add(future)
            future.add_done_callback(done)

        def done(future: Future[T]) -> None:
            self._open[engine].discard(future)
            try:
                result = future.result()
            except BaseException as error:
                loop.call_soon_threadsafe(_set_error, answer, error)
            else:
                for look in self.on_answer:
                    look(engine, result)
                loop.call_soon_threadsafe(_set_result, answer, result)

        def give_up() -> None:
            for future in asked:
                future.cancel()

        answer.add_done_callback(lambda answer: self._post(give_up) if answer.cancelled() else None)
        self._post(do)
        return answer

    def _expect_more(self, loop: asyncio.AbstractEventLoop) -> None:
        self._crowd = True
        if self._end_of_crowd is not None:
            self._end_of_crowd.cancel()
        self._end_of_crowd = loop.call_later(PAUSE, self._look_again, loop, TURNS)

    def _look_again(self, loop: asyncio.AbstractEventLoop, turns: int) -> None:
        if turns:
            self._end_of_crowd = loop.call_soon(self._look_again, loop, turns - 1)
        else:
            self._crowd, self._end_of_crowd = False, None
            self._awake.set()

    def _post(self, call: Callable[[], None]) -> None:
        self._calls.append(call)
        self._awake.set()

    # ------------------------------------------------ the thread

    def _work(self) -> None:
        while not self._stopping:
            idle = not any(self._open.values())
            if idle:
                self._awake.wait()
            self.turned = time.monotonic()
            self._take_in()
            while idle and self._crowd and (left := self.turned + LONGEST - time.monotonic()) > 0 and self._awake.wait(left):
                self._take_in()
            for engine in self.engines:
                if self._open[engine]:
                    self._step(engine)

    def _take_in(self) -> None:
        self._awake.clear()
        while self._calls:
            self._do(self._calls.popleft())

    def _do(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception:  # one broken call must not end the thread that answers everybody
            LOG.exception("a call on the engines' thread failed")

    def _step(self, engine: Engine) -> None:
        try:
            engine.step()
        except Exception:
            LOG.exception("a step of %s failed; what waits on it fails with it", engine.base_id)
            for future in list(self._open[engine]):
                future.cancel()


def _set_result(answer: asyncio.Future[T], result: T) -> None:
    if not answer.done():
        answer.set_result(result)


def _set_error(answer: asyncio.Future[T], error: BaseException) -> None:
    if not answer.done():
        given_up = RunError("the request was given up, as the engine failed or the server ends; the server's log says more")
        answer.set_exception(error if isinstance(error, Exception) else given_up)
