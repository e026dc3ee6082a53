"""The reinforcement-learning run that rl_step.py and concurrency.py time: a coin for a reward, so nothing is learned."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field

from veneer.render import Renderer
from veneer.train.advantages import centred
from veneer.train.datums import trajectory_to_data
from veneer.train.rollouts import Policy, do_rollouts
from veneer.types import AdamParams, Engine, Message, Observation, SamplingParams, Split, StepResult

PROMPTS, GROUP, TOKENS = 8, 8, 32


def question(index: int) -> str:
    """Sums of four numbers, so that every prompt has one length."""
    return "+".join(str(10 + (index * 37 + i * 23) % 90) for i in range(4)) + "=?"


def reward_of(text: str) -> float:
    """A coin: no group is constant for long."""
    return float(sum(text.encode()) % 2)


class Coin:
    def __init__(self, index: int) -> None:
        self.index = index

    async def initial_observation(self) -> Observation:
        return Observation([{"role": "user", "content": question(self.index)}])

    async def step(self, action: Message) -> StepResult:
        return StepResult(reward_of(str(action)), episode_done=True)


class Coins:
    name = "coins"

    def env(self, split: Split, index: int) -> Coin:
        return Coin(index)


@dataclass
class CoinRun:
    """One run: a policy, its optimizer steps, and a digest of all that it sampled and was rewarded with."""

    engine: Engine
    renderer: Renderer
    adapter: str
    seed: int = 0
    tokens: int = TOKENS
    seen: list[str] = field(default_factory=list[str])

    async def step(self, number: int) -> float:
        """Sample 8 x 8 completions, take one optimizer step on them, publish it. Returns the seconds that sampling took."""
        clock = time.perf_counter()
        params = SamplingParams(max_tokens=self.tokens, stop_token_ids=())
        policy = Policy(self.engine, self.renderer, self.adapter, params)
        problems = range(number * PROMPTS, (number + 1) * PROMPTS)
        groups_P = await do_rollouts(policy, Coins(), "train", problems, GROUP, self.seed + number)
        sampled = time.perf_counter() - clock
        data = [
            datum
            for group in groups_P
            for trajectory, advantage in zip(group.trajectories_G, centred(group.rewards_G), strict=True)
            for datum in trajectory_to_data(trajectory, [advantage / (PROMPTS * GROUP)])
        ]
        sha = hashlib.sha256(repr([group.rewards_G for group in groups_P]).encode())
        for datum in data:
            sha.update(datum.tokens.tobytes() + datum.logprobs.tobytes())
        self.seen.append(sha.hexdigest())
        await self.engine.forward_backward(self.adapter, data, "importance_sampling")
        await self.engine.optim_step(self.adapter, AdamParams(1e-4))
        await self.engine.publish(self.adapter)
        return sampled
