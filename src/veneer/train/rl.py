"""Reinforcement learning of one adapter from rewards of episodes.

A step: play problems ``group_size`` times each, turn the rewards of a group into advantages, and follow the importance-weighted
policy gradient once. What is left out unless it is asked for, and why:

- no value network and no reference model: the base is one switch away, so the KL to it costs a pass and no memory (``kl_coef``);
- no division by the group's standard deviation and none by the answer's length: both bias (https://arxiv.org/abs/2503.20783);
- no clipping: one gradient step on fresh samples has ratio 1 (choose ``loss = "ppo"`` to have it);
- no temperature, top-k or top-p: the distribution that is trained is the one that was sampled;
- no learning-rate schedule, no weight decay, no replay.

Everything else is a choice in ``docs/algorithms.md``: a function in a table, picked by a key of its own.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from veneer.measure.canary import check_drawn
from veneer.train.advantages import compute_advantages
from veneer.train.evaluate import evaluate
from veneer.train.learn import check_choices, learn
from veneer.train.lengths import punish_overlong
from veneer.train.metrics import check_failures, rollout_metrics, why_stop
from veneer.train.rollouts import Policy, derive_seed
from veneer.train.session import Metrics, Session
from veneer.train.supply import InFlight, OnDemand, Schedule
from veneer.types import Adapter, EnvDataset, SamplingParams, TrajectoryGroup


@dataclass(frozen=True)
class RlResult:
    steps: int
    episodes: int
    bits: float
    stopped: str | None
    """Why the run ended early, in words."""


async def train(session: Session, dataset: EnvDataset) -> RlResult:
    """Run or go on with a run until its last step.

    Raises:
        RequestError: a setting of the algorithm that there is not.
        AttestationError: sampler and trainer disagree, samples come from weights that were not published here, a step changed
            nothing, or the base changed.
        RunError: too many rollouts failed.
        Interrupted: the user asked to stop; the state is saved.
    """
    engine, config, rl = session.engine, session.config, session.config.rl
    params = SamplingParams(max_tokens=rl.max_tokens)
    policy = Policy(engine, session.renderer, session.adapter, params, config.env.seconds, config.env.retries)
    first = await session.resume()
    await check_choices(session)  # a wrong setting is refused before anything is sampled
    published = await engine.publish(session.adapter)
    recent = deque([published], maxlen=rl.max_lag + 1)  # what samples may be drawn from
    if first == 0:
        clock = time.perf_counter()
        metrics: Metrics = {"step": 0, "adapter/digest": published.digest, **await _held_out(session, policy, dataset, 0, published)}
        await session.record(metrics, {"eval": time.perf_counter() - clock}, last=rl.steps == 0)

    history = session.run.metrics()
    stopped = why_stop(history, rl.max_useless_steps)
    supply = _supply(session, policy, dataset)
    try:
        for step in range(max(first, 1), rl.steps + 1):
            if stopped:
                break
            started = time.perf_counter()
            groups_P = await supply.groups(step, played=sum(m["groups"] for m in history if m["step"] > 0))
            check_failures(groups_P, config.env.max_failed_share)
            lags = _check_origin(groups_P, recent)
            sampled = time.perf_counter()

            graded_P = punish_overlong(groups_P, rl.max_tokens, rl.soft_overlong) if rl.soft_overlong else groups_P
            advantages_P = compute_advantages(graded_P, rl.advantage, rl.advantage_config)
            metrics = {"step": step, **rollout_metrics(groups_P), "groups/dropped": advantages_P.count(None)}
            if rl.max_lag:
                metrics |= {"lag/mean": statistics.fmean(lags or [0]), "lag/max": max(lags, default=0)}
            metrics |= await learn(session, graded_P, advantages_P, step, published, noise=step % config.eval.every == 0)
            if "optim/grad_norm" in metrics:
                published = await session.publish_changed(published)
                recent.append(published)
            metrics |= {"optim/lr": rl.learning_rate, "adapter/version": published.version, "adapter/digest": published.digest}
            trained = time.perf_counter()

            session.run.save_rollouts(step, groups_P, advantages_P)
            history.append(metrics)
            stopped = why_stop(history, rl.max_useless_steps)
            last = step == rl.steps or stopped is not None
            if last or step % config.eval.every == 0:
                metrics |= await _held_out(session, policy, dataset, step, published)
            timings = {"sample": sampled - started, "train": trained - sampled, "eval": time.perf_counter() - trained}
            await session.record(metrics, timings, last)
    finally:
        await supply.close()
    steps = [m for m in history if m["step"] > 0]
    return RlResult(len(steps), sum(m["episodes"] for m in steps), sum(m["bits"] for m in steps), stopped)


def _supply(session: Session, policy: Policy, dataset: EnvDataset) -> OnDemand | InFlight:
    rl, seed = session.config.rl, session.config.seed
    first = derive_seed("problems", seed) >> 24  # where in the endless stream of training problems this seed begins
    schedule = Schedule(rl.groups_per_batch, rl.group_size, seed, first)
    if rl.max_lag:
        return InFlight(policy, dataset, schedule, rl.max_lag)
    return OnDemand(policy, dataset, schedule, rl.refill, is_useful=lambda group: _is_useful(session, group))


def _is_useful(session: Session, group: TrajectoryGroup) -> bool:
    """Whether an estimator finds a signal in a group by itself."""
    rl = session.config.rl
    return compute_advantages([group], rl.advantage, rl.advantage_config)[0] is not None


async def _held_out(session: Session, policy: Policy, dataset: EnvDataset, step: int, published: Adapter) -> Metrics:
    """Evaluate, check and keep the episodes."""
    config = session.config
    held_out = await evaluate(policy, dataset, config.eval.problems, config.seed)
    check_failures([held_out.group()], config.env.max_failed_share)
    _check_origin([held_out.group()], [published])
    session.run.save_rollouts(step, [held_out.group()], [None], kind="eval")
    return held_out.metrics()


def _check_origin(groups_P: Sequence[TrajectoryGroup], recent: Sequence[Adapter]) -> list[int]:
    """How many steps each turn is behind the newest version. Every turn must have been drawn from one of the versions published last."""
    lags: list[int] = []
    for sample in (turn.sample for group in groups_P for t in group.trajectories_G for turn in t.transitions):
        lag = next((lag for lag, adapter in enumerate(reversed(recent)) if adapter == sample.adapter), 0)
        promised = recent[-1 - lag]
        check_drawn([sample], promised.digest, promised.base_digest)
        lags.append(lag)
    return lags
