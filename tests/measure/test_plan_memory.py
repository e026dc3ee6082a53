"""Planned memory against the bytes that the engine holds: storages are counted when torch makes them and when they go."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as hf

from veneer.engine import Base, FullEngine, LoraEngine, load_base
from veneer.engine.cache import AHEAD, Bank, capacity_for, places_of
from veneer.engine.counting import Alive
from veneer.engine.engine import LocalEngine
from veneer.engine.logprobs import LOGITS_AT_ONCE
from veneer.engine.shapes import count_shape
from veneer.engine.trainer import TOKENS_PER_PASS
from veneer.measure.plan import memory
from veneer.measure.plan.memory import Passes, Reading
from veneer.shapes import ModelShape, adapter_parameters
from veneer.types import AdamParams, Datum, LoraConfig, SamplingParams

CLOSE = 0.1
WIDE = {"vocab_size": 97, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6}
MANY_TOKENS = {"vocab_size": 2000, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}


def bases(name: str) -> tuple[Base, ModelShape]:
    if name == "nano":
        return load_base("nano"), count_shape("nano")
    config = hf.LlamaConfig(**(WIDE if name == "wide" else MANY_TOKENS), num_key_value_heads=2, max_position_embeddings=256)
    shape = count_shape(config.to_dict())
    torch.manual_seed(0)
    return Base(name, hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32), None), shape


def groups(count: int, size: int, prompt: int, low: int, high: int) -> tuple[list[Datum], Reading]:
    """A step of reinforcement learning: answers of uneven length behind shared prompts."""
    rng, data, drawn = np.random.default_rng(0), list[Datum](), 0
    for _ in range(count):
        asked = rng.integers(3, 90, prompt)
        for _ in range(size):
            answer = rng.integers(3, 90, rng.integers(low, high + 1))
            row = np.concatenate([asked, answer])
            mask = np.zeros(len(row) - 1, np.float32)
            mask[prompt - 1 :] = 1
            data.append(Datum(row[:-1], row[1:], np.zeros_like(mask), mask, mask))
            drawn += len(answer)
    return data, Reading(count * prompt, drawn, prompt, drawn / len(data))


def within(planned: memory.Figure, measured: float) -> None:
    assert planned.value is not None
    assert planned.value == pytest.approx(measured, rel=CLOSE)
    assert planned.low is None or planned.low <= measured
    assert planned.high is None or measured <= planned.high


@pytest.mark.parametrize(
    ("name", "rank", "step"),
    [
        ("nano", 1, (8, 8, 22, 12, 40)),
        ("nano", 8, (8, 8, 22, 20, 60)),  # more than one pass
        ("nano", 32, (4, 4, 20, 10, 30)),  # a single piece
        ("nano", 8, (2, 8, 60, 30, 90)),
        ("wide", 8, (8, 8, 22, 12, 40)),
        ("many tokens", 8, (8, 8, 22, 12, 40)),
    ],
)
def test_activations(name: str, rank: int, step: tuple[int, int, int, int, int]) -> None:
    """The largest part: what a training pass holds at its peak."""
    (base, shape), (data, reading) = bases(name), groups(*step)
    engine = LoraEngine(base)
    engine.create_adapter("x", LoraConfig(rank))
    engine.forward_backward("x", data, "cross_entropy").result()
    with Alive() as alive:
        engine.forward_backward("x", data, "cross_entropy").result()
    passes = Passes("float32", TOKENS_PER_PASS["cpu"], logits=LOGITS_AT_ONCE["cpu"])
    within(memory.plan_activations(shape, passes, reading, shape.adapted(LoraConfig(rank)), rank), alive.most)


def test_checkpointing() -> None:
    """Half of it on four layers; planned up to a sixth too high."""
    (base, shape), (data, reading) = bases("nano"), groups(8, 8, 22, 12, 40)
    engine = LoraEngine(base, gradient_checkpointing=True)
    engine.create_adapter("x", LoraConfig(8))
    engine.forward_backward("x", data, "cross_entropy").result()
    with Alive() as alive:
        engine.forward_backward("x", data, "cross_entropy").result()
    passes = Passes("float32", TOKENS_PER_PASS["cpu"], checkpointing=True, logits=LOGITS_AT_ONCE["cpu"])
    planned = memory.plan_activations(shape, passes, reading, shape.adapted(LoraConfig(8)), 8)
    assert planned.low is not None
    assert planned.low <= alive.most <= (planned.high or 0)


def held(engine: LocalEngine) -> int:
    """Of the rows of all adapters, whatever they are for."""
    rows = engine._stack.rows
    trained = [t for state in rows.trained.values() for t in (state.weights, state.grad, state.m, state.v)]
    return rows.line.tensor.nbytes + sum(t.nbytes for t in trained)


@pytest.mark.parametrize("rank", [1, 8, 64])
def test_adapters(rank: int) -> None:
    """What the engine keeps of an adapter, and what Adam takes while it makes new rows."""
    base, shape = bases("nano")
    engine = LoraEngine(base)
    engine.create_adapter("x", LoraConfig(rank))
    data, _ = groups(2, 2, 8, 8, 12)
    engine.forward_backward("x", data, "cross_entropy").result()
    maps = shape.adapted(LoraConfig(rank))
    planned = memory.plan_adapter(adapter_parameters(maps, rank), max(m.d_in for m in maps))
    assert planned.value == pytest.approx(held(engine), rel=0.005)
    with Alive() as alive:
        engine.optim_step("x", AdamParams()).result()
    assert planned.high is not None
    assert held(engine) + alive.most == pytest.approx(planned.high, rel=CLOSE)


def test_full_copies() -> None:
    """Twenty bytes a parameter beside the base."""
    base, shape = bases("nano")
    engine = FullEngine(base)
    engine.create_adapter("x", None)
    data, _ = groups(2, 2, 8, 8, 12)
    engine.forward_backward("x", data, "cross_entropy").result()
    within(memory.plan_full(shape), held(engine))


def test_the_base() -> None:
    base, shape = bases("nano")
    assert memory.plan_base(shape, "float32").value == sum(p.nbytes for p in base.parameters())


@pytest.mark.parametrize(("count", "size", "prompt", "drawn"), [(8, 8, 22, 40), (8, 9, 22, 72), (4, 16, 50, 30), (2, 8, 100, 200)])
def test_cache(count: int, size: int, prompt: int, drawn: int) -> None:
    """Completions that all reach the limit: the banks at their largest, those that were outgrown among them."""
    base, shape = bases("nano")
    engine = LoraEngine(base)
    rng = np.random.default_rng(0)
    params = SamplingParams(max_tokens=drawn, stop_token_ids=())
    futures = [engine.sample(rng.integers(3, 90, prompt), None, params, size) for _ in range(count)]
    most = 0
    while not all(future.done() for future in futures):
        engine.step()
        banks = {id(bank): bank for crew in engine._sampler.crews for bank in crew.banks.values()}
        most = max(most, sum(bank.bytes for bank in banks.values()))
    assert isinstance(next(iter(banks.values())), Bank)
    places = places_of(min(AHEAD, drawn), drawn)
    within(memory.plan_cache(shape, "float32", count * size, places, count, capacity_for(prompt)), most)


def test_passes_are_cut_as_the_engine_cuts_them() -> None:
    """2,048 tokens a pass: small requests whole, larger ones in an even number of pieces, on two threads side by side."""
    one, two = Passes("float32", 2048), Passes("float32", 2048, 2)
    assert one.tokens_at_once(400) == (400, 1, 1)
    assert one.tokens_at_once(1899) == (1899, 2, 1)
    assert one.tokens_at_once(2788) == (1394, 1, 1)
    assert one.tokens_at_once(10_000) == (1667, 1, 1)
    assert two.tokens_at_once(1900) == (950, 1, 2)
    assert two.tokens_at_once(10_000) == (1667, 1, 2)
