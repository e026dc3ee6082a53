"""From a kind of run to its loop, and from what the loop has recorded to the run's summary."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.measure.intervals import wilson
from veneer.measure.ledger import ledger, preference_ledger, teacher_ledger, text_ledger
from veneer.measure.noise_scale import noise_scale
from veneer.train import distill, dpo, rejection, rl, sft
from veneer.train.distill import Teacher
from veneer.train.questions import Questions, load_questions
from veneer.train.rollouts import closing
from veneer.train.session import Session
from veneer.types import EnvDataset

Loop = Callable[[Session, EnvDataset | None, Teacher | None], Coroutine[Any, Any, dict[str, Any]]]
"""-> what the summary says of the kind. The environment is there if the configuration plays one, the teacher if it distills."""


async def run_rl(session: Session, dataset: EnvDataset | None, teacher: Teacher | None) -> dict[str, Any]:
    assert dataset is not None
    async with closing(dataset):
        result = await rl.train(session, dataset)
    metrics = session.run.metrics()
    summary = {"kind": "rl", "env": dataset.name, **dataclasses.asdict(result), **_scored(metrics)}
    if result.steps:
        summary |= dataclasses.asdict(ledger(metrics, session.run.timings(), session.trainable))
    noise = noise_scale(metrics, session.config.rl.group_size)
    return summary | ({} if noise is None else {"noise_scale": dataclasses.asdict(noise)})


async def run_sft(session: Session, dataset: EnvDataset | None, teacher: Teacher | None) -> dict[str, Any]:
    result = await sft.train(session)
    metrics = session.run.metrics()
    summary = {"kind": "sft", **dataclasses.asdict(result), **_around(metrics, "eval/mean_nll", "nll")}
    if result.steps:
        summary |= dataclasses.asdict(text_ledger(metrics, result.rows, session.config.sft.batch_size, session.trainable))
    return summary


async def run_dpo(session: Session, dataset: EnvDataset | None, teacher: Teacher | None) -> dict[str, Any]:
    result = await dpo.train(session)
    metrics = session.run.metrics()
    summary: dict[str, Any] = {"kind": "dpo", **dataclasses.asdict(result), **_around(metrics, "eval/loss", "loss")}
    measured = [m for m in metrics if "eval/pairs" in m]
    if measured:  # before the first step no answer is preferred to any: both rewards are 0
        last, pairs = measured[-1], measured[-1]["eval/pairs"]
        preferred = wilson(round(last["eval/rewards/accuracies"] * pairs), pairs)
        summary["preferred_after"] = {"value": preferred.value, "low": preferred.low, "high": preferred.high, "trials": pairs}
        summary["margin_after"] = last["eval/rewards/margins"]
    if result.steps:
        summary |= dataclasses.asdict(preference_ledger(metrics, result.pairs, session.config.dpo.batch_size, session.trainable))
    return summary


async def run_rejection(session: Session, dataset: EnvDataset | None, teacher: Teacher | None) -> dict[str, Any]:
    assert dataset is not None
    async with closing(dataset):
        result = await rejection.train(session, dataset)
    metrics = session.run.metrics()
    summary = {"kind": "rejection", "env": dataset.name, **dataclasses.asdict(result), **_scored(metrics)}
    return summary | dataclasses.asdict(ledger(metrics, session.run.timings(), session.trainable))


async def run_distill(session: Session, dataset: EnvDataset | None, teacher: Teacher | None) -> dict[str, Any]:
    assert teacher is not None
    settings, problems = session.config.distill, session.config.eval.problems
    if dataset is None:
        dataset = load_questions(Path(settings.data), settings.held_out)
        problems = min(problems, len(dataset.held_out))
    async with closing(dataset):
        result = await distill.train(session, dataset, teacher, problems)
    metrics = session.run.metrics()
    summary = {"kind": "distill", **dataclasses.asdict(result)}
    if not isinstance(dataset, Questions):
        summary |= {"env": dataset.name, "reward_teacher": _interval(metrics[0], "teacher/eval/reward", "teacher/eval"), **_scored(metrics)}
    measured = [m for m in metrics if "eval/kl/episode" in m]
    for name, m in (("before", measured[0]), ("after", measured[-1])) if measured else ():
        summary[f"kl_{name}"] = _interval(m, "eval/kl/episode", "eval")
    off_policy = result.steps and not settings.on_policy
    return summary | (dataclasses.asdict(teacher_ledger(metrics, session.trainable)) if off_policy else {})


LOOPS: dict[str, Loop] = {"rl": run_rl, "sft": run_sft, "dpo": run_dpo, "rejection": run_rejection, "distill": run_distill}


def _scored(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The held-out score before and after, with its interval, and shares of some behaviours."""
    evaluations = [m for m in metrics if "eval/solved" in m]
    summary: dict[str, Any] = {}
    for name, m in (("before", evaluations[0]), ("after", evaluations[-1])):
        summary[f"reward_{name}"] = _interval(m, "eval/reward", "eval")
        for share in ("stepwise", "self_corrected", "thought", "called"):
            if f"eval/env/{share}" in m:
                summary[f"{share}_{name}"] = m[f"eval/env/{share}"]
    return summary


def _interval(metrics: Mapping[str, Any], key: str, prefix: str) -> dict[str, Any]:
    ends = {end: metrics[f"{key}_{end}"] for end in ("low", "high")}
    return {"value": metrics[key], **ends, "trials": metrics[f"{prefix}/problems"]}


def _around(metrics: Sequence[Mapping[str, Any]], key: str, name: str) -> dict[str, float]:
    """A held-out number before and after; nothing if it was not measured."""
    values = [m[key] for m in metrics if key in m]
    return {f"{name}_before": values[0], f"{name}_after": values[-1]} if values else {}
