"""Many loops over one engine: merged, in order, and each with its own errors."""

from __future__ import annotations

import asyncio
import dataclasses

import numpy as np
import pytest
from engine_tools import (
    FREE,
    GREEDY,
    add_random_adapter,
    count_passes,
    datum,
    full_engine,
    lora_engine,
    no_gradients,
    prompt,
    row_bytes,
    sampled_datum,
    scrambled,
)

from veneer.engine import LocalEngine
from veneer.types import AdamParams, DataError, LoraConfig, RequestError, RunError, SamplingParams

STEP = AdamParams(learning_rate=1e-2)
SMALL = LoraConfig(rank=2, alpha=4)


def engine_with(*names: str) -> LocalEngine:
    engine = lora_engine()
    for i, name in enumerate(names):
        add_random_adapter(engine, name, SMALL, seed=i)
    return engine


async def rollouts(engine: LocalEngine, name: str, rounds: int) -> list[list[int]]:
    found = []
    for i in range(rounds):
        samples = await engine.sample(prompt(3 + i), name, FREE, n=2)
        found += [s.tokens.tolist() for s in samples]
    return found


def test_eight_sampling_loops_cost_about_one() -> None:
    """Ten experiments at once are worth it only if they share forward passes."""
    names = [f"a{i}" for i in range(8)]
    engine = engine_with(*names)
    calls = count_passes(engine)
    alone = asyncio.run(rollouts(engine, "a3", 4))
    one = len(calls)
    calls.clear()

    async def all_loops() -> list[list[list[int]]]:
        return await asyncio.gather(*(rollouts(engine, name, 4) for name in names))

    found = asyncio.run(all_loops())
    assert one == 4 * 8, "a prefill and seven decoding steps for each of four rounds"
    assert len(calls) == one
    assert found[3] == alone


def test_eight_training_loops_cost_about_one() -> None:
    """Forward, backward and step of all loops merge too, and each learns what it learns alone."""
    names = [f"a{i}" for i in range(8)]

    async def train(engine: LocalEngine, name: str, seed: int) -> list[float]:
        losses = []
        for _ in range(3):
            (sample,) = await engine.sample(prompt(4, seed), name, FREE)
            row = sampled_datum(prompt(4, seed), sample.tokens, sample.logprobs, sample.adapter)
            output = await engine.forward_backward(name, [row, datum(9, seed)], "ppo")
            await engine.optim_step(name, STEP)
            await engine.publish(name)
            losses.append(output.metrics["loss:sum"])
        return losses

    async def all_loops(engine: LocalEngine) -> list[list[float]]:
        return await asyncio.gather(*(train(engine, name, i) for i, name in enumerate(names)))

    engine, single = engine_with(*names), engine_with(*names)
    calls, single_calls = count_passes(engine), count_passes(single)
    found = asyncio.run(all_loops(engine))
    alone = asyncio.run(train(single, "a5", 5))
    assert len(single_calls) == 3 * (8 + 1)
    assert len(calls) == len(single_calls)
    assert found[5] == pytest.approx(alone, rel=1e-4)
    assert len({losses[-1] for losses in found}) == 8


def test_requests_of_one_adapter_keep_their_order() -> None:
    """Submitted without waiting: the forward behind the step sees the new weights, the one before it the old."""
    engine, patient = engine_with("x"), engine_with("x")
    row = datum(9)
    before = engine.forward("x", [row], "cross_entropy")
    gradient = engine.forward_backward("x", [row], "cross_entropy")
    step = engine.optim_step("x", STEP)
    after = engine.forward("x", [row], "cross_entropy")
    stale = engine.sample(prompt(5), "x", FREE)
    published = engine.publish("x")
    fresh = engine.sample(prompt(5), "x", FREE)
    fresh.result()
    assert all(f.done() for f in (before, gradient, step, after, stale, published))
    wanted = [patient.forward("x", [row], "cross_entropy").result().metrics["loss:sum"]]
    patient.forward_backward("x", [row], "cross_entropy").result()
    patient.optim_step("x", STEP).result()
    wanted.append(patient.forward("x", [row], "cross_entropy").result().metrics["loss:sum"])
    assert [f.result().metrics["loss:sum"] for f in (before, after)] == pytest.approx(wanted, rel=1e-6)
    assert abs(wanted[1] - wanted[0]) > 1e-2
    assert stale.result()[0].adapter.version == 0
    assert fresh.result()[0].adapter == published.result()
    assert published.result().version == 1


