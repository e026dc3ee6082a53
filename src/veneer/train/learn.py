"""Optimizer steps on one batch of episodes: from advantages to weights."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from veneer.train.advantages import Advantages, resolve_advantage
from veneer.train.corrections import correct, resolve_correction
from veneer.train.datums import groups_to_data
from veneer.train.kl import kl_penalty
from veneer.train.noise import noise_metrics
from veneer.train.normalise import normalise
from veneer.train.session import Metrics, Session
from veneer.types import AdamParams, Adapter, AttestationError, Datum, Floats, TrajectoryGroup

KL_LIMITS = {"float32": 1e-5, "bfloat16": 0.01, "float16": 0.01}
"""Nats per token between sampler and trainer on fresh samples; more means that they do not run the same weights. 0.01 is the
cookbook's rule for low precision; in float32 both compute the same numbers, so one unapplied optimizer step shows."""


async def check_choices(session: Session) -> None:
    """Raises:
    RequestError: the loss, the advantage or the correction, or a setting of theirs, does not exist.
    """
    rl = session.config.rl
    resolve_advantage(rl.advantage, rl.advantage_config)
    if rl.correction != "none":
        resolve_correction(rl.correction, rl.correction_level, rl.correction_config)
    await session.engine.forward(session.adapter, [], rl.loss, loss_settings(session))


async def learn(
    session: Session, groups_P: Sequence[TrajectoryGroup], advantages_P: Advantages, step: int, published: Adapter, *, noise: bool = False
) -> Metrics:
    """``epochs`` passes over the episodes of a batch in ``minibatches`` optimizer steps each. The loss is a sum over sampled tokens,
    divided as ``normalise`` says. Returns nothing without data. ``noise``: the gradient's is measured first.

    Raises:
        AttestationError: samples of the published version have other log-probabilities in the trainer.
    """
    rl, engine = session.config.rl, session.engine
    episodes = rl.groups_per_batch * rl.group_size
    data_ED = groups_to_data(groups_P, advantages_P, mask_truncated=rl.mask_truncated)
    longest = rl.max_tokens * max((len(t.transitions) for group in groups_P for t in group.trajectories_G), default=1)
    data_ED = normalise(data_ED, rl.normalise, episodes=episodes, max_tokens=longest)
    members = [len(advantages_G) for advantages_G in advantages_P if advantages_G is not None]
    if not any(data_ED):
        return {}
    data, metrics = await _prepare(session, [datum for data_D in data_ED for datum in data_D], step, published)
    rows = iter(data)
    data_ED = [[next(rows) for _ in data_D] for data_D in data_ED]
    if noise and len(groups_P) > 1:
        ends = list(itertools.accumulate(members, initial=0))
        data_GD = [[datum for data_D in data_ED[a:b] for datum in data_D] for a, b in itertools.pairwise(ends)]
        metrics |= await noise_metrics(session, [data for data in data_GD if data], len(groups_P), rl.loss, loss_settings(session))
    data_ED = [data_D for data_D in data_ED if data_D]

    adam = AdamParams(rl.learning_rate, beta1=0.9, beta2=0.95, grad_clip_norm=rl.grad_clip_norm)
    first = True
    for epoch in range(rl.epochs):
        for part in _parts(data_ED, rl.minibatches, f"{session.config.seed}/{step}/{epoch}"):
            batch = [datum for data_D in part for datum in data_D]
            passed = engine.forward_backward(session.adapter, batch, rl.loss, loss_settings(session))
            stepped = engine.optim_step(session.adapter, adam)
            output, norm = await passed, (await stepped)["grad_norm"]
            if first and rl.correction == "none":
                _check_fresh(batch, output.logprobs_D, published, engine.dtype, step)
            if first:  # of later ones the samples are older than the weights
                told = {f"optim/{name.partition(':')[0]}": value for name, value in output.metrics.items() if name != "entropy:mean"}
                if rl.entropy_coef:
                    told["optim/entropy_full"] = output.metrics["entropy:mean"]
                metrics = {**told, **metrics, "optim/grad_norm": norm}
            first = False
    return metrics


async def _prepare(session: Session, data: list[Datum], step: int, published: Adapter) -> tuple[list[Datum], Metrics]:
    """Data with what the trainer and the base say of it, where a choice asks for that."""
    rl, engine, metrics = session.config.rl, session.engine, dict[str, float]()
    old = engine.forward(session.adapter, data, "cross_entropy") if rl.correction != "none" else None
    base = engine.forward(None, data, "cross_entropy") if rl.kl_coef else None
    if base is not None and rl.kl_in == "reward":
        data, told = kl_penalty(data, (await base).logprobs_D, rl.kl_coef, rl.kl_estimator, rl.kl_discount)
        metrics |= told
    elif base is not None:
        data = [_with_reference(d, lp) for d, lp in zip(data, (await base).logprobs_D, strict=True)]
    if old is not None:
        logprobs_D = (await old).logprobs_D
        _check_fresh(data, logprobs_D, published, engine.dtype, step)
        data, told = correct(data, logprobs_D, rl.correction, rl.correction_level, rl.correction_config)
        metrics |= told
    return data, {f"optim/{name}": value for name, value in metrics.items()}


def _with_reference(datum: Datum, logprobs: Floats) -> Datum:
    reference = np.where(datum.mask != 0, logprobs, np.float32(0)).astype(np.float32)
    return replace(datum, per_token={**datum.per_token, "reference_logprobs": reference})


def loss_settings(session: Session) -> Mapping[str, float]:
    """Settings of the loss with its terms for KL and entropy, where they are wanted."""
    rl = session.config.rl
    settings = dict(rl.loss_config)
    if rl.kl_coef and rl.kl_in == "loss":
        settings |= {"kl_coef": rl.kl_coef, "kl_estimator": rl.kl_estimator}
    if rl.entropy_coef:
        settings["entropy_coef"] = rl.entropy_coef
    return settings


def _parts(data_ED: Sequence[list[Datum]], parts: int, seed: str) -> list[list[list[Datum]]]:
    """Episodes in ``parts`` about equal parts, in a seeded order if there are several; none is empty."""
    if parts == 1:
        return [list(data_ED)]
    order = list(data_ED)
    random.Random(seed).shuffle(order)
    cuts = [len(order) * i // parts for i in range(parts + 1)]
    return [order[a:b] for a, b in itertools.pairwise(cuts) if b > a]


def _check_fresh(data: Sequence[Datum], logprobs_D: Sequence[Floats], published: Adapter, dtype: str, step: int) -> None:
    """Samples of the version that was published last must have the log-probabilities that the trainer computes for them."""
    fresh = [(d.logprobs[d.mask != 0], lp[d.mask != 0]) for d, lp in zip(data, logprobs_D, strict=True) if d.adapter == published]
    if not fresh:
        return
    gaps = np.concatenate([q.astype(float) - lp for q, lp in fresh])
    drift, limit = float(max(abs(gaps.mean()), 0.5 * np.square(gaps).mean())) if len(gaps) else 0.0, KL_LIMITS.get(dtype, 0.01)
    if not drift <= limit:
        raise AttestationError(
            f"step {step}: sampler and trainer differ by {drift:.3g} nats a token on fresh samples (limit {limit:g}, {dtype}); "
            "they do not run the same weights"
        )
