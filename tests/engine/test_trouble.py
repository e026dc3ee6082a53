"""Cancelled, poisoned, too large, out of memory: one request's trouble stays its own."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from engine_tools import (
    FREE,
    POISON,
    Loop,
    add_random_adapter,
    at_rest,
    break_passes,
    clean,
    datum,
    differences,
    finish,
    gradients,
    live,
    lora_engine,
    memory_for,
    poisoned,
    prompt,
    relative_error,
    together,
)

from tiny_models import random_model
from veneer.engine import Base, LocalEngine, LoraEngine
from veneer.engine.cache import Bank
from veneer.types import AdamParams, DataError, LoraConfig, RunError, SamplingParams

STEP = AdamParams(learning_rate=1e-2)
REQUESTS = [(4, 9, 1), (30, 5, 3), (12, 40, 2), (7, 2, 4), (50, 20, 1)]
"""Prompt length, budget, n."""


def engine_xy() -> LocalEngine:
    engine = lora_engine()
    for i, name in enumerate("xy"):
        add_random_adapter(engine, name, LoraConfig(rank=4, alpha=8), seed=i)
    return engine


def ask(engine: LocalEngine, length: int, budget: int, n: int, name: str | None = "x"):
    return engine.sample(prompt(length), name, SamplingParams(budget, stop_token_ids=()), n)


def bits(future) -> list[tuple]:
    return [(s.tokens.tolist(), s.logprobs.tobytes(), s.stop_reason) for s in future.result()]


def wanted(name: str | None = "x") -> list[list[tuple]]:
    return [bits(ask(engine_xy(), *request, name)) for request in REQUESTS]


# ---------------------------------------------------------------- cancelling


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_cancelled_request_makes_room_and_changes_no_bit(steps: int) -> None:
    """Whoever hangs up must not slow down, or change, those who stay."""
    alone = wanted()
    engine = engine_xy()
    futures = [ask(engine, *request) for request in REQUESTS]
    gone = [ask(engine, 9, 100, 3, name) for name in ("x", "y", None)]
    for _ in range(steps):
        engine.step()
    assert [future.cancel() for future in gone] == [True] * 3
    assert [future.cancel() for future in gone] == [False] * 3
    assert [bits(future) for future in futures] == alone
    assert futures[0].cancel() is False
    for future in gone:
        with pytest.raises(asyncio.CancelledError):
            future.result()
    assert at_rest(engine)


def test_a_cancelled_task_cancels_what_it_awaits() -> None:
    """Timeouts and closed connections arrive as cancelled tasks."""
    alone = wanted()
    engine = engine_xy()

    async def one(request: tuple[int, int, int]) -> list[tuple]:
        return [(s.tokens.tolist(), s.logprobs.tobytes(), s.stop_reason) for s in await ask(engine, *request)]

    async def scenario() -> list[list[tuple]]:
        stays = [asyncio.create_task(one(request)) for request in REQUESTS]
        goes = asyncio.create_task(one((20, 100, 4)))
        for _ in range(3):
            await asyncio.sleep(0)
        goes.cancel()
        with pytest.raises(asyncio.CancelledError):
            await goes
        return await asyncio.gather(*stays)

    assert asyncio.run(scenario()) == alone
    assert at_rest(engine)


def test_a_cancelled_training_request_leaves_no_gradient() -> None:
    """What was given up before it ran must not be trained on."""
    engine = engine_xy()
    gone, kept = (engine.forward_backward(name, [datum(20)], "cross_entropy") for name in "xy")
    assert gone.cancel()
    kept.result()
    assert not any(g.any() for g in gradients(engine, "x").values())
    with pytest.raises(RunError, match="without a gradient"):
        engine.optim_step("x", STEP).result()


# ---------------------------------------------------------------- out of memory


@pytest.mark.parametrize("tokens", [55, 80])
@pytest.mark.parametrize("after", [0, 4], ids=["first-pass", "later-pass"])
def test_sampling_goes_on_with_fewer_rows_when_memory_runs_out(tokens: int, after: int) -> None:
    """An overnight run must not die because one step was too wide, and must say what it drew anyway."""
    alone = wanted()
    engine = engine_xy()
    futures = [ask(engine, *request) for request in REQUESTS[: 3 if after else None]]
    for _ in range(after):
        engine.step()
    futures += [ask(engine, *request) for request in REQUESTS[len(futures) :]]
    break_passes(engine, memory_for(tokens))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        finish(engine, futures)
    assert [bits(future) for future in futures] == alone
    assert any("out of memory" in str(w.message) for w in warned) or (tokens == 80 and after)
    assert at_rest(engine)


def test_long_completions_end_although_the_batch_is_tried_larger_again() -> None:
    """Where memory holds half of what was asked for, the other half comes later: nobody is started over and over."""
    requests = [(4 + i, 100, 1) for i in range(20)]
    engine, plain = engine_xy(), engine_xy()
    break_passes(engine, lambda flat: torch.OutOfMemoryError("CUDA out of memory") if len(flat.wanted) > 12 else None)
    futures = [ask(engine, *request) for request in requests]
    with pytest.warns(RuntimeWarning, match="out of memory"):
        finish(engine, futures)
    assert [bits(future) for future in futures] == [bits(ask(plain, *request)) for request in requests]


def test_running_out_of_memory_after_some_were_answered_asks_nothing_twice() -> None:
    """A request that has its answer must not be started again, nor trip the engine, when a later pass fails."""
    requests = [(6 + i % 8, 20, 1) for i in range(20)]
    alone = [bits(ask(engine_xy(), *request)) for request in requests]
    engine = engine_xy()
    short, futures = ask(engine, 5, 2, 1), [ask(engine, *request) for request in requests]
    first = bits(short)
    failures = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")]
    break_passes(engine, lambda flat: failures.pop() if failures else None)
    with pytest.warns(RuntimeWarning, match="out of memory"):
        finish(engine, futures)
    assert [bits(future) for future in futures] == alone
    assert bits(short) == first
    assert at_rest(engine)


def test_a_completion_that_is_too_large_alone_is_the_only_one_to_fail() -> None:
    """One clear line for the one who asked too much; the rest get what they get alone."""
    alone = wanted()[:3]
    engine = engine_xy()
    break_passes(engine, memory_for(70))
    futures = [ask(engine, *request) for request in REQUESTS[:3]]
    large = ask(engine, 90, 5, 2, "y")
    with pytest.warns(RuntimeWarning, match="out of memory"):
        finish(engine, [*futures, large])
    assert [bits(future) for future in futures] == alone
    with pytest.raises(RunError, match="out of memory"):
        large.result()
    assert at_rest(engine)


@pytest.mark.parametrize("place", ["claim", "move"])
def test_a_cache_that_cannot_grow_is_memory_that_ran_out_too(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values are the largest thing that grows, so this is where a GPU fails first."""
    alone = wanted()
    engine = engine_xy()
    limit = {"claim": 3, "move": 1}[place]
    inner = getattr(Bank, place)

    def tight(bank: Bank, *args):
        rows = bank.used + args[0] if place == "claim" else len(args[0])
        if rows > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return inner(bank, *args)

    requests = [request for request in REQUESTS if request[2] <= 3]
    monkeypatch.setattr(Bank, place, tight)
    futures = [ask(engine, *request) for request in requests]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        finish(engine, futures)
    assert [bits(future) for future in futures] == [alone[REQUESTS.index(request)] for request in requests]
    assert at_rest(engine)


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2"])
def test_training_goes_on_with_less_at_once_when_memory_runs_out(architecture: str) -> None:
    """The gradient of a batch is the same in however many passes it had to be made."""
    engine, alone = lora_engine(architecture), lora_engine(architecture)
    for e in (engine, alone):
        for i, name in enumerate("xy"):
            add_random_adapter(e, name, LoraConfig(rank=4, alpha=8), seed=i)
    break_passes(engine, memory_for(70))
    data = {name: [datum(n, seed + n) for n in (60, 9, 33, 21, 50)] for seed, name in enumerate("xy")}
    futures = {name: engine.forward_backward(name, data[name], "importance_sampling") for name in "xy"}
    with pytest.warns(RuntimeWarning, match="out of memory"):
        engine.step()
    for name, future in futures.items():
        reference = alone.forward_backward(name, data[name], "importance_sampling").result()
        assert future.result().metrics == pytest.approx(reference.metrics, rel=1e-5, abs=1e-6)
        for key, gradient in gradients(alone, name).items():
            assert relative_error(gradients(engine, name)[key], gradient) < 1e-6, key