def test_barrier_of_one_adapter_does_not_hold_up_another() -> None:
    """A slow loop's optimizer step must not stall the other nine."""
    engine = engine_with("a", "b")
    a = [engine.forward_backward("a", [datum(9)], "cross_entropy"), engine.optim_step("a", STEP), engine.publish("a")]
    a.append(engine.sample(prompt(4), "a", FREE))
    b = [engine.forward("b", [datum(9)], "cross_entropy"), engine.sample(prompt(4), "b", FREE)]
    base = engine.sample(prompt(4), None, FREE)
    engine.step()
    assert [f.done() for f in a] == [True, False, False, False]
    assert b[0].done()
    engine.step()
    assert [f.done() for f in a[:3]] == [True, True, True]
    base.result()
    a[3].result()
    assert b[1].done(), "started no later than a's"
    assert engine.step() == 0


def test_result_and_await_agree() -> None:
    """Scripts use one, loops the other."""
    one, other = engine_with("x"), engine_with("x")

    async def awaited() -> tuple[list[int], float, str]:
        samples, output = await asyncio.gather(other.sample(prompt(5), "x", FREE), other.forward("x", [datum(9)], "dro"))
        return samples[0].tokens.tolist(), output.metrics["loss:sum"], (await other.publish("x")).digest

    sample, output = one.sample(prompt(5), "x", FREE), one.forward("x", [datum(9)], "dro")
    found = sample.result()[0].tokens.tolist(), output.result().metrics["loss:sum"], one.publish("x").result().digest
    assert asyncio.run(awaited()) == found
    assert sample.result() is sample.result()


def test_errors_are_raised_by_result_and_await_again_and_again() -> None:
    """An error that is raised once and then forgotten would turn into a hang or a None."""
    engine = engine_with("x")
    future = engine.optim_step("x", STEP)
    for _ in range(2):
        with pytest.raises(RunError, match="without a gradient"):
            future.result()

    async def awaited() -> None:
        await future

    with pytest.raises(RunError, match="without a gradient"):
        asyncio.run(awaited())
    assert future.done()


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (np.zeros(0, np.int64), "1 to 127"),
        (np.full(128, 5), "128 tokens"),
        (np.array([5, 97]), "0 to 96"),
        (np.array([5, -1]), "0 to 96"),
    ],
    ids=["empty", "long", "high", "negative"],
)
def test_bad_prompts_are_refused_when_asked(ids: np.ndarray, words: str) -> None:
    """The one who asked hears of it at once; nobody else does."""
    engine = engine_with("x")
    good = engine.sample(prompt(4), "x", FREE)
    with pytest.raises(DataError, match=words):
        engine.sample(ids, "x", FREE)
    assert len(good.result()[0].tokens) == 8


def test_bad_data_are_refused_when_asked() -> None:
    """As prompts: too long, out of the vocabulary, or of unequal lengths."""
    engine = engine_with("x")
    good = engine.forward_backward("x", [datum(9)], "cross_entropy")
    row = datum(5)
    for field in ("tokens", "targets"):
        for wrong in (97, -1):
            array = getattr(row, field).copy()
            array[2] = wrong
            with pytest.raises(DataError, match=f"datum 1.*{field}"):
                engine.forward_backward("x", [row, dataclasses.replace(row, **{field: array})], "cross_entropy")
    with pytest.raises(DataError, match="129 tokens"):
        engine.forward("x", [datum(129)], "cross_entropy")
    with pytest.raises(DataError, match="one shape"):
        dataclasses.replace(row, mask=np.ones(4, np.float32))
    assert good.result().metrics["tokens:sum"] == 6
    assert engine.step() == 0


def test_a_failing_barrier_reaches_its_own_future_alone() -> None:
    """One adapter's missing gradient is no one else's problem."""
    engine = engine_with("a", "b")
    bad = engine.optim_step("a", STEP)
    behind = engine.forward("a", [datum(9)], "cross_entropy")
    other = engine.sample(prompt(4), "b", FREE)
    engine.step()
    with pytest.raises(RunError):
        bad.result()
    assert behind.result().metrics["tokens:sum"] == 6
    assert len(other.result()[0].tokens) == 8


