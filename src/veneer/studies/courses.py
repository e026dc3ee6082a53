"""Courses of learning by feedback of several kinds: a loop of its own, as what it gives to a token no environment says.

A step plays the same problems, as often each, for every kind of feedback, and makes one optimizer step on the mean over episodes. Where
worked solutions are shown instead, it is as many of them as there are episodes, each of a problem of its own.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast, get_args

import numpy as np

from veneer.envs import load_env
from veneer.envs.dataset import ProblemDataset, QuestionEnv
from veneer.measure.noise_scale import noise_parts
from veneer.studies.credit import Case, Feedback, Judged, bits_of, centred_by_place, judge
from veneer.studies.lab import Lab, Place
from veneer.studies.worked import worked
from veneer.train.config import RunConfig
from veneer.train.datums import supervised_data, trajectory_to_data, weighed
from veneer.train.evaluate import evaluate
from veneer.train.metrics import check_failures
from veneer.train.rollouts import Policy, derive_seed, do_rollouts
from veneer.types import AdamParams, ConfigError, Datum, DivergedError, SamplingParams, Tokens, Trajectory, TrajectoryGroup

SHOWN = "demonstrations"
KINDS = (*get_args(Feedback), SHOWN)
"""Of a course, by the name of its configuration."""


@dataclass(frozen=True)
class Course:
    """What one came to: what is compared, and how it got there."""

    config: RunConfig
    accuracy: Sequence[tuple[int, float]]
    """(step, share of the held-out problems), at the start, every ``eval.every`` steps and at the end."""
    bits: Sequence[float]
    """Of each step: what its feedback told at most, or of demonstrations what the policy did not foresee."""
    diverged: str | None

    @property
    def score(self) -> float:
        """In the end; 0 if it diverged, as of ``lab.Outcome``."""
        return 0.0 if self.diverged else self.accuracy[-1][1]

    @property
    def score_before(self) -> float:
        return self.accuracy[0][1]

    @property
    def episodes_a_step(self) -> int:
        return self.config.rl.groups_per_batch * self.config.rl.group_size

    def steps_to(self, accuracy: float) -> float | None:
        """Until it first has this accuracy, by straight lines between evaluations; None: it never has."""
        for (step, a), (later, b) in zip(self.accuracy, self.accuracy[1:], strict=False):
            if a < accuracy <= b:
                return step + (later - step) * (accuracy - a) / (b - a)
        return 0.0 if self.score_before >= accuracy else None


@dataclass(frozen=True)
class Courses:
    """Makes them in a lab, each once. The name of a configuration says of which kind it is."""

    lab: Lab

    async def run(self, configs: Sequence[RunConfig]) -> list[Course]:
        """Side by side, as runs are made.

        Raises:
            ConfigError: an environment whose problems have no worked solutions.
            Interrupted, VeneerError: as ``Lab.measured``.
        """
        found, free = dict[int, Course](), asyncio.Semaphore(self.lab.side_by_side)

        async def one(place: int, config: RunConfig) -> None:
            async with free:
                told = await self.lab.measured(f"course {config.name}", config, self._make)
                found[place] = Course(config, [(step, value) for step, value in told["accuracy"]], told["bits"], told["diverged"])

        await self.lab.together([one(place, config) for place, config in enumerate(configs)])
        return [found[place] for place in range(len(configs))]

    async def _make(self, config: RunConfig) -> dict[str, Any]:
        async with school(self.lab.place(config), config) as lessons:
            accuracy, bits = [(0, await lessons.examine())], list[float]()
            for step in range(1, config.rl.steps + 1):
                self.lab.go_on()
                try:
                    bits.append(await lessons.step(step))
                except DivergedError as error:
                    return {"accuracy": accuracy, "bits": bits, "diverged": str(error)}
                if step % config.eval.every == 0 or step == config.rl.steps:
                    accuracy.append((step, await lessons.examine()))
            return {"accuracy": accuracy, "bits": bits, "diverged": None}


@asynccontextmanager
async def school(place: Place, config: RunConfig) -> AsyncGenerator[School, None]:
    """With an adapter of the configuration's own, that has learned nothing.

    Raises:
        ConfigError: an environment whose problems have no worked solutions.
    """
    found = School(place, config)
    place.engine.create_adapter(found.learner, config.lora_config())
    try:
        await place.engine.publish(found.learner)
        yield found
    finally:
        place.engine.remove_adapter(found.learner)


class School:
    """What a course needs: problems with their worked solutions, an adapter that learns, and its examinations."""

    def __init__(self, place: Place, config: RunConfig) -> None:
        dataset = load_env(config.env.name, config.env.args)
        if not isinstance(dataset, ProblemDataset) or dataset.name != "arithmetic":
            raise ConfigError(f"env.name = {config.env.name!r}: only problems of arithmetic have worked solutions; leave it as it is")
        self.engine, self.renderer, self.config, self.dataset = place.engine, place.renderer, config, dataset
        self.learner = f"({config.name}, rate {config.rl.learning_rate:g}, seed {config.seed})"  # no run can have this name
        self.first = derive_seed("problems", config.seed) >> 24  # as of any run of this seed
        self.breaks = {int(token) for token in range(self.renderer.vocab_size) if b"\n" in self.renderer.vocabulary.bytes_of(token)}
        params = SamplingParams(max_tokens=config.rl.max_tokens)
        self.policy = Policy(self.engine, self.renderer, self.learner, params, config.env.seconds)

    async def examine(self) -> float:
        return (await evaluate(self.policy, self.dataset, self.config.eval.problems, self.config.seed)).reward.value

    async def play(self, step: int, groups: int) -> list[TrajectoryGroup]:
        """The problems of a step.

        Raises:
            RunError: an episode failed.
        """
        start, seed = self.first + (step - 1) * groups, derive_seed(self.config.seed, step)
        played = await do_rollouts(self.policy, self.dataset, "train", range(start, start + groups), self.config.rl.group_size, seed)
        check_failures(played, 0.0)
        return played

    async def step(self, step: int) -> float:
        """Learn from a step's feedback or solutions. Returns the bits that they told."""
        rl = self.config.rl
        if self.config.name == SHOWN:
            episodes = rl.groups_per_batch * rl.group_size
            start = self.first + (step - 1) * episodes
            data = [weighed(self.shown(index), 1 / episodes) for index in range(start, start + episodes)]
            passed = self.engine.forward_backward(self.learner, data, "cross_entropy")
            bits = (await passed).metrics["loss:sum"] * episodes / math.log(2)
        else:
            groups = await self.play(step, rl.groups_per_batch)
            judged = [self.judged(group, cast("Feedback", self.config.name)) for group in groups]
            bits = sum(bits_of(group) for group in judged)
            data = [datum for group, told in zip(groups, judged, strict=True) for datum in lesson(group, told, len(groups))]
            if not data:
                return 0.0  # nobody was told anything
            self.engine.forward_backward(self.learner, data, "importance_sampling")
        await self.engine.optim_step(self.learner, AdamParams(rl.learning_rate, beta1=0.9, beta2=0.95))
        await self.engine.publish(self.learner)
        return bits

    async def noise(self, groups: Sequence[TrajectoryGroup], feedback: Feedback) -> dict[str, float]:
        """Of the gradient that this feedback gives, as ``train/noise.py`` measures it in runs; nothing is learned."""

        async def squared(data: Sequence[Datum]) -> float:
            if not data:
                return 0.0
            self.engine.forward_backward(self.learner, data, "importance_sampling")
            return float(np.square(await self.engine.zero_grad(self.learner)))

        lessons = [lesson(group, self.judged(group, feedback), len(groups)) for group in groups]
        each = [await squared(data) for data in lessons]
        return noise_parts(each, await squared([datum for data in lessons for datum in data]), len(groups))

    def judged(self, group: TrajectoryGroup, feedback: Feedback) -> list[Judged]:
        """The members of a group."""
        reference = self.reference(group.index)[1]
        return [judge(_case(member, reference), feedback, self.breaks) for member in group.trajectories_G]

    def reference(self, index: int) -> tuple[Tokens, Tokens]:
        """Prompt and worked solution of a training problem."""
        env = cast(QuestionEnv, self.dataset.env("train", index))
        return self.renderer.build_supervised_example(worked(env.problem))

    def shown(self, index: int) -> Datum:
        (datum,) = supervised_data([self.reference(index)])
        return datum


def _case(member: Trajectory, reference: Tokens) -> Case:
    (turn,) = member.transitions
    return Case(turn.sample.tokens, not member.truncated, reference, member.reward >= 1)


def lesson(group: TrajectoryGroup, judged: Sequence[Judged], groups: int) -> list[Datum]:
    """What a policy gradient reads of a group, of so many in a batch: the mean over episodes. Empty: the feedback tells nothing."""
    data = list[Datum]()
    for member, advantages in zip(group.trajectories_G, centred_by_place(judged), strict=True):
        if advantages.any():
            (datum,) = trajectory_to_data(member)
            placed = datum.advantages.copy()
            placed[datum.mask != 0] = advantages
            data.append(weighed(dataclasses.replace(datum, advantages=placed), 1 / (groups * len(judged))))
    return data
