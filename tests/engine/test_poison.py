"""Adapters whose weights blew up: their own requests fail in one line, and nobody else loses a bit."""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import pytest
import torch
from engine_tools import add_random_adapter as add
from engine_tools import at_rest, finish, lora_engine, prompt, wide_engine
from test_company import engine_of

from tiny_models import random_model
from veneer.engine import Base, LocalEngine, LoraEngine
from veneer.engine.draws import Chooser
from veneer.types import LoraConfig, RunError, SamplingParams

REQUESTS = [(4, 9, 1, "x"), (30, 5, 3, None), (12, 40, 2, "y"), (7, 2, 4, "x"), (50, 20, 1, "y")]
"""Prompt length, budget, n, adapter."""


def bfloat16_engine() -> LocalEngine:
    """The way that a GPU takes: torch's attention, which reads places that rows have left."""
    return LoraEngine(Base("qwen3", random_model("qwen3").to(torch.bfloat16), None))


ENGINES = {
    "fused": lora_engine,
    "modules": lambda: engine_of("gemma2"),
    "two-threads": lora_engine,
    "bfloat16": bfloat16_engine,
}


def load(engine: LocalEngine, name: str, config: LoraConfig, value: float, only: str = "") -> None:
    """An adapter whose weights, or those whose names end in ``only``, all have one value."""
    engine.create_adapter(name, config)
    state = engine.save_state(name, "sampler").result()
    weights = {key: np.full_like(a, value) if key.endswith(only) else a for key, a in state.weights.items()}
    engine.load_state(name, dataclasses.replace(state, weights=weights)).result()


def prepared(kind: str) -> LocalEngine:
    engine = ENGINES[kind]()
    add(engine, "x", LoraConfig(rank=4, alpha=8), seed=0)
    add(engine, "y", LoraConfig(rank=17, alpha=8, train_attn=False), seed=1)
    return engine


def ask(engine: LocalEngine, length: int, budget: int, n: int, name: str | None, **kwargs):
    return engine.sample(prompt(length), name, SamplingParams(budget, stop_token_ids=()), n, **kwargs)


def bits(future) -> list[tuple]:
    return [(s.tokens.tolist(), s.logprobs.tobytes(), s.stop_reason) for s in future.result()]


@cache
def untroubled(kind: str) -> list[list[tuple]]:
    """What each request is told by an engine of its own."""
    return [bits(ask(prepared(kind), *request)) for request in REQUESTS]


BAD = {
    "thin": (LoraConfig(rank=4), 1e30, ""),
    "thick": (LoraConfig(rank=20, train_attn=False), 1e30, ""),
    "infinite": (LoraConfig(rank=2), float("inf"), ""),
    "nan": (LoraConfig(rank=1), float("nan"), "lora_A.weight"),
    "head": (LoraConfig(rank=3, train_attn=False, train_mlp=False, train_unembed=True), 1e30, ""),
    "values": (LoraConfig(rank=3, target_modules=("v_proj",)), 1e30, ""),
    "keys": (LoraConfig(rank=3, target_modules=("k_proj",)), 1e30, ""),
}
"""Keys stay finite in Qwen 3, which norms them, and logits in Gemma 2, which caps them."""


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(("kind", "poison"), [(k, p) for k in ENGINES for p in BAD if p != ("head" if k == "modules" else "keys")])
def test_a_poisoned_neighbour_fails_alone(poison: str, kind: str, steps: int) -> None:
    """In one batch with it, and in the places that it leaves: everybody else says what they say without it."""
    config, value, only = BAD[poison]
    torch.set_num_threads(2 if kind == "two-threads" else 1)
    try:
        wanted = untroubled(kind) if kind != "bfloat16" else None
        engine = prepared(kind)
        load(engine, "bad", config, value, only)
        futures = [ask(engine, *request) for request in REQUESTS[:3]]
        for _ in range(steps):
            engine.step()
        bad = [ask(engine, length, 30, n, "bad") for length, n in ((5, 1), (40, 3), (9, 70 if kind == "two-threads" else 2))]
        bad.append(ask(engine, 20, 0, 1, "bad", prompt_logprobs=True))
        bad.append(ask(engine, 20, 0, 1, "bad", prompt_top_logprobs=3))
        futures += [ask(engine, *request) for request in REQUESTS[3:]]
        finish(engine, [*futures, *bad])
        futures += [ask(engine, *request) for request in REQUESTS]
        found = [bits(future) for future in futures]
        if wanted is None:
            assert all(np.isfinite(s.logprobs).all() for future in futures for s in future.result())
        else:
            assert found == wanted + wanted
        for future in bad:
            with pytest.raises(RunError, match="adapter 'bad' gives log-probabilities that are not finite") as caught:
                future.result()
            assert "\n" not in str(caught.value)
        assert at_rest(engine)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("device_way", [False, True], ids=["compiled", "torch"])
