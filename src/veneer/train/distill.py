"""Distillation: an adapter becomes like a teacher, which is another adapter, another base, or one that is told more.

On-policy the student samples, and the teacher judges every token: its advantage is log p_teacher - log p_student, minus the
reverse KL at that place as the sample has it, and the loss is importance_sampling
(https://thinkingmachines.ai/blog/on-policy-distillation/; https://arxiv.org/abs/2306.13649). Off-policy the teacher samples,
and the student imitates: cross-entropy on the tokens that were drawn, or on the teacher's ``top_k`` likeliest at each place as soft
targets, whose probabilities are made to sum to 1.

With ``teacher_prompt`` the teacher sees a system message that the student does not: prompt distillation
(https://arxiv.org/abs/2112.00861, "context distillation"). Then each episode is read twice, behind two beginnings.

Prompts are those of the environment, whose reward is measured and never trained on, or of a file. What is left out, and why:

- no credit for later tokens (discount 0): the teacher judges each by itself, which has less variance;
- no mixture with a reward: ``kind = "rl"`` from the distilled adapter comes after;
- no other vocabulary: a token must mean the same to both.

Losses are sums over tokens, divided by the number of trained tokens of a batch.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from veneer.measure.canary import check_drawn
from veneer.measure.intervals import mean_interval
from veneer.render import Renderer
from veneer.train.datums import trajectory_to_data, weighed
from veneer.train.evaluate import evaluate
from veneer.train.learn import KL_LIMITS
from veneer.train.metrics import check_failures
from veneer.train.rollouts import Policy, derive_seed, do_rollouts, with_system
from veneer.train.scoring import score
from veneer.train.session import Metrics, Session
from veneer.types import (
    AdamParams,
    Adapter,
    AttestationError,
    Datum,
    Engine,
    EnvDataset,
    Floats,
    RunError,
    SamplingParams,
    TopLogprobs,
    Trajectory,
    TrajectoryGroup,
)


@dataclass(frozen=True)
class Teacher:
    """Who is imitated: an adapter of an engine, or the base alone, and what it is told that the student is not."""

    engine: Engine
    adapter: str | None
    digest: str | None
    """Of the adapter as it was loaded."""
    prompt: str = ""


@dataclass(frozen=True)
class DistillResult:
    steps: int
    episodes: int


async def train(session: Session, dataset: EnvDataset, teacher: Teacher, held_out: int) -> DistillResult:
    """Run or go on with a run until its last step; ``held_out`` problems measure how far the student is from the teacher.

    Raises:
        AttestationError: sampler and trainer disagree, samples come from other weights than they should, a step changed nothing, or a
            base changed.
        RunError: too many rollouts failed, or all are too long.
        Interrupted: the user asked to stop; the state is saved.
    """
    engine, config, distill = session.engine, session.config, session.config.distill
    params = SamplingParams(max_tokens=distill.max_tokens)
    student = Policy(engine, session.renderer, session.adapter, params, config.env.seconds, config.env.retries)
    told = dataclasses.replace(student, engine=teacher.engine, adapter=teacher.adapter, system=teacher.prompt)
    player = student if distill.on_policy else dataclasses.replace(told, top_logprobs=distill.top_k if distill.top_k > 1 else 0)
    adam = AdamParams(distill.learning_rate, beta1=0.9, beta2=0.95, grad_clip_norm=distill.grad_clip_norm)
    problems = derive_seed("problems", config.seed) >> 24  # where in the endless stream of training problems this seed begins
    first = await session.resume()
    published = await engine.publish(session.adapter)
    if first == 0:
        clock = time.perf_counter()
        metrics: Metrics = {"step": 0, "adapter/digest": published.digest}
        metrics |= await held_out_metrics(session, student, dataset, teacher, held_out, 0, published)
        if config.plays:
            own = await evaluate(told, dataset, held_out, config.seed)
            check_failures([own.group()], config.env.max_failed_share)
            metrics |= {f"teacher/{name}": value for name, value in own.metrics().items()}
        await session.record(metrics, {"eval": time.perf_counter() - clock}, last=distill.steps == 0)

    for step in range(max(first, 1), distill.steps + 1):
        started = time.perf_counter()
        indices = range(problems + (step - 1) * distill.groups_per_batch, problems + step * distill.groups_per_batch)
        groups_P = await do_rollouts(player, dataset, "train", indices, distill.group_size, derive_seed(config.seed, step))
        check_failures(groups_P, config.env.max_failed_share)
        check_player(groups_P, teacher, None if not distill.on_policy else published)
        episodes, metrics = episodes_that_fit(groups_P, session, teacher)
        if config.plays:
            metrics["reward/total"] = sum(t.reward for t in episodes) / len(episodes)
        sampled = time.perf_counter()

        if distill.on_policy:
            metrics |= await _follow(session, teacher, episodes)
        else:
            metrics |= await _imitate(session, episodes)
        metrics = {"step": step, **metrics, "optim/grad_norm": (await engine.optim_step(session.adapter, adam))["grad_norm"]}
        published = await session.publish_changed(published)
        metrics |= {"optim/lr": distill.learning_rate, "adapter/version": published.version, "adapter/digest": published.digest}
        trained = time.perf_counter()

        session.run.save_rollouts(step, groups_P, [None] * len(groups_P))
        last = step == distill.steps
        if last or step % config.eval.every == 0:
            metrics |= await held_out_metrics(session, student, dataset, teacher, held_out, step, published)
        timings = {"sample": sampled - started, "train": trained - sampled, "eval": time.perf_counter() - trained}
        await session.record(metrics, timings, last)
    steps = [m for m in session.run.metrics() if m["step"] > 0]
    return DistillResult(len(steps), sum(m["episodes"] for m in steps))


# ---------------------------------------------------------------- on-policy


async def _follow(session: Session, teacher: Teacher, episodes: Sequence[Trajectory]) -> Metrics:
    """Gather the gradient of the student's own episodes, as the teacher judges them."""
    data = [datum for episode in episodes for datum in trajectory_to_data(episode)]
    gaps_D = await distances(session.renderer, teacher, episodes)
    tokens = sum(map(len, gaps_D))
    judged = [with_gaps(datum, gaps, 1 / tokens) for datum, gaps in zip(data, gaps_D, strict=True)]
    passed = await session.engine.forward_backward(session.adapter, judged, "importance_sampling")
    metrics: Metrics = {f"optim/{name.partition(':')[0]}": value for name, value in passed.metrics.items()}
    drift, limit = metrics["optim/kl_sample_train_v2"], KL_LIMITS.get(session.engine.dtype, 0.01)
    if not drift <= limit:
        raise AttestationError(
            f"sampler and trainer differ by {drift:.3g} nats a token on fresh samples (limit {limit:g}); they do not run the same weights"
        )
    return metrics | {"tokens": tokens, "kl/student_teacher": sum(float(gaps.sum(dtype="float64")) for gaps in gaps_D) / tokens}


