"""Rejection sampling: an adapter imitates its own best episodes.

A round: draw problems, play each ``group_size`` times, keep of every problem up to ``keep`` different episodes whose reward reaches
``bar``, and fine-tune on them, with the loss on what was sampled. Several rounds are expert iteration
(https://arxiv.org/abs/1705.08439; for language models RAFT, https://arxiv.org/abs/2304.06767, and ReST-EM,
https://arxiv.org/abs/2312.06585). What is left out, and why:

- no negatives: what falls short of the bar is not trained against (``kind = "rl"`` does that);
- no return to the base between rounds, which ReST-EM makes: a round goes on from the adapter of the one before, as RAFT does;
- no importance ratio: within a round the episodes are data, as if somebody else had written them;
- no episode that was cut off: it would teach not to end.

The loss is the mean over the trained tokens of a batch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from veneer.measure.canary import check_drawn
from veneer.train.datums import supervised_data, weighed
from veneer.train.metrics import check_failures, rollout_metrics
from veneer.train.rollouts import Policy, derive_seed, do_rollouts
from veneer.train.rows import batch_indices
from veneer.train.scoring import score
from veneer.train.session import Metrics, Session
from veneer.types import AdamParams, Adapter, Datum, EnvDataset, RunError, SamplingParams, Trajectory, TrajectoryGroup


class NothingKeptError(RunError):
    """No episode of a round reached the bar."""


@dataclass(frozen=True)
class RejectionResult:
    steps: int
    episodes: int
    kept: int
    stopped: str | None
    """Why the run ended before its last step."""


async def train(session: Session, dataset: EnvDataset) -> RejectionResult:
    """Run or go on with a run until the last step of its last round.

    Raises:
        AttestationError: samples come from other weights than those published last, a step changed nothing, or the base changed.
        RunError: too many rollouts failed.
        NothingKeptError: no episode of the first round reached the bar. If none of a later one does, the run ends with what it has.
        Interrupted: the user asked to stop; the state is saved.
    """
    engine, config, rejection = session.engine, session.config, session.config.rejection
    params = SamplingParams(max_tokens=rejection.max_tokens)
    policy = Policy(engine, session.renderer, session.adapter, params, config.env.seconds, config.env.retries)
    adam = AdamParams(rejection.learning_rate, beta1=0.9, beta2=0.95, grad_clip_norm=rejection.grad_clip_norm)
    first = await session.resume()
    published = await engine.publish(session.adapter)
    if first == 0:
        clock = time.perf_counter()
        before = await score(session, policy, dataset, config.eval.problems, 0, published)
        metrics: Metrics = {"step": 0, "adapter/digest": published.digest, **before.metrics()}
        await session.record(metrics, {"eval": time.perf_counter() - clock}, last=False)

    rows: list[list[Datum]] = []
    stopped = None
    for step in range(max(first, 1), config.total_steps + 1):
        started = time.perf_counter()
        round_, place = divmod(step - 1, rejection.steps)
        metrics = {"step": step, "round": round_ + 1}
        if place == 0:
            try:
                metrics |= await sample_round(session, policy, dataset, round_, step, published)
            except NothingKeptError as none:
                if not round_:
                    raise
                stopped = str(none)
                break
        if place == 0 or not rows:
            rows = kept_rows(session, step - place)
        sampled = time.perf_counter()

        chosen = batch_indices(len(rows), rejection.batch_size, place + 1, derive_seed(config.seed, "round", round_))
        batch = [datum for i in chosen for datum in rows[i]]
        tokens = sum(float(d.mask.sum()) for d in batch)
        passed = engine.forward_backward(session.adapter, [weighed(d, 1 / tokens) for d in batch], "cross_entropy")
        stepped = engine.optim_step(session.adapter, adam)
        metrics |= {"train_mean_nll": (await passed).metrics["loss:sum"], "optim/grad_norm": (await stepped)["grad_norm"]}
        published = await session.publish_changed(published)
        metrics |= {"optim/lr": rejection.learning_rate, "adapter/version": published.version, "adapter/digest": published.digest}
        trained = time.perf_counter()

        if place == rejection.steps - 1:
            metrics |= (await score(session, policy, dataset, config.eval.problems, step, published)).metrics()
        timings = {"sample": sampled - started, "train": trained - sampled, "eval": time.perf_counter() - trained}
        await session.record(metrics, timings, last=step == config.total_steps)
    history = session.run.metrics()
    rounds = [m for m in history if "kept" in m]
    return RejectionResult(int(history[-1]["step"]), sum(m["episodes"] for m in rounds), sum(m["kept"] for m in rounds), stopped)


async def sample_round(session: Session, policy: Policy, dataset: EnvDataset, round_: int, step: int, published: Adapter) -> Metrics:
    """Play the problems of a round and keep all episodes in the run's folder, those to imitate with advantage 1, the others with 0."""
    config, rejection = session.config, session.config.rejection
    start = (derive_seed("problems", config.seed) >> 24) + round_ * rejection.problems
    indices = range(start, start + rejection.problems)
    groups_P = await do_rollouts(policy, dataset, "train", indices, rejection.group_size, derive_seed(config.seed, step))
    check_failures(groups_P, config.env.max_failed_share)
    samples = [turn.sample for group in groups_P for t in group.trajectories_G for turn in t.transitions]
    check_drawn(samples, published.digest, published.base_digest)
    kept_P = [choose(group, rejection.bar, rejection.keep) for group in groups_P]
    kept = int(sum(map(sum, kept_P)))
    if not kept:
        ended = [t for group in groups_P for t in group.trajectories_G if t.error is None and not t.truncated]
        best = f"the best reward is {max(t.reward for t in ended):g}" if ended else "none ended within rejection.max_tokens"
        played = len(indices) * rejection.group_size
        none = f"round {round_ + 1}: none of {played} episodes reached rejection.bar = {rejection.bar:g}; {best}"
        raise NothingKeptError(f"{none}; lower the bar, play more episodes, or start from SFT")
    session.run.save_rollouts(step, groups_P, [_every_turn(group, kept_G) for group, kept_G in zip(groups_P, kept_P, strict=True)])
    return {**rollout_metrics(groups_P), "kept": kept, "problems/kept": sum(any(kept_G) for kept_G in kept_P) / len(groups_P)}