def test_a_datum_that_is_too_large_alone_is_the_only_one_to_fail() -> None:
    """Half a gradient is worse than none: it is dropped, and the step says so."""
    engine, alone = engine_xy(), engine_xy()
    break_passes(engine, memory_for(70))
    bad = engine.forward_backward("x", [datum(20), datum(100), datum(30)], "cross_entropy")
    good = engine.forward_backward("y", [datum(40), datum(30)], "cross_entropy")
    with pytest.warns(RuntimeWarning, match="out of memory"):
        engine.step()
    with pytest.raises(RunError, match="out of memory"):
        bad.result()
    with pytest.raises(RunError, match="without a gradient"):
        engine.optim_step("x", STEP).result()
    assert not any(g.any() for g in gradients(engine, "x").values())
    reference = alone.forward_backward("y", [datum(40), datum(30)], "cross_entropy").result()
    assert good.result().metrics == pytest.approx(reference.metrics, rel=1e-6)
    for key, gradient in gradients(alone, "y").items():
        assert relative_error(gradients(engine, "y")[key], gradient) < 1e-6, key


# ---------------------------------------------------------------- poison


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_poisoned_prompt_fails_alone(steps: int, n: int) -> None:
    """A prompt that trips a kernel is its owner's problem."""
    pure = [r for r, found in zip(REQUESTS, wanted(), strict=True) if all(POISON not in tokens for tokens, _, _ in found)]
    assert len(pure) >= 3, "the poison was meant to be rare"
    pure = [request for request in pure if POISON not in prompt(request[0])]
    alone = [bits(ask(engine_xy(), *request)) for request in pure]
    engine = engine_xy()
    break_passes(engine, poisoned)
    futures = [ask(engine, *request) for request in pure]
    for _ in range(steps):
        engine.step()
    bad = engine.sample(np.array([5, POISON, 7]), "x", FREE, n)
    finish(engine, [*futures, bad])
    assert [bits(future) for future in futures] == alone
    with pytest.raises(ValueError, match="choked"):
        bad.result()
    assert at_rest(engine)


