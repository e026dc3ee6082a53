"""What a server hears while the engine works: callbacks of futures, and pieces of completions as they are drawn."""

from __future__ import annotations

import threading

import pytest
from engine_tools import FREE, GREEDY, add_random_adapter, lora_engine, prompt

from veneer.engine.queue import EngineFuture
from veneer.types import AdamParams, LoraConfig


def test_a_callback_is_called_once_when_the_answer_is_there() -> None:
    """A server that is told twice would answer twice; one that is not told hangs."""
    engine, told = lora_engine(), list[object]()
    future = engine.sample(prompt(4), None, FREE)
    future.add_done_callback(told.append)
    future.add_done_callback(lambda f: told.append(len(f.result()[0].tokens)))
    engine.step()
    assert told == [future, 8]
    future.add_done_callback(told.append)
    assert told == [future, 8, future], "at once if it is there already"
    engine.step()
    assert len(told) == 3


@pytest.mark.parametrize("how", ["error", "cancelled", "removed"])
def test_a_callback_hears_of_failures_too(how: str) -> None:
    """An answer that is an error is an answer."""
    engine, told = lora_engine(), list[str]()
    add_random_adapter(engine, "x", LoraConfig(rank=2), seed=0)
    future = engine.optim_step("x", AdamParams()) if how == "error" else engine.sample(prompt(4), "x", FREE)
    future.add_done_callback(lambda f: told.append(type(f._error).__name__ + str(f.done())))
    if how == "error":
        engine.step()
    elif how == "cancelled":
        future.cancel()
    else:
        engine.remove_adapter("x")
    assert told == [{"error": "RunError", "cancelled": "CancelledError", "removed": "AdapterError"}[how] + "True"]
    engine.step()
    assert len(told) == 1


def test_a_callback_that_raises_is_logged_and_hurts_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """A bug in a handler must not stop the engine for everybody."""
    engine = lora_engine()
    futures = [engine.sample(prompt(4, seed), None, GREEDY) for seed in range(2)]
    futures[0].add_done_callback(lambda _: 1 // 0)
    assert [len(f.result()[0].tokens) for f in futures] == [8, 8]
    assert "ZeroDivisionError" in caplog.text


def test_callbacks_that_are_added_while_the_answer_comes_are_each_called_once() -> None:
    """A server's thread adds its callback at the very moment at which the engine's thread sets the result."""
    for _ in range(50):
        future: EngineFuture[int] = EngineFuture(lambda: 0, lambda _: None)
        told, start = list[int](), threading.Barrier(3)

        def add(first: int, future: EngineFuture[int] = future, told: list[int] = told, start: threading.Barrier = start) -> None:
            start.wait()
            for i in range(20):
                future.add_done_callback(lambda _, i=i: told.append(first + i))

        threads = [threading.Thread(target=add, args=(first,)) for first in (0, 100)]
        for thread in threads:
            thread.start()
        start.wait()
        future.set_result(1)
        for thread in threads:
            thread.join()
        assert sorted(told) == [*range(20), *range(100, 120)]