def test_stop_text_without_a_tokenizer_is_the_askers_error() -> None:
    """A request that this base cannot serve must not fail the requests it was merged with."""
    engine = engine_with("a", "b")
    good = engine.sample(prompt(4), "b", FREE)
    with pytest.raises(RequestError):
        engine.sample(prompt(4), "a", SamplingParams(max_tokens=8, stop=("</s>",), stop_token_ids=())).result()
    assert len(good.result()[0].tokens) == 8


@pytest.mark.parametrize("verb", ["sample", "forward", "forward_backward"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_removing_an_adapter_fails_its_own_queue_alone(verb: str, kind: str) -> None:
    """Users come and go; the work that others had queued is still answered."""
    engine = lora_engine() if kind == "lora" else full_engine()
    for name in ("gone", "stays"):
        engine.create_adapter(name, SMALL if kind == "lora" else None)

    def ask(name: str):
        if verb == "sample":
            return engine.sample(prompt(4), name, FREE)
        return getattr(engine, verb)(name, [datum(9)], "cross_entropy")

    lost, kept = ask("gone"), ask("stays")
    engine.remove_adapter("gone")
    kept.result()
    assert lost.done(), "an answer that never comes is a hang"
    with pytest.raises(RequestError):
        lost.result()


@pytest.mark.parametrize("newcomer", ["new", "old"], ids=["same-slot", "same-name"])
def test_queued_work_does_not_run_on_a_newcomer(newcomer: str) -> None:
    """A removed adapter's queued gradient must never land in the newcomer that got its slot or its name."""
    engine = engine_with("old")
    queued = engine.forward_backward("old", [datum(9)], "cross_entropy")
    engine.remove_adapter("old")
    engine.create_adapter(newcomer, SMALL)
    engine.step()
    assert no_gradients(engine)
    with pytest.raises(RequestError):
        queued.result()


def test_a_name_that_a_queued_load_will_bring_can_be_asked() -> None:
    """Load, then ask, without waiting; and if the load fails, the question fails too and nothing hangs."""
    engine = engine_with("x")
    state = engine.save_state("x").result()
    load = engine.load_state("copy", state)
    copied, original = engine.sample(prompt(4), "copy", FREE), engine.sample(prompt(4), "x", FREE)
    assert copied.result()[0].tokens.tolist() == original.result()[0].tokens.tolist()
    assert load.done()
    bad = engine.load_state("never", dataclasses.replace(state, adapter=dataclasses.replace(state.adapter, base_digest="0" * 64)))
    behind = engine.forward("never", [datum(9)], "cross_entropy")
    good = engine.forward("x", [datum(9)], "cross_entropy")
    engine.step()
    assert good.result().metrics["tokens:sum"] == 6
    for future in (bad, behind):
        assert future.done()
        with pytest.raises(RequestError):
            future.result()


@pytest.mark.parametrize("verb", ["sample", "forward"])
def test_requests_behind_a_load_see_the_loaded_weights(verb: str) -> None:
    """Rolling an adapter back and asking it something, without waiting in between: requests run in the order they were made."""
    engine = engine_with("x", "y")
    wanted_state = scrambled(engine.save_state("x", "sampler").result(), seed=77)
    engine.load_state("y", wanted_state).result()
    load = engine.load_state("x", wanted_state)
    if verb == "sample":
        behind = engine.sample(prompt(4), "x", GREEDY)
        beside = engine.sample(prompt(4), "y", GREEDY)
        assert behind.result()[0].tokens.tolist() == beside.result()[0].tokens.tolist()
        np.testing.assert_allclose(behind.result()[0].logprobs, beside.result()[0].logprobs, atol=1e-5, rtol=0)
    else:
        behind = engine.forward("x", [datum(9)], "cross_entropy")
        beside = engine.forward("y", [datum(9)], "cross_entropy")
        np.testing.assert_allclose(behind.result().logprobs_D[0], beside.result().logprobs_D[0], atol=1e-5, rtol=0)
    assert load.done()


def test_forward_beside_forward_backward_stays_without_gradient() -> None:
    """Both in one step: only one of them trains."""
    engine, alone = engine_with("x"), engine_with("x")
    watch, train = engine.forward("x", [datum(9)], "cross_entropy"), engine.forward_backward("x", [datum(12)], "cross_entropy")
    engine.step()
    assert watch.done()
    assert train.done()
    alone.forward_backward("x", [datum(12)], "cross_entropy").result()
    assert row_bytes(engine, "x") == row_bytes(alone, "x")