def poison() -> list:
    row = clean(12)
    row.tokens[5] = POISON
    return [clean(9), row]


def test_a_poisoned_datum_fails_alone() -> None:
    """The other adapters' gradients have the bits that they have without it; the failed one's are dropped."""
    engine, alone = engine_xy(), engine_xy()
    break_passes(engine, poisoned)
    engine.forward_backward("x", [clean(30)], "cross_entropy").result()
    bad = engine.forward_backward("x", poison(), "cross_entropy")
    good = engine.forward_backward("y", [clean(20), clean(30)], "cross_entropy")
    watched = engine.forward(None, [clean(15)], "cross_entropy")
    engine.step()
    with pytest.raises(ValueError, match="choked"):
        bad.result()
    with pytest.raises(RunError, match="without a gradient"):
        engine.optim_step("x", STEP).result()
    reference = alone.forward_backward("y", [clean(20), clean(30)], "cross_entropy").result()
    assert good.result().metrics == reference.metrics
    assert watched.result().metrics == alone.forward(None, [clean(15)], "cross_entropy").result().metrics
    for key, gradient in gradients(alone, "y").items():
        assert torch.equal(gradients(engine, "y")[key], gradient), key


@pytest.mark.parametrize("first", ["good", "bad"])
def test_a_failed_half_of_a_gradient_is_never_stepped_on(first: str) -> None:
    """Two requests of one adapter in one step, one of which fails: the step must say so, or take exactly the good one's gradient."""
    engine, alone = engine_xy(), engine_xy()
    for e in (engine, alone):  # a first step, so that the check of untouched targets is behind us
        e.forward_backward("x", [clean(30)], "cross_entropy").result()
        e.optim_step("x", STEP).result()
    break_passes(engine, poisoned)
    orders = {"good": [clean(20, 3)], "bad": poison()}
    for kind in sorted(orders, key=lambda kind: kind != first):
        engine.forward_backward("x", orders[kind], "cross_entropy")
    engine.step()
    alone.forward_backward("x", [clean(20, 3)], "cross_entropy").result()
    step, wanted_step = engine.optim_step("x", STEP), alone.optim_step("x", STEP)
    engine.step()
    norm = None if isinstance(step._error, RunError) else step.result()["grad_norm"]
    assert norm in (None, wanted_step.result()["grad_norm"])


