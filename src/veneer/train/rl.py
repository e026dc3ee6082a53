"""Reinforcement learning of one adapter from rewards at the end of episodes.

A step: draw problems, play each ``group_size`` times, centre the rewards of a group on their mean, and follow the
importance-weighted policy gradient once. What is left out, and why:

- no value network, no KL term, no reference model: the base is one switch away and the KL to it can be measured;
- no division by the group's standard deviation and none by the answer's length: both bias (https://arxiv.org/abs/2503.20783);
- no clipping by default: one gradient step on fresh samples has ratio 1 (choose ``loss = "ppo"`` to have it);
- no temperature, top-k or top-p: the distribution that is trained is the one that was sampled;
- no learning-rate schedule, no weight decay, no replay.

The loss is a sum over sampled tokens, divided by the number of episodes of a batch, which is constant.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from veneer.measure.bits import reward_bits
from veneer.measure.canary import check_drawn
from veneer.train.advantages import compute_advantages, is_constant
from veneer.train.datums import trajectory_to_data
from veneer.train.evaluate import evaluate
from veneer.train.rollouts import Policy, derive_seed, do_rollouts
from veneer.train.session import Metrics, Session
from veneer.types import AdamParams, Adapter, AttestationError, EnvDataset, RunError, SamplingParams, TrajectoryGroup

KL_LIMITS = {"float32": 1e-5, "bfloat16": 0.01, "float16": 0.01}
"""Nats per token between sampler and trainer on fresh samples; more means that they do not run the same weights. 0.01 is the
cookbook's rule for low precision; in float32 both compute the same numbers, so one unapplied optimizer step shows."""


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
        AttestationError: sampler and trainer disagree, samples come from other weights than those published last, a step changed
            nothing, or the base changed.
        RunError: too many rollouts failed.
        Interrupted: the user asked to stop; the state is saved.
    """
    engine, config, rl = session.engine, session.config, session.config.rl
    params = SamplingParams(max_tokens=rl.max_tokens)
    policy = Policy(engine, session.renderer, session.adapter, params, config.env.seconds, config.env.retries)
    adam = AdamParams(rl.learning_rate, beta1=0.9, beta2=0.95, grad_clip_norm=rl.grad_clip_norm)
    problems = derive_seed("problems", config.seed) >> 24  # where in the endless stream of training problems this seed begins
    first = await session.resume()
    await engine.forward(session.adapter, [], rl.loss, rl.loss_config)  # a wrong setting is refused before anything is sampled
    published = await engine.publish(session.adapter)
    if first == 0:
        clock = time.perf_counter()
        before = await evaluate(policy, dataset, config.eval.problems, config.seed)
        check_failures([before.group()], config.env.max_failed_share)
        _check_origin([before.group()], published)
        session.run.save_rollouts(0, [before.group()], [None], kind="eval")
        metrics: Metrics = {"step": 0, "adapter/digest": published.digest, **before.metrics()}
        await session.record(metrics, {"eval": time.perf_counter() - clock}, last=rl.steps == 0)

    history = session.run.metrics()
    stopped = why_stop(history, rl.max_useless_steps)
    for step in range(max(first, 1), rl.steps + 1):
        if stopped:
            break
        started = time.perf_counter()
        indices = range(problems + (step - 1) * rl.groups_per_batch, problems + step * rl.groups_per_batch)
        groups_P = await do_rollouts(policy, dataset, "train", indices, rl.group_size, derive_seed(config.seed, step))
        check_failures(groups_P, config.env.max_failed_share)
        _check_origin(groups_P, published)
        sampled = time.perf_counter()

        advantages_P = compute_advantages(groups_P)
        episodes = rl.groups_per_batch * rl.group_size
        data = [
            datum
            for group, advantages_G in zip(groups_P, advantages_P, strict=True)
            if advantages_G is not None
            for trajectory, advantages_T in zip((t for t in group.trajectories_G if t.error is None), advantages_G, strict=True)
            for datum in trajectory_to_data(trajectory, [advantage / episodes for advantage in advantages_T])
        ]
        metrics = {"step": step, **rollout_metrics(groups_P)}
        if data:
            passed = engine.forward_backward(session.adapter, data, rl.loss, rl.loss_config)
            stepped = engine.optim_step(session.adapter, adam)
            metrics |= {f"optim/{name.partition(':')[0]}": value for name, value in (await passed).metrics.items()}
            _check_drift(metrics, engine.dtype)
            metrics["optim/grad_norm"] = (await stepped)["grad_norm"]
            published = await session.publish_changed(published)
        metrics |= {"optim/lr": rl.learning_rate, "adapter/version": published.version, "adapter/digest": published.digest}
        trained = time.perf_counter()

        told = [None if advantages_G is None else [advantages_T[0] for advantages_T in advantages_G] for advantages_G in advantages_P]
        session.run.save_rollouts(step, groups_P, told)
        history.append(metrics)
        stopped = why_stop(history, rl.max_useless_steps)
        last = step == rl.steps or stopped is not None
        if last or step % config.eval.every == 0:
            held_out = await evaluate(policy, dataset, config.eval.problems, config.seed)
            check_failures([held_out.group()], config.env.max_failed_share)
            _check_origin([held_out.group()], published)
            session.run.save_rollouts(step, [held_out.group()], [None], kind="eval")
            metrics |= held_out.metrics()
        timings = {"sample": sampled - started, "train": trained - sampled, "eval": time.perf_counter() - trained}
        await session.record(metrics, timings, last)
    steps = [m for m in history if m["step"] > 0]
    return RlResult(len(steps), sum(m["episodes"] for m in steps), sum(m["bits"] for m in steps), stopped)


def rollout_metrics(groups_P: Sequence[TrajectoryGroup]) -> Metrics:
    """What a batch of episodes looks like, under the cookbook's names where it has one."""
    trajectories = [t for group in groups_P for t in group.trajectories_G]
    finished = [t for t in trajectories if t.error is None]
    samples = [turn.sample for t in trajectories for turn in t.transitions]
    tokens = sum(len(s.tokens) for s in samples)
    constant = [group.rewards_G for group in groups_P if is_constant(group.rewards_G)]
    names = sorted({name for t in finished for name in t.metrics})
    metrics: Metrics = {
        "episodes": len(trajectories),
        "failed": len(trajectories) - len(finished),
        "truncated": sum(t.truncated for t in finished),
        "reward/total": statistics.fmean(t.reward for t in finished) if finished else 0.0,
        "by_group/frac_mixed": 1 - len(constant) / len(groups_P),
        "by_group/frac_all_good": sum(bool(rewards) and min(rewards) >= 1 for rewards in constant) / len(groups_P),
        "by_group/frac_all_bad": sum(not rewards or min(rewards) < 1 for rewards in constant) / len(groups_P),
        "groups/dropped": len(constant),
        "bits": sum(reward_bits(group.rewards_G) for group in groups_P),
        "optim/entropy": -sum(float(s.logprobs.sum(dtype="float64")) for s in samples) / max(tokens, 1),
        "tokens/mean": tokens / len(trajectories),
    }
    return metrics | {f"env/all/{name}": statistics.fmean(t.metrics.get(name, 0.0) for t in finished) for name in names}


