"""Environments are other people's code: they hang, raise and return nonsense."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest

from veneer.train.timebox import EnvFailure, checked_number, in_env
from veneer.turns import in_line


async def answer() -> int:
    await asyncio.sleep(0.01)
    return 7


async def spin() -> int:
    while True:
        pass


async def spin_stubbornly() -> int:
    try:
        while True:
            pass
    except TimeoutError:
        while True:
            pass


async def spin_late() -> int:
    await asyncio.sleep(0.01)
    while True:
        pass


async def block() -> int:
    time.sleep(30)
    return 1


async def wait() -> int:
    await asyncio.sleep(100)
    return 1


async def crash() -> int:
    raise ZeroDivisionError("by\nzero")


def test_answers_pass_through() -> None:
    """A well-behaved environment notices nothing."""
    assert asyncio.run(in_env(answer, "step", 5)) == 7


@pytest.mark.parametrize("body", [spin, spin_stubbornly, spin_late, block, wait])
def test_what_hangs_is_ended(body: Callable[[], Awaitable[int]]) -> None:
    """One endless loop in a grader must not hold up a run for ever."""
    clock = time.perf_counter()
    with pytest.raises(EnvFailure, match=r"step took longer than 0\.2 s"):
        asyncio.run(in_env(body, "step", 0.2))
    assert time.perf_counter() - clock < 5


def test_what_raises_is_named() -> None:
    """The user wants to know what their code said."""
    with pytest.raises(EnvFailure, match="step raised ZeroDivisionError: by"):
        asyncio.run(in_env(crash, "step", 1))


def test_what_is_no_coroutine_is_named() -> None:
    """``def step`` in place of ``async def step`` is an easy mistake."""
    plain: Any = 3
    with pytest.raises(EnvFailure, match="step raised"):
        asyncio.run(in_env(lambda: plain, "step", 1))


def test_others_go_on() -> None:
    """Members of a group run side by side; one that hangs takes only itself down."""

    async def all_at_once() -> list[Any]:
        calls = [in_env(body, "step", 0.3) for body in (answer, wait, spin_late, crash, answer)]
        return await asyncio.gather(*calls, return_exceptions=True)

    results = asyncio.run(all_at_once())
    assert [r if r == 7 else type(r) for r in results] == [7, EnvFailure, EnvFailure, EnvFailure, 7]


def test_only_the_environments_own_time_counts() -> None:
    """While an environment waits 50 ms for two packets, the engine decodes for a second on the same thread. That is not the
    environment's fault, and a result that depends on it would differ from machine to machine."""

    async def patient() -> int:
        await asyncio.sleep(0.05)
        await asyncio.sleep(0.05)
        return 7

    async def decode() -> None:
        await asyncio.sleep(0)
        time.sleep(1.0)

    async def both() -> list[Any]:
        return await asyncio.gather(in_env(patient, "step", 0.4), decode())

    assert asyncio.run(both())[0] == 7


def test_a_queue_is_not_the_environments_own_time() -> None:
    """One thing at a time: the last begins three seconds after it was asked for, and its half second begins then. What hangs when its turn
    has come is ended all the same."""
    pool = ThreadPoolExecutor(1)

    async def queued(seconds: float) -> int:
        begun = threading.Event()
        in_line(begun)
        return await asyncio.wrap_future(pool.submit(lambda: (begun.set(), time.sleep(seconds), 7)[2]))

    async def several() -> list[Any]:
        calls = [in_env(partial(queued, seconds), "step", 0.5) for seconds in (0.2, 0.2, 0.2, 0.2, 0.2, 2.0, 0.2)]
        return await asyncio.gather(*calls, return_exceptions=True)

    *first, hanging, last = asyncio.run(several())
    assert first == [7] * 5
    assert isinstance(hanging, EnvFailure)
    assert last == 7
    pool.shutdown()


def test_alarms_are_put_back() -> None:
    """A signal handler left behind would kill the program later."""

    def mine(_signum: int, _frame: object) -> None:
        raise AssertionError("rang")

    previous = signal.signal(signal.SIGALRM, mine)
    try:
        for body in (answer, wait, spin, crash):
            with contextlib.suppress(EnvFailure):  # three of the four fail; what counts is what they leave behind
                asyncio.run(in_env(body, "step", 0.1))
        assert signal.getsignal(signal.SIGALRM) is mine
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    finally:
        signal.signal(signal.SIGALRM, previous)


def test_an_environments_own_time_limit_works_inside() -> None:
    """asyncio's limits cancel from within; what they cancel must see it, or a slow judge would end the run."""

    async def limited() -> str:
        try:
            async with asyncio.timeout(0.05):
                await asyncio.sleep(5)
        except TimeoutError:
            return "its own limit"
        return "none"

    assert asyncio.run(in_env(limited, "step", 2.0)) == "its own limit"


def test_what_is_given_up_can_clean_up() -> None:
    """A connection that is waited on is closed, not forgotten."""
    closed: list[str] = []

    async def holding() -> None:
        try:
            await asyncio.sleep(5)
        finally:
            await asyncio.sleep(0)
            closed.append("closed")

    async def both() -> None:
        with pytest.raises(EnvFailure, match="took longer"):
            await in_env(holding, "step", 0.1)
        await asyncio.sleep(0.05)

    asyncio.run(both())
    assert closed == ["closed"]


def test_an_environment_that_cancels_itself_fails_alone() -> None:
    """A cancellation that is nobody's must not take the loop down."""

    async def cancelled() -> None:
        raise asyncio.CancelledError

    with pytest.raises(EnvFailure, match="cancelled from inside"):
        asyncio.run(in_env(cancelled, "step", 0.5))


def test_works_in_other_threads() -> None:
    """Signals do not reach threads; what waits is ended all the same."""
    results: list[object] = []

    def run() -> None:
        for body in (answer, wait):
            try:
                results.append(asyncio.run(in_env(body, "step", 0.2)))
            except EnvFailure as error:
                results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    assert results[0] == 7
    assert isinstance(results[1], EnvFailure)


@pytest.mark.parametrize(
    "reward", [None, float("nan"), float("inf"), -float("inf"), "high", [], {}, object(), np.float32("nan"), np.zeros(2)]
)
def test_rewards_must_be_finite_numbers(reward: object) -> None:
    """One NaN in a group makes NaN of all its advantages, and then of the adapter."""
    with pytest.raises(EnvFailure, match="must be a finite number"):
        checked_number(reward, "step")


@pytest.mark.parametrize("reward", [0, 1, True, -2.5, np.float32(0.5), np.int64(3)])
def test_numbers_are_rewards(reward: Any) -> None:
    """Graders return bools and numpy scalars."""
    checked = checked_number(reward, "step")
    assert type(checked) is float
    assert checked == float(reward)