async def distances(renderer: Renderer, teacher: Teacher, episodes: Sequence[Trajectory]) -> list[Floats]:
    """log p_student - log p_teacher of the tokens that the student sampled, per datum of the episodes: their mean is an unbiased
    estimate of the reverse KL."""
    own = [datum for episode in episodes for datum in trajectory_to_data(episode)]
    seen = [datum for episode in episodes for datum in trajectory_to_data(seen_with(episode, renderer, teacher.prompt))]
    judged = (await teacher.engine.forward(teacher.adapter, seen, "cross_entropy")).logprobs_D
    return [a.logprobs[a.mask != 0] - lp[b.mask != 0] for a, b, lp in zip(own, seen, judged, strict=True)]


def with_gaps(datum: Datum, gaps: Floats, weight: float) -> Datum:
    """The datum with advantages of minus the gaps [trained tokens] times the weight."""
    advantages = np.zeros_like(datum.advantages)
    advantages[datum.mask != 0] = -gaps * np.float32(weight)
    return dataclasses.replace(datum, advantages=advantages)


# ---------------------------------------------------------------- off-policy


async def _imitate(session: Session, episodes: Sequence[Trajectory]) -> Metrics:
    """Gather the gradient of the teacher's episodes, as the student sees them."""
    data, entropy = [], 0.0
    for episode in episodes:
        rows = [dataclasses.replace(d, adapter=None) for d in trajectory_to_data(seen_with(episode, session.renderer, ""))]
        tops = [turn.sample.top_logprobs for turn in episode.transitions if turn.sample.top_logprobs is not None]
        if tops:
            rows, nats = soft_rows(rows, tops)
            entropy += nats
        else:
            entropy -= sum(float(d.logprobs[d.mask != 0].sum(dtype="float64")) for d in rows)
        data += rows
    tokens = sum(float(d.mask.sum(dtype="float64")) for d in data)
    passed = await session.engine.forward_backward(session.adapter, [weighed(d, 1 / tokens) for d in data], "cross_entropy")
    nll = passed.metrics["loss:sum"]
    return {"tokens": tokens, "train_mean_nll": nll, "kl/teacher_student": nll - entropy / tokens}


