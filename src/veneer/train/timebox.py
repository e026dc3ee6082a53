"""A limit on how long an environment may take, also when it never gives control back."""

from __future__ import annotations

import asyncio
import math
import signal
import threading
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from veneer.turns import Turns, taking_turns

T = TypeVar("T")

SLICES = 8
"""An environment call is given up after this many equal waits."""


class EnvFailure(Exception):
    """An environment raised, hung or returned nonsense. Recorded on its trajectory, never fatal by itself."""


class _Ring(BaseException):
    """The alarm. Not an Exception, so that an environment's own ``except Exception`` does not swallow it."""


class _Guarded(Generic[T]):
    """Calls and awaits with an alarm around every stretch in which the thread is held, by a coroutine or by a plain function."""

    def __init__(self, call: Callable[[], Awaitable[T]], seconds: float) -> None:
        self.call, self.seconds = call, seconds

    def __await__(self) -> Generator[Any, None, T]:
        steps: Generator[Any, Any, T] | None = None
        thrown: BaseException | None = None
        while True:
            with alarm(self.seconds):
                steps = self.call().__await__() if steps is None else steps
                try:
                    waiting_for = next(steps) if thrown is None else steps.throw(thrown)
                except StopIteration as end:
                    return end.value
            thrown = None
            try:
                yield waiting_for
            except GeneratorExit:
                steps.close()
                raise
            except BaseException as error:  # a cancellation: a time limit inside of the environment makes something of its own
                thrown = error


@contextmanager
def alarm(seconds: float) -> Generator[None, None, None]:
    """Raise ``_Ring`` in this thread after ``seconds``. Works where Unix signals do: on the main thread, for Python code."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(_signal: int, _frame: object) -> None:
        raise _Ring

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)  # it rings again for code that swallows the first
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


async def in_env(call: Callable[[], Awaitable[T]], what: str, seconds: float) -> T:
    """Call and await an environment's method.

    The time that it waits is counted in slices, because the engine computes on this thread: a slice in which the loop was busy
    with a long forward pass counts as one slice, not as the environment's delay. A slice in which something that it asked for has
    not had its turn yet is not counted either.

    Raises:
        EnvFailure: it raised, or took longer than ``seconds``.
    """
    turns, slices = Turns(), 0
    with taking_turns(turns):
        task = asyncio.ensure_future(_in_task(call, seconds))
    try:
        while slices < SLICES:
            await asyncio.wait({task}, timeout=seconds / SLICES)
            if task.cancelled():
                raise RuntimeError("it was cancelled from inside")
            if task.done():
                return task.result()
            slices += not turns.waiting
        raise TimeoutError
    except (TimeoutError, _Ring) as error:
        raise EnvFailure(f"{what} took longer than {seconds:g} s") from error
    except Exception as error:  # whatever the user's code raises belongs to its rollout
        raise EnvFailure(f"{what} raised {type(error).__name__}: {error}") from error
    finally:
        task.cancel()


async def _in_task(call: Callable[[], Awaitable[T]], seconds: float) -> T:
    return await _Guarded(call, seconds)


def expect(answer: Any, kind: type[T], what: str) -> T:
    """The answer, if it is of the promised kind.

    Raises:
        EnvFailure: it is not.
    """
    if not isinstance(answer, kind):
        raise EnvFailure(f"{what} returned {answer!r:.80}, not a {kind.__name__}")
    return answer


def checked_number(value: Any, what: str) -> float:
    """The value as a finite float.

    Raises:
        EnvFailure: it is not a number, or NaN or infinite.
    """
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise EnvFailure(f"{what} {value!s:.80} must be a finite number")
    return number


def checked_metrics(metrics: Any) -> dict[str, float]:
    """The metrics as finite floats by name.

    Raises:
        EnvFailure: they are no mapping from names to numbers.
    """
    return {str(name): checked_number(value, f"step's metric {name!r}") for name, value in expect(metrics, dict, "step's metrics").items()}
