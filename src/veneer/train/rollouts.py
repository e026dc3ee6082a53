"""Episodes: an environment and a policy take turns until the environment says that it is over."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial

from veneer.render import Renderer
from veneer.train.timebox import EnvFailure, checked_metrics, checked_number, expect, in_env
from veneer.types import (
    Closable,
    DataError,
    Engine,
    Env,
    EnvDataset,
    GroupGrader,
    Message,
    Observation,
    SamplingParams,
    Split,
    StepResult,
    Tokens,
    Trajectory,
    TrajectoryGroup,
    Transition,
    Ungraded,
    in_one_line,
)


@dataclass(frozen=True)
class Policy:
    """What acts: an engine's adapter (None: the base), how it samples, and how text becomes tokens."""

    engine: Engine
    renderer: Renderer
    adapter: str | None
    params: SamplingParams
    env_seconds: float = 10.0
    """An environment call that takes longer fails its rollout."""
    env_retries: int = 0
    """How often a rollout that failed is played anew, from the start and with other draws."""
    system: str = ""
    """What it is told, as a system message, before what a problem begins with."""
    top_logprobs: int = 0
    """Of how many of the likeliest tokens its samples bring the log-probabilities."""


@asynccontextmanager
async def closing(dataset: EnvDataset) -> AsyncGenerator[EnvDataset, None]:
    """The dataset for as long as it is used; what it holds is given back behind it."""
    try:
        yield dataset
    finally:
        if isinstance(dataset, Closable):
            await dataset.close()


def derive_seed(*parts: object) -> int:
    """A 64-bit seed from any printable parts; the same parts always give the same seed."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest(), "big")


async def do_rollout(policy: Policy, dataset: EnvDataset, split: Split, index: int, seed: int) -> Trajectory:
    """Play one episode to its end, anew if it fails and ``policy.env_retries`` allows it."""
    trajectory = await _play(policy, dataset, split, index, seed)
    for attempt in range(1, policy.env_retries + 1):
        if trajectory.error is None:
            break
        trajectory = await _play(policy, dataset, split, index, derive_seed(seed, "retry", attempt))
    return trajectory


async def _play(policy: Policy, dataset: EnvDataset, split: Split, index: int, seed: int) -> Trajectory:
    """Every turn's prompt is the last one plus what was sampled plus what the environment answered, as tokens."""
    turns: list[Transition] = []
    seconds = policy.env_seconds
    env: Env | None = None
    try:
        env = await in_env(lambda: _made(dataset, split, index), "env", seconds)
        first = expect(await in_env(env.initial_observation, "initial_observation", seconds), Observation, "initial_observation")
        prompt = rendered(lambda: policy.renderer.build_generation_prompt(with_system(policy.system, first.messages), first.tools))
        if len(prompt) >= policy.engine.context_length:
            raise EnvFailure(
                f"the prompt of problem {index} has {len(prompt)} tokens; the base's context is {policy.engine.context_length}"
            )
        shown = Observation([*first.messages], [*first.tools])  # as it was: an environment may go on writing into its lists
        while True:
            params = replace(policy.params, seed=derive_seed(seed, len(turns)))
            (sample,) = await policy.engine.sample(prompt, policy.adapter, params, top_logprobs=policy.top_logprobs)
            action = policy.renderer.parse_response(sample.tokens, sample.stop_reason == "stop")
            result = expect(await in_env(partial(env.step, action), "step", seconds), StepResult, "step")
            metrics = checked_metrics(result.metrics)
            reward, text = (
                checked_number(result.reward, "step's reward"),
                policy.renderer.written(sample.tokens, sample.stop_reason == "stop"),
            )
            turns.append(Transition(prompt, sample, action, reward, metrics, text))
            total = sum(t.reward for t in turns)
            if result.episode_done or sample.stop_reason == "length":
                return Trajectory(turns, total, truncated=sample.stop_reason == "length", observation=shown)
            prompt = rendered(partial(policy.renderer.extend, prompt, sample.tokens, result.next_messages))
            if len(prompt) >= policy.engine.context_length:
                return Trajectory(turns, total, truncated=True, observation=shown)
    except EnvFailure as failure:
        return Trajectory(turns, 0.0, error=str(failure))
    finally:
        if isinstance(env, Closable):
            with suppress(EnvFailure):  # the episode is over, and what it earned stands
                await in_env(env.close, "close", seconds)