def why_stop(history: Sequence[Metrics], patience: int) -> str | None:
    """In words, why nothing can be learned any more: the last ``patience`` steps had no group with two different rewards."""
    tail = [m for m in history if m["step"] > 0][-patience:]
    if len(tail) < patience or any(m["by_group/frac_mixed"] > 0 for m in tail):
        return None
    good = statistics.fmean(m["by_group/frac_all_good"] for m in tail)
    if good > 0.5:
        return f"every group of the last {patience} steps was solved: there is nothing left to learn here; use harder problems"
    advice = "lower the learning rate, or start from easier problems or SFT"
    return f"no group of the last {patience} steps had two different rewards: no bits arrive; {advice}"


def _check_drift(metrics: Metrics, dtype: str) -> None:
    """Fresh samples must have the log-probabilities that the trainer computes."""
    drift, limit = max(abs(metrics["optim/kl_sample_train_v1"]), metrics["optim/kl_sample_train_v2"]), KL_LIMITS.get(dtype, 0.01)
    if not drift <= limit:
        raise AttestationError(
            f"step {metrics['step']}: sampler and trainer differ by {drift:.3g} nats a token on fresh samples (limit {limit:g}, {dtype}); "
            "they do not run the same weights"
        )


def _check_origin(groups_P: Sequence[TrajectoryGroup], published: Adapter) -> None:
    """Every turn must have been drawn from the version that was published last."""
    samples = [turn.sample for group in groups_P for t in group.trajectories_G for turn in t.transitions]
    check_drawn(samples, published.digest, published.base_digest)


def check_failures(groups_P: Sequence[TrajectoryGroup], limit: float) -> None:
    """Raises:
    RunError: a larger share than ``limit`` of the rollouts failed; names the three commonest causes.
    """
    errors = Counter(t.error for group in groups_P for t in group.trajectories_G if t.error is not None)
    failed, total = errors.total(), sum(len(group.trajectories_G) for group in groups_P)
    if failed > limit * total:
        causes = "; ".join(f"{count} times: {error}" for error, count in errors.most_common(3))
        raise RunError(f"{failed} of {total} rollouts failed, more than env.max_failed_share = {limit:g}; {causes}")