def test_a_loop_that_raises_leaves_the_others_bits() -> None:
    """One experiment's bug, between two of its requests, is not the other nine's."""
    loops = [Loop("a", rounds=3), Loop("b", lengths=(30,), budgets=(20,), fails_after=1, rounds=3), Loop("c", rank=1, rounds=3)]
    engine = lora_engine()
    found = together(engine, loops)
    assert isinstance(found[1], ValueError)
    for i in (0, 2):
        assert differences(found[i], asyncio.run(live(lora_engine(), loops[i]))) == []
    assert at_rest(engine)


def test_a_prompt_as_long_as_the_context_is_refused_on_arrival() -> None:
    """There is no room for a token; the one who asked hears it in one line, and nobody else."""
    alone = wanted()
    engine = engine_xy()
    futures = [ask(engine, *request) for request in REQUESTS]
    engine.step()
    with pytest.raises(DataError, match="128 tokens") as caught:
        ask(engine, 128, 5, 1)
    assert "\n" not in str(caught.value)
    assert [bits(future) for future in futures] == alone
    assert len(ask(engine, 127, 5, 1).result()[0].tokens) == 1
    assert at_rest(engine)


def test_many_rounds_leave_nothing_behind() -> None:
    """A service that runs for weeks must not grow with every request."""
    engine = engine_xy()
    sizes = []
    for turn in range(12):
        futures = [ask(engine, 1 + (7 * i + turn) % 60, 1 + (5 * i) % 30, 1 + i % 3, "xy"[i % 2]) for i in range(10)]
        futures[turn % 10].cancel()
        for future in futures:
            if not future.done():
                future.result()
        assert at_rest(engine), turn
        sizes.append(sum(bank.slots for crew in engine._sampler.crews for bank in crew.banks.values()))
    assert sizes[-1] <= 64, "slots for at most the rows that ran together"
    assert len(engine._stack._kept_parts) < 10


def lanes_but(others: set[threading.Thread]) -> set[threading.Thread]:
    """Of engines that others do not belong to."""
    return {thread for thread in threading.enumerate() if thread.name == "veneer-lane"} - others


def test_rounds_of_sampling_and_training_start_no_new_threads() -> None:
    """Sampling may use two threads where training passes use one each: a thread left over from every change would pile up for days."""
    before, others = torch.get_num_threads(), lanes_but(set())
    torch.set_num_threads(2)
    try:
        engine = LoraEngine(Base("qwen3", random_model("qwen3"), None), patience=60)
        engine.create_adapter("a", LoraConfig(rank=2))
        counts = []
        for _ in range(4):
            engine.sample(prompt(5), "a", FREE).result()
            engine.forward_backward("a", [datum(9), datum(7)], "cross_entropy").result()
            counts.append(len(lanes_but(others)))
        assert counts[0] > 0
        assert len(set(counts)) == 1
    finally:
        torch.set_num_threads(before)