def choose(group: TrajectoryGroup, bar: float, keep: int) -> list[float]:
    """Per finished member 1 if it is to be imitated, else 0: the first ``keep`` that reach the bar, ended by themselves and differ."""
    seen: set[bytes] = set()
    verdicts: list[float] = []
    for trajectory in (t for t in group.trajectories_G if t.error is None):
        said = _said(trajectory)
        good = trajectory.reward >= bar and not trajectory.truncated and said not in seen and len(seen) < keep
        seen |= {said} if good else set()
        verdicts.append(float(good))
    return verdicts


def _every_turn(group: TrajectoryGroup, kept_G: Sequence[float]) -> list[list[float]]:
    finished = (t for t in group.trajectories_G if t.error is None)
    return [[kept] * len(t.transitions) for t, kept in zip(finished, kept_G, strict=True)]


def _said(trajectory: Trajectory) -> bytes:
    return b"/".join(turn.sample.tokens.tobytes() for turn in trajectory.transitions)


def kept_rows(session: Session, step: int) -> list[list[Datum]]:
    """The datums of the episodes that were kept at ``step``, from the run's folder: a run that was interrupted within a round finds there
    what the weights that it no longer has have sampled."""
    kept = [r for r in session.run.rollouts(step) if r["turns"] and r["turns"][0]["advantage"] == 1.0]
    turns = [[(np.array(turn["prompt"], np.int64), np.array(turn["tokens"], np.int64)) for turn in r["turns"]] for r in kept]
    return [supervised_data(episode) for episode in turns]
