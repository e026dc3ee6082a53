"""What a server hears while the engine works: callbacks of futures, and pieces of completions as they are drawn."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from engine_tools import FREE, GREEDY, add_random_adapter, at_rest, break_passes, finish, lora_engine, prompt

from veneer.engine.queue import EngineFuture
from veneer.types import AdamParams, LoraConfig, Piece, Sample, SamplingParams


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


# ---------------------------------------------------------------- pieces


@dataclass
class Ear:
    """Listens to a request, and holds what it heard against the order in which it must come."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[float]] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    calls: int = 0
    threads: set[int] = field(default_factory=set)

    def __call__(self, piece: Piece) -> None:
        assert piece.index not in self.reasons, "nothing comes behind the end"
        assert len(piece.tokens) == len(piece.logprobs)
        assert piece.tokens or piece.stop_reason
        self.calls += 1
        self.threads.add(threading.get_ident())
        self.tokens.setdefault(piece.index, []).extend(piece.tokens)
        self.logprobs.setdefault(piece.index, []).extend(piece.logprobs)
        if piece.stop_reason is not None:
            self.reasons[piece.index] = piece.stop_reason

    def expect(self, samples: list[Sample]) -> None:
        """What was told is what was answered, all of it and nothing twice."""
        assert sorted(self.reasons) == sorted(self.tokens) == list(range(len(samples)))
        for index, sample in enumerate(samples):
            assert self.tokens[index] == sample.tokens.tolist()
            assert np.array(self.logprobs[index], np.float32).tobytes() == sample.logprobs.tobytes()
            assert self.reasons[index] == sample.stop_reason


def test_pieces_make_up_the_completions_as_they_are_drawn() -> None:
    """A user reads along: tokens come while the rest is still being drawn, and the last piece says why it ends."""
    engine, ear = lora_engine(), Ear()
    params = SamplingParams(max_tokens=40, stop_token_ids=(2, 5, 9))
    future = engine.sample(prompt(6), None, params, n=6, on_piece=ear)
    heard = []
    while not future.done():
        engine.step()
        heard.append(sum(map(len, ear.tokens.values())))
    ear.expect(future.result())
    assert len(set(ear.reasons.values())) == 2, "some were meant to stop and some to run out"
    assert len(heard) > 3
    assert 0 < heard[0] <= 6 * 9
    assert heard == sorted(heard)
    assert ear.threads == {threading.get_ident()}
    quiet = lora_engine().sample(prompt(6), None, params, n=6).result()
    assert [s.logprobs.tobytes() for s in quiet] == [s.logprobs.tobytes() for s in future.result()]


def test_a_request_for_no_tokens_is_told_its_end() -> None:
    """A listener that waits for an end must get one."""
    engine, ear = lora_engine(), Ear()
    ear.expect(engine.sample(prompt(6), None, SamplingParams(max_tokens=0), n=2, on_piece=ear).result())


@pytest.mark.parametrize("threads", [1, 2])
def test_nothing_is_told_twice_where_rows_start_anew(threads: int) -> None:
    """Memory runs out midway and the engine begins again: the listener has heard the beginning already."""
    torch.set_num_threads(threads)
    try:
        engine, ears = lora_engine(), [Ear() for _ in range(8)]
        failures = [torch.OutOfMemoryError("CUDA out of memory") for _ in range(3)]
        passes = []
        break_passes(engine, lambda flat: passes.append(1) or (failures.pop() if len(passes) % 11 == 10 and failures else None))
        futures = [
            engine.sample(prompt(5 + i, i), None, SamplingParams(30, stop_token_ids=()), n=20, on_piece=ear) for i, ear in enumerate(ears)
        ]
        with pytest.warns(RuntimeWarning, match="out of memory"):
            finish(engine, futures)
        assert not failures
        for future, ear in zip(futures, ears, strict=True):
            ear.expect(future.result())
            assert ear.threads == {threading.get_ident()}
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("last", [False, True])
def test_a_listener_that_raises_fails_its_own_request_alone(last: bool) -> None:
    """One client's broken connection is not everybody's."""
    engine, ear = lora_engine(), Ear()

    def breaks(piece: Piece) -> None:
        if not last or piece.stop_reason is not None:
            raise OSError("the client is gone")

    bad = engine.sample(prompt(6), None, SamplingParams(20, stop_token_ids=()), n=2, on_piece=breaks)
    good = engine.sample(prompt(7), None, SamplingParams(20, stop_token_ids=()), n=2, on_piece=ear)
    finish(engine, [bad, good])
    with pytest.raises(OSError, match="client is gone"):
        bad.result()
    ear.expect(good.result())
    alone = lora_engine().sample(prompt(7), None, SamplingParams(20, stop_token_ids=()), n=2).result()
    assert [s.logprobs.tobytes() for s in good.result()] == [s.logprobs.tobytes() for s in alone]
    assert at_rest(engine)


def test_a_listener_may_give_its_request_up() -> None:
    """A server that has found what it looked for stops paying for the rest."""
    engine, told = lora_engine(), list[Piece]()

    def enough(piece: Piece) -> None:
        told.append(piece)
        future.cancel()

    future = engine.sample(prompt(6), None, SamplingParams(100, stop_token_ids=()), n=3, on_piece=enough)
    other = engine.sample(prompt(7), None, FREE)
    finish(engine, [future, other])
    assert len(told) == 1
    with pytest.raises(asyncio.CancelledError):
        future.result()
    assert len(other.result()[0].tokens) == 8
    assert at_rest(engine)