def soft_rows(rows: Sequence[Datum], tops: Sequence[TopLogprobs]) -> tuple[list[Datum], float]:
    """An episode's datums with the teacher's k likeliest tokens as targets [N, K] where one was sampled, weighed by their probabilities
    among the k; and the entropy of those in nats, summed over the places."""
    tokens, logprobs = np.concatenate([top.tokens for top in tops]), np.concatenate([top.logprobs for top in tops])
    logprobs = logprobs - np.logaddexp.reduce(logprobs, 1, keepdims=True)
    weights = np.exp(logprobs)
    entropy = -float(np.where(weights > 0, weights * logprobs, 0).sum(dtype=np.float64))
    soft: list[Datum] = []
    at = 0
    for row in rows:
        places = np.flatnonzero(row.mask)
        targets, mask = np.zeros((len(row.tokens), tokens.shape[1]), np.int64), np.zeros((len(row.tokens), tokens.shape[1]), np.float32)
        targets[places], mask[places] = tokens[at : at + len(places)], weights[at : at + len(places)]
        at += len(places)
        soft.append(Datum(row.tokens, targets, np.zeros_like(mask), np.zeros_like(mask), mask))
    return soft, entropy


# ---------------------------------------------------------------- two readers


def seen_with(episode: Trajectory, renderer: Renderer, system: str) -> Trajectory:
    """The same episode as one sees it who was told ``system`` before, or nothing: every prompt with another beginning."""
    assert episode.observation is not None
    old = len(episode.transitions[0].prompt)
    begin = renderer.build_generation_prompt(with_system(system, episode.observation.messages), episode.observation.tools)
    turns = [dataclasses.replace(turn, prompt=np.concatenate([begin, turn.prompt[old:]])) for turn in episode.transitions]
    return dataclasses.replace(episode, transitions=turns)


def episodes_that_fit(groups_P: Sequence[TrajectoryGroup], session: Session, teacher: Teacher) -> tuple[list[Trajectory], Metrics]:
    """The finished episodes that both can read to the end, and what all look like.

    Raises:
        RunError: there are none.
    """
    everything = [t for group in groups_P for t in group.trajectories_G]
    finished = [t for t in everything if t.error is None]
    readers = ((session.engine, ""), (teacher.engine, teacher.prompt))
    fitting = [t for t in finished if all(_length(seen_with(t, session.renderer, told)) <= e.context_length for e, told in readers)]
    if not fitting:
        raise RunError(f"none of {len(everything)} episodes fits into both contexts; lower distill.max_tokens")
    tokens = sum(len(turn.sample.tokens) for t in everything for turn in t.transitions)
    return fitting, {
        "episodes": len(everything),
        "failed": len(everything) - len(finished),
        "truncated": sum(t.truncated for t in finished),
        "too_long": len(finished) - len(fitting),
        "tokens/mean": tokens / len(everything),
    }


def _length(episode: Trajectory) -> int:
    return max(len(turn.prompt) + len(turn.sample.tokens) for turn in episode.transitions)


def check_player(groups_P: Sequence[TrajectoryGroup], teacher: Teacher, student: Adapter | None) -> None:
    """Every turn must have been drawn from who was to play: the student's version that was published last, or (None) the teacher."""
    samples = [turn.sample for group in groups_P for t in group.trajectories_G for turn in t.transitions]
    if student is None:
        check_drawn(samples, teacher.digest, teacher.engine.base_digest)
    else:
        check_drawn(samples, student.digest, student.base_digest)


async def held_out_metrics(
    session: Session, student: Policy, dataset: EnvDataset, teacher: Teacher, problems: int, step: int, published: Adapter
) -> Metrics:
    """What the student earns on held-out problems, and how far it is from the teacher where it goes: the reverse KL, in nats a token, and
    in nats an episode with its 95% interval."""
    if not problems:
        return {}
    found = await score(session, student, dataset, problems, step, published)
    questions = {"eval/problems": problems, "eval/tokens": found.means["tokens"]}  # a file's earn nothing
    metrics: Metrics = found.metrics() if session.config.plays else questions
    episodes, _ = episodes_that_fit([found.group()], session, teacher)
    gaps_D = iter(await distances(session.renderer, teacher, episodes))
    sums: list[float] = []
    tokens = 0
    for episode in episodes:
        gaps = [next(gaps_D) for _ in trajectory_to_data(episode)]
        sums.append(sum(float(g.sum(dtype="float64")) for g in gaps))
        tokens += sum(map(len, gaps))
    metrics["eval/kl/student_teacher"] = sum(sums) / tokens
    if len(sums) > 1:
        mean = mean_interval(sums)
        metrics |= {"eval/kl/episode": mean.value, "eval/kl/episode_low": mean.low, "eval/kl/episode_high": mean.high}
    return metrics
