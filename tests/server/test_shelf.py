"""Adapters in memory: who comes, who leaves for whom, and that nothing leaves the server before its adapter is proven."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest
from real_server import nano

from veneer.engine import LocalEngine, LoraEngine
from veneer.server import worker as working
from veneer.server.shelf import Shelf
from veneer.server.worker import Worker
from veneer.types import AdapterError, AttestationError, Checkpoint, LoraConfig, SamplingParams

ONE = LoraConfig(rank=1, train_unembed=False)
PROMPT = np.arange(1, 6)


def adapters(engine: LocalEngine, count: int, config: LoraConfig = ONE) -> list[Checkpoint]:
    found = []
    for seed in range(count):
        engine.create_adapter("maker", LoraConfig(rank=config.rank, train_unembed=config.train_unembed, seed=seed))
        found.append(engine.save_state("maker", "sampler").result())
        engine.remove_adapter("maker")
    return found


def on_a_shelf(work: Callable[[Shelf, list[Checkpoint]], Coroutine[Any, Any, None]], count: int = 4, **settings: Any) -> None:
    """``work`` with a shelf on an engine of its own, and some adapters."""
    engine = LoraEngine(nano())
    made = adapters(engine, count)
    worker = Worker([engine])
    try:
        asyncio.run(work(Shelf(worker, engine, **settings), made))
    finally:
        worker.stop()


def digest(checkpoint: Checkpoint) -> str:
    return checkpoint.adapter.digest


def size(checkpoint: Checkpoint) -> int:
    return sum(array.nbytes for array in checkpoint.weights.values())


def test_the_least_recently_used_leaves_when_the_room_is_full() -> None:
    """A budget in bytes holds whatever the ranks of the customers."""

    async def work(shelf: Shelf, made: list[Checkpoint]) -> None:
        shelf.room = 3 * size(made[0])
        for checkpoint in made:
            async with shelf.hold(digest(checkpoint), lambda checkpoint=checkpoint: checkpoint):
                pass
            async with shelf.hold(digest(made[0]), lambda: made[0]):  # used all the time
                pass
        assert [digest(c) in shelf for c in made] == [True, False, True, True]
        assert shelf.size == 3 * size(made[0])

    on_a_shelf(work)


def test_who_is_in_use_stays() -> None:
    """A full shelf must not take an adapter from under a request."""

    async def work(shelf: Shelf, made: list[Checkpoint]) -> None:
        async with shelf.hold(digest(made[0]), lambda: made[0]) as name:
            for checkpoint in made[1:]:
                async with shelf.hold(digest(checkpoint), lambda checkpoint=checkpoint: checkpoint):
                    pass
            assert digest(made[0]) in shelf
            engine = shelf.engine
            (sample,) = await shelf.worker.ask(engine, lambda: engine.sample(PROMPT, name, SamplingParams(max_tokens=2)))
            assert sample.adapter is not None
            assert sample.adapter.digest == digest(made[0])
        assert len(shelf) == 1

    on_a_shelf(work, most=1)


def test_a_proof_that_fails_is_told_behind_an_early_answer() -> None:
    """An answer may be drawn while the proof is; it must not get out if that fails, and the cause is the proof's, not what followed."""

    async def work(shelf: Shelf, made: list[Checkpoint]) -> None:
        proving = asyncio.Event()

        async def prove(name: str, checkpoint: Checkpoint) -> None:
            await proving.wait()
            raise AttestationError("it has no effect")

        shelf.prove = prove
        told = []

        async def told_too_early() -> None:
            async with shelf.hold(digest(made[0]), lambda: made[0], early=True):
                proving.set()
                told.append("an answer")

        async def taken_away() -> None:
            async with shelf.hold(digest(made[0]), lambda: made[0], early=True) as name:
                while digest(made[0]) in shelf:
                    await asyncio.sleep(0.01)
                await shelf.worker.ask(shelf.engine, lambda: shelf.engine.sample(PROMPT, name, SamplingParams(max_tokens=2)))

        async def patient() -> None:
            async with shelf.hold(digest(made[0]), lambda: made[0]):
                told.append("another one")

        for ask in (told_too_early, taken_away, patient):
            with pytest.raises(AttestationError, match="it has no effect"):
                await ask()
            assert digest(made[0]) not in shelf
        assert told == ["an answer"]

    on_a_shelf(work, count=1)


