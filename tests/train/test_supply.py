"""Groups in flight: none is lost, none is too old, and slow ones are waited for."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.engine import LoraEngine, load_base
from veneer.render import load_renderer
from veneer.train.rollouts import Policy
from veneer.train.supply import InFlight, OnDemand, Schedule, choose
from veneer.types import LoraConfig, Message, Observation, SamplingParams, Split, StepResult


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**32))
def test_no_flight_is_ever_too_late(groups: int, max_lag: int, seed: int) -> None:
    """Flights land in any order at any time; at each step some choice is possible once enough have landed, and a flight is taken
    before its last step has passed."""
    rng, landing = random.Random(seed), 0
    flights: list[list[int | None]] = []
    for step in range(1, 12):
        flights += [[step + max_lag, None] for _ in range(groups * (max_lag + 1) - len(flights))]
        while (taken := choose([(f[0] or 0, f[1]) for f in flights], step, groups)) is None:
            waiting = [f for f in flights if f[1] is None]
            assert waiting, "all have landed, and there is no choice"
            rng.choice(waiting)[1] = landing
            landing += 1
        assert len(set(taken)) == groups
        assert all(flights[i][1] is not None for i in taken)
        flights = [f for i, f in enumerate(flights) if i not in taken]
        assert all((f[0] or 0) > step for f in flights)


@dataclass
class Waiting:
    index: int
    dataset: Slow

    async def initial_observation(self) -> Observation:
        self.dataset.playing += 1
        return Observation([{"role": "user", "content": f"say {self.index % 10}"}])

    async def step(self, action: Message) -> StepResult:
        await self.dataset.gate(self.index)
        self.dataset.playing -= 1
        return StepResult(float(self.dataset.reward(self.index)), episode_done=True)


@dataclass
class Slow:
    """Episodes that end when ``gate`` lets them."""

    gate: Any
    reward: Any = field(default=lambda index: index % 2)
    name: str = "slow"
    playing: int = 0

    def env(self, split: Split, index: int) -> Waiting:
        return Waiting(index, self)


def policy() -> Policy:
    engine = LoraEngine(load_base("nano"))
    engine.create_adapter("a", LoraConfig(rank=1))
    engine.publish("a").result()
    return Policy(engine, load_renderer("nano"), "a", SamplingParams(max_tokens=4))


def test_a_step_takes_what_has_ended_and_waits_for_what_would_be_too_old() -> None:
    """Problem 0 never ends by itself: steps 1 and 2 go on without it, and step 3, the last that may take it, waits for it."""
    released = asyncio.Event()

    async def gate(index: int) -> None:
        if index == 0:
            await released.wait()

    async def steps() -> None:
        supply = InFlight(policy(), Slow(gate), Schedule(groups=2, size=2, seed=0, first=0), max_lag=2)
        first = [g.index for g in await supply.groups(1, played=0)]
        second = [g.index for g in await supply.groups(2, played=2)]
        assert 0 not in first + second
        third = asyncio.ensure_future(supply.groups(3, played=4))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(third), 0.3)
        released.set()
        last = [g.index for g in await third]
        assert 0 in last
        everything = first + second + last
        assert len(set(everything)) == 6
        await supply.close()

    asyncio.run(steps())


@pytest.mark.parametrize("max_lag", [1, 2, 3])
def test_as_much_is_in_flight_as_could_be_in_time(max_lag: int) -> None:
    """What a step and the ``max_lag`` behind it take is played while it is waited for; of this the step takes its own."""
    released = asyncio.Event()

    async def gate(index: int) -> None:
        await released.wait()

    async def steps() -> None:
        dataset = Slow(gate)
        supply = InFlight(policy(), dataset, Schedule(groups=2, size=3, seed=0, first=0), max_lag)
        first = asyncio.ensure_future(supply.groups(1, played=0))
        while dataset.playing < 6 * (max_lag + 1):
            await asyncio.sleep(0.001)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(first), 0.1)
        assert dataset.playing == 6 * (max_lag + 1)
        released.set()
        taken = [g.index for g in await first]
        for step in range(2, max_lag + 4):
            taken += [g.index for g in await supply.groups(step, played=2 * (step - 1))]
        assert sorted(taken) == list(range(2 * (max_lag + 3)))
        await supply.close()

    asyncio.run(steps())


def test_what_is_in_flight_is_given_up_at_the_end() -> None:
    """A run that ends must not leave episodes behind that hold tools or the engine's memory."""

    async def gate(index: int) -> None:
        await asyncio.sleep(60 if index > 1 else 0)

    async def steps() -> None:
        acting, dataset = policy(), Slow(gate)
        supply = InFlight(acting, dataset, Schedule(groups=1, size=2, seed=0, first=0), max_lag=3)
        await supply.groups(1, played=0)
        assert dataset.playing > 0
        await supply.close()
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(steps())


@pytest.mark.parametrize(
    ("refill", "reward", "expected"),
    [
        (0.0, lambda index: 0, 2),
        (1.0, lambda index: 0, 4),
        (2.5, lambda index: 0, 7),
        (2.0, lambda index: 1 if index < 2 else random.random(), 4),
        (2.0, lambda index: random.random(), 2),
    ],
)
def test_useless_groups_are_replaced_within_the_budget(refill: float, reward: Any, expected: int) -> None:
    """Constant groups teach nothing (DAPO's dynamic sampling): further problems are played until two are useful or the budget is spent."""

    async def gate(index: int) -> None:
        return

    async def step() -> list[int]:
        schedule = Schedule(groups=2, size=3, seed=0, first=0)
        supply = OnDemand(policy(), Slow(gate, reward), schedule, refill, is_useful=lambda g: len(set(g.rewards_G)) > 1)
        return [g.index for g in await supply.groups(1, played=0)]

    assert asyncio.run(step()) == list(range(expected))