@pytest.mark.parametrize("shape", [{}, {"temperature": 0.0}, {"temperature": 0.7}, {"top_k": 3, "top_p": 0.5}])
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_draw_from_no_distribution_is_a_token_and_shows(number: float, shape: dict, device_way: bool) -> None:
    """Whatever a row holds, its token is one of the vocabulary and its log-probability says that something is wrong; the other rows
    are what they are without it."""
    torch.manual_seed(0)
    logits = torch.randn(5, 97, dtype=torch.float64 if device_way else torch.float32)
    choose, draws = Chooser([SamplingParams(**shape)] * 5, torch.device("cpu"), [4] * 5), torch.tensor([0.0, 0.3, 0.6, 0.9, 1 - 2**-24])
    sound = choose.draw(logits, draws)
    for places in (slice(0, 97), slice(96, 97), slice(0, 1), slice(10, 70)):
        if number == -np.inf and places != slice(0, 97):
            continue  # an impossible token is legal
        broken = logits.clone()
        broken[1:4, places] = number
        found = choose.draw(broken, draws)
        assert ((found.tokens >= 0) & (found.tokens < 97)).all()
        assert found.logprobs.isfinite().tolist() == [True, False, False, False, True]
        for row in (0, 4):
            assert found.tokens[row] == sound.tokens[row]
            assert found.logprobs[row] == sound.logprobs[row]
            assert np.array_equal(found.likeliest[0].tokens[row], sound.likeliest[0].tokens[row])


def test_a_place_that_was_spoilt_is_clean_for_the_next() -> None:
    """Torch's attention multiplies a left place's values by zero, and zero times infinity is no number."""
    engine = bfloat16_engine()
    load(engine, "bad", LoraConfig(rank=2), float("inf"))
    for _ in range(3):
        bad, good = ask(engine, 30, 30, 3, "bad"), ask(engine, 6, 40, 4, None)
        finish(engine, [bad, good])
        assert isinstance(bad._error, RunError)
        assert all(np.isfinite(s.logprobs).all() for s in good.result())
    for bank in engine._sampler.crews[0].banks.values():
        assert all(bool(t.isfinite().all()) for stored in (bank.keys, bank.values) for t in stored.values())


@pytest.mark.parametrize("targets", [(), ("down_proj",)])
@pytest.mark.parametrize("rank", [1, 6, 17, 18, 23, 24])
def test_any_rank_has_its_bits_in_any_company_on_two_threads(rank: int, targets: tuple[str, ...]) -> None:
    """Ranks whose products have 17 to 23 columns among them, and such as have only few numbers behind their A."""
    config = LoraConfig(rank, target_modules=targets)
    torch.set_num_threads(2)
    try:
        engine = wide_engine()
        add(engine, "y", config, seed=1)
        alone = bits(ask(engine, 12, 20, 2, "y"))
        futures = [ask(engine, length, 20, n, "y") for length, n in ((12, 2), (30, 40), (5, 3))]
        others = [ask(engine, 7, 20, 9, None)]
        finish(engine, [*futures, *others])
        assert bits(futures[0]) == alone
    finally:
        torch.set_num_threads(1)