def test_many_who_ask_at_once_are_one_load_and_one_proof() -> None:
    """A burst of requests for a cold adapter."""

    async def work(shelf: Shelf, made: list[Checkpoint]) -> None:
        reads, proofs = [], []

        def read() -> Checkpoint:
            reads.append(1)
            return made[0]

        async def prove(name: str, checkpoint: Checkpoint) -> None:
            proofs.append(name)

        shelf.prove = prove

        async def ask() -> None:
            async with shelf.hold(digest(made[0]), read, early=len(proofs) % 2 == 0):
                await asyncio.sleep(0.01)

        await asyncio.gather(*(ask() for _ in range(20)))
        assert (len(reads), len(proofs)) == (1, 1)

    on_a_shelf(work, count=1)


def test_what_was_brought_is_there_and_proven_when_asked_for() -> None:
    """A snapshot is loaded from memory while its client is still being answered; what was stored of it must be sound when it is used."""

    async def work(shelf: Shelf, made: list[Checkpoint]) -> None:
        proofs, reads = [], []

        async def prove(name: str, checkpoint: Checkpoint) -> None:
            proofs.append(name)

        def read() -> Checkpoint:
            reads.append(1)
            return made[0]

        shelf.prove = prove
        await shelf.bring(digest(made[0]), made[0], read)
        assert shelf.size == size(made[0])
        assert not proofs
        assert not reads
        for _ in range(2):
            async with shelf.hold(digest(made[0]), read):
                assert proofs == [digest(made[0])]
                assert reads == [1]

        def broken() -> Checkpoint:
            raise AdapterError("the folder is damaged")

        await shelf.bring(digest(made[1]), made[1], broken)
        for _ in range(2):
            with pytest.raises(AdapterError, match="the folder is damaged"):
                await shelf.hold(digest(made[1]), broken).__aenter__()
            assert digest(made[1]) not in shelf

        other = dataclasses.replace(made[2], adapter=dataclasses.replace(made[2].adapter, base_digest="0" * 64))
        await shelf.bring(digest(other), other, lambda: other)
        assert digest(other) not in shelf
        with pytest.raises(AdapterError, match="was made for base"):
            await shelf.hold(digest(other), lambda: other).__aenter__()

    on_a_shelf(work)


@pytest.mark.parametrize("held", [False, True])
def test_a_crowd_is_drawn_together(monkeypatch: pytest.MonkeyPatch, held: bool) -> None:
    """The prompts of one batch arrive one after the other; read apart they would cost several times as much. ``held``: the event loop is
    kept from them for a while, as by other threads that want the interpreter."""
    monkeypatch.setattr(working, "PAUSE", 0.02 if held else 0.2)
    monkeypatch.setattr(working, "LONGEST", 5.0)

    async def work(shelf: Shelf, made: list[Checkpoint]) -> None:
        engine, together = shelf.engine, []
        step = engine.step

        def counting() -> int:
            together.append(len(engine._queue))
            return step()

        monkeypatch.setattr(engine, "step", counting)
        asked = []
        for _ in range(4):
            asked.append(shelf.worker.ask(engine, lambda: engine.sample(PROMPT, None, SamplingParams(max_tokens=2)), crowd=True))
            if held:
                time.sleep(0.05)
                for _ in range(4):
                    await asyncio.sleep(0)
            else:
                await asyncio.sleep(0.02)
        await asyncio.gather(*asked)
        assert max(together) == 4

    on_a_shelf(work, count=1)


def test_a_crowd_that_never_ends_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that ask one after the other keep nobody waiting for longer than ``LONGEST``."""
    monkeypatch.setattr(working, "PAUSE", 5.0)
    monkeypatch.setattr(working, "LONGEST", 0.1)

    async def work(shelf: Shelf, made: list[Checkpoint]) -> None:
        engine, began = shelf.engine, time.monotonic()
        await shelf.worker.ask(engine, lambda: engine.sample(PROMPT, None, SamplingParams(max_tokens=2)), crowd=True)
        assert 0.1 <= time.monotonic() - began < 4.0

    on_a_shelf(work, count=1)