def test_an_engine_that_is_gone_leaves_no_threads() -> None:
    """A laboratory opens one for every base and kind of weights, a hundred times in an evening."""
    before, others = torch.get_num_threads(), lanes_but(set())
    try:
        engine = LoraEngine(Base("qwen3", random_model("qwen3"), None), patience=60, threads=2)
        engine.create_adapter("a", LoraConfig(rank=2))
        engine.sample(prompt(5), "a", FREE).result()
        engine.forward_backward("a", [datum(9), datum(7)], "cross_entropy").result()
        lanes = lanes_but(others)
        assert lanes
        del engine
        gc.collect()
        for lane in lanes:
            lane.join(10)
        assert not any(lane.is_alive() for lane in lanes)
    finally:
        torch.set_num_threads(before)


def test_only_the_lanes_share_their_products() -> None:
    """A second thread with helpers makes GNU's OpenMP put all helpers to sleep after every product, and sampling takes twice as long:
    whoever asks a patient engine, and every thread that starts later, computes alone."""
    before, found = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        engine = LoraEngine(Base("qwen3", random_model("qwen3"), None), patience=60, threads=2)

        def ask() -> None:
            engine.create_adapter("a", LoraConfig(rank=2))
            engine.sample(prompt(5), "a", FREE).result()
            engine.forward_backward("a", [datum(9), datum(7)], "cross_entropy").result()
            found.append(torch.get_num_threads())

        engine.sample(prompt(5), None, FREE).result()
        for work in (ask, lambda: found.append(torch.get_num_threads())):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        assert found == [1, 1]
        assert torch.get_num_threads() == 1
        assert engine._sampler._lanes.run_one(torch.get_num_threads) == 2
    finally:
        torch.set_num_threads(before)


def test_engines_side_by_side_share_their_threads() -> None:
    """A server of two bases has the helpers of one."""
    before, others = torch.get_num_threads(), lanes_but(set())
    torch.set_num_threads(1)
    try:
        first = LoraEngine(Base("qwen3", random_model("qwen3"), None), patience=60, threads=2)
        first.sample(prompt(5), None, FREE).result()
        lanes = lanes_but(others)
        second = LoraEngine(Base("llama", random_model("llama"), None), beside=first)
        second.create_adapter("a", LoraConfig(rank=2))
        second.sample(prompt(5), "a", FREE).result()
        assert lanes_but(others) == lanes
        alone = LoraEngine(Base("llama", random_model("llama"), None)).sample(prompt(5), None, FREE).result()
        assert np.array_equal(second.sample(prompt(5), None, FREE).result()[0].tokens, alone[0].tokens)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("verb", ["sample", "train"])
def test_a_pass_that_never_returns_is_left_behind_alone(verb: str) -> None:
    """A stuck kernel must not take the other experiments down with it: its request fails, the others are answered."""
    engine, calm = (LoraEngine(Base("qwen3", random_model("qwen3"), None), patience=patience) for patience in (0.5, None))
    for e in (engine, calm):
        for name in "ab":
            e.create_adapter(name, LoraConfig(rank=2))
    bad = 96
    method = "infer" if verb == "sample" else "train"
    run = getattr(engine._stack, method)

    def stuck(flat, *args, **kwargs):
        if bad in flat.tokens:
            time.sleep(4)
        return run(flat, *args, **kwargs)

    setattr(engine._stack, method, stuck)
    ids, stuck_ids = np.arange(5, 15), np.array([5, bad, 7])

    def ask(e: LocalEngine, name: str, tokens: np.ndarray):
        if verb == "sample":
            return e.sample(tokens, name, SamplingParams(max_tokens=2, temperature=0.0, stop_token_ids=()))
        row = datum(len(tokens))
        return e.forward_backward(name, [dataclasses.replace(row, tokens=tokens)], "cross_entropy")

    lost, kept, alone = ask(engine, "a", stuck_ids), ask(engine, "b", ids), ask(calm, "b", ids)
    with pytest.raises(RunError, match="did not return"):
        lost.result()
    found, wanted = kept.result(), alone.result()
    if verb == "sample":
        assert found[0].tokens.tolist() == wanted[0].tokens.tolist()
        assert np.array_equal(found[0].logprobs, wanted[0].logprobs)
    else:
        assert found.metrics == wanted.metrics
