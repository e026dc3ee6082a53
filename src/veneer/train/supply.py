"""Where the groups of a step come from: played when they are wanted, or while the step before is still being trained."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

from veneer.train.rollouts import Policy, derive_seed, do_group_rollout, do_rollouts
from veneer.types import EnvDataset, TrajectoryGroup

Judge = Callable[[TrajectoryGroup], bool]
"""Whether a group teaches anything."""


@dataclass(frozen=True)
class Schedule:
    """What a step consumes."""

    groups: int
    """Problems a step."""
    size: int
    """Episodes of each."""
    seed: int
    first: int
    """Where in the stream of training problems this run begins."""


class OnDemand:
    """Groups are played when they are asked for, from the version published last. Useless ones are replaced within a budget (dynamic
    sampling, DAPO, https://arxiv.org/abs/2503.14476, section 3.2): ``refill`` times as many problems again, at most."""

    def __init__(self, policy: Policy, dataset: EnvDataset, schedule: Schedule, refill: float, is_useful: Judge) -> None:
        self._policy, self._dataset, self._schedule = policy, dataset, schedule
        self._budget, self._is_useful = int(refill * schedule.groups), is_useful

    async def groups(self, step: int, played: int) -> list[TrajectoryGroup]:
        """All that were played for a step, useless ones among them. ``played``: problems of the steps before."""
        schedule, groups_P = self._schedule, list[TrajectoryGroup]()
        wanted, budget = schedule.groups, self._budget
        while wanted > 0:
            start = schedule.first + played + len(groups_P)
            seed = derive_seed(schedule.seed, step)
            groups_P += await do_rollouts(self._policy, self._dataset, "train", range(start, start + wanted), schedule.size, seed)
            wanted = min(budget, schedule.groups - sum(map(self._is_useful, groups_P)))
            budget -= wanted
        return groups_P

    async def close(self) -> None:
        """Nothing goes on behind a step."""


@dataclass
class _Flight:
    """A group that is being played."""

    index: int
    step: int
    """That was to be trained next when it began: none of its samples is older."""
    task: asyncio.Task[TrajectoryGroup]
    landed: int | None = field(default=None)
    """The how-manieth that ended."""


class InFlight:
    """Groups go on being played while earlier ones are trained, up to ``max_lag`` steps behind the weights that they train.

    While a step waits for its groups, those of the ``max_lag`` steps behind it are played too. It takes groups that have ended, and
    waits only for those that would be too old behind it. So no episode is thrown away for having taken long, which would teach the
    policy to be quick; and later turns of an episode are drawn from the version that is newest when they begin.
    """

    def __init__(self, policy: Policy, dataset: EnvDataset, schedule: Schedule, max_lag: int) -> None:
        self._policy, self._dataset, self._schedule, self._max_lag = policy, dataset, schedule, max_lag
        self._flights: list[_Flight] = []
        self._started = 0
        self._landings = count()

    async def groups(self, step: int, played: int) -> list[TrajectoryGroup]:
        """A step's groups. ``played``: problems of the steps before; after a resume, those that were in flight are begun anew."""
        self._started = max(self._started, played)
        self._launch(step)
        while True:
            taken = choose([(f.step + self._max_lag, f.landed) for f in self._flights], step, self._schedule.groups)
            if taken is not None:
                break
            await asyncio.wait([f.task for f in self._flights if f.landed is None], return_when=asyncio.FIRST_COMPLETED)
            self._note_landings()
        chosen = [self._flights[i] for i in taken]
        self._flights = [flight for i, flight in enumerate(self._flights) if i not in taken]
        return [flight.task.result() for flight in sorted(chosen, key=lambda flight: flight.index)]

    def _launch(self, step: int) -> None:
        """As many as this step and the ``max_lag`` behind it take: all of them could be in time."""
        while len(self._flights) < self._schedule.groups * (self._max_lag + 1):
            index = self._schedule.first + self._started
            played = do_group_rollout(self._policy, self._dataset, "train", index, self._schedule.size, self._schedule.seed)
            self._flights.append(_Flight(index, step, asyncio.create_task(played)))
            self._started += 1

    def _note_landings(self) -> None:
        for flight in self._flights:
            if flight.landed is None and flight.task.done():
                flight.landed = next(self._landings)

    async def close(self) -> None:
        """Give up what is still being played."""
        for flight in self._flights:
            flight.task.cancel()
        await asyncio.gather(*(flight.task for flight in self._flights), return_exceptions=True)


def choose(flights: Sequence[tuple[int, int | None]], step: int, groups: int) -> list[int] | None:
    """Which of the flights (last step that may still take it, landing number or None) a step takes: ``groups`` of them, the most
    urgent first. None: too few have landed, or those left over could not all be taken in time."""
    landed = sorted((deadline, landing, i) for i, (deadline, landing) in enumerate(flights) if landing is not None)
    if len(landed) < groups:
        return None
    taken = [i for _, _, i in landed[:groups]]
    left = sorted(deadline for i, (deadline, _) in enumerate(flights) if i not in taken)
    in_time = all(place < groups * (deadline - step) for place, deadline in enumerate(left))
    return taken if in_time else None