def with_system(system: str, messages: Sequence[Message]) -> list[Message]:
    """The messages behind a system message; one that is there goes on behind it."""
    if not system:
        return list(messages)
    if messages and messages[0]["role"] == "system":
        return [{"role": "system", "content": f"{system}\n\n{messages[0]['content']}"}, *messages[1:]]
    return [{"role": "system", "content": system}, *messages]


def rendered(render: Callable[[], Tokens]) -> Tokens:
    """Render an environment's messages.

    Raises:
        EnvFailure: they are not what a chat template takes.
    """
    try:
        return render()
    except (DataError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise EnvFailure(f"its messages cannot be rendered ({in_one_line(error)})") from error


async def _made(dataset: EnvDataset, split: Split, index: int) -> Env:
    return dataset.env(split, index)


async def do_group_rollout(policy: Policy, dataset: EnvDataset, split: Split, index: int, size: int, seed: int) -> TrajectoryGroup:
    """Play one problem ``size`` times, all members at once, and let the dataset grade them together if it wants to."""
    members = [do_rollout(policy, dataset, split, index, derive_seed(seed, index, member)) for member in range(size)]
    trajectories_G = await asyncio.gather(*members)
    if isinstance(dataset, GroupGrader):
        trajectories_G = await _graded(policy, dataset, split, index, trajectories_G)
    return TrajectoryGroup(index, trajectories_G)


async def _graded(policy: Policy, dataset: GroupGrader, split: Split, index: int, trajectories_G: Sequence[Trajectory]) -> list[Trajectory]:
    """The members with what the group's grader adds. If it fails, so do all members: without it their rewards are not what was meant."""
    finished = [t for t in trajectories_G if t.error is None]
    what = "compute_group_rewards"
    try:
        verdicts = await in_env(lambda: dataset.compute_group_rewards(split, index, finished), what, policy.env_seconds)
        if len(expect(verdicts, list, what)) != len(finished):
            raise EnvFailure(f"{what} returned {len(verdicts)} rewards for {len(finished)} episodes")
    except EnvFailure as failure:
        return [replace(t, reward=0.0, error=t.error or str(failure)) for t in trajectories_G]
    graded = iter([_with(t, verdict, what) for t, verdict in zip(finished, verdicts, strict=True)])
    return [t if t.error is not None else next(graded) for t in trajectories_G]


def _with(trajectory: Trajectory, verdict: tuple[float, Mapping[str, float]] | Ungraded, what: str) -> Trajectory:
    """A member with what the group's grader says of it; one without a proper verdict has failed."""
    try:
        if isinstance(verdict, Ungraded):
            raise EnvFailure(verdict.reason)
        if len(expect(verdict, tuple, f"{what}'s list")) != 2:
            raise EnvFailure(f"{what} returned {verdict!r:.80}, not a reward and metrics")
        added, metrics = checked_number(verdict[0], f"{what}'s reward"), checked_metrics(verdict[1])
        return replace(trajectory, reward=trajectory.reward + added, group_metrics=metrics)
    except EnvFailure as failure:
        return replace(trajectory, reward=0.0, error=str(failure))


async def do_rollouts(
    policy: Policy, dataset: EnvDataset, split: Split, indices: Sequence[int], size: int, seed: int
) -> list[TrajectoryGroup]:
    """Play several problems at once."""
    return await asyncio.gather(*(do_group_rollout(policy, dataset, split, i, size, seed) for i in indices))
