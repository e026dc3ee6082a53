"""A plan of tasks that need each other, with goals that are due, and what goes wrong with it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

LETTERS = "abcdefghijklmnopqrstuvwxyz"
LONGER = 2
"""A spare takes this much longer than the task whose work it does: too long to be run instead of a second try."""


@dataclass(frozen=True)
class Step:
    """A task of the plan."""

    name: str
    takes: int
    needs: tuple[str, ...] = ()
    replaces: str | None = None
    """It is a spare, and does that task's work; it needs what that one needs."""


@dataclass(frozen=True)
class Plan:
    steps: tuple[Step, ...]
    """In the order in which they are shown."""
    due: Mapping[str, int]
    """The goals, the earliest due first."""
    flaky: frozenset[str]
    """Tasks that fail when they are run first, and work when they are retried. Not shown."""
    broken: frozenset[str]
    """Tasks that never work; each has a spare. Not shown."""

    @property
    def definition(self) -> str:
        """What is shown of it: two plans that look alike are never in both splits."""
        return self.text

    @property
    def text(self) -> str:
        goals = ", ".join(f"{goal} by {due}" for goal, due in self.due.items())
        return "\n".join([f"goal {goals}", *(f"- {_line(step)}" for step in self.steps)])

    @cached_property
    def by_name(self) -> Mapping[str, Step]:
        return {step.name: step for step in self.steps}

    @cached_property
    def spares(self) -> Mapping[str, Step]:
        return {step.replaces: step for step in self.steps if step.replaces}

    @cached_property
    def order(self) -> tuple[str, ...]:
        """All that the goals need and they themselves, the earliest goal's first, each behind what it needs."""
        found: dict[str, None] = {}

        def visit(name: str) -> None:
            for need in self.by_name[name].needs:
                visit(need)
            found.setdefault(name)

        for goal in self.due:
            visit(goal)
        return tuple(found)

    @cached_property
    def due_by(self) -> Mapping[str, int]:
        """When each required task must be done: by the time of the first goal that needs it."""
        times: dict[str, int] = {}

        def visit(name: str, due: int) -> None:
            times[name] = min(due, times.get(name, due))
            for need in self.by_name[name].needs:
                visit(need, due)

        for goal, due in self.due.items():
            visit(goal, due)
        return times


def _line(step: Step) -> str:
    if step.replaces:
        return f"{step.name} {step.takes} spare of {step.replaces}"
    return f"{step.name} {step.takes}" + (f" after {' '.join(step.needs)}" if step.needs else "")


@dataclass(frozen=True)
class Size:
    steps: int
    """Tasks that the goals need, the goals among them."""
    goals: int
    extra: int
    """Tasks that nothing needs."""
    spares: int
    failing: int
    slack: int
    """Time that may be lost."""


def generate(rng: random.Random, size: Size) -> Plan:
    count = size.steps + size.extra + size.spares
    letters = iter(rng.sample(LETTERS[:count], count))  # the first ones: a small plan has a small vocabulary
    required = _required(rng, [next(letters) for _ in range(size.steps)], size.goals)
    names = [step.name for step in required]
    goals = names[-size.goals :]
    replaced = rng.sample(names, size.spares)
    spares = [Step(next(letters), step.takes + LONGER, step.needs, replaces=step.name) for step in required if step.name in replaced]
    extra = [Step(next(letters), rng.randint(2, 3), tuple(rng.sample(names[:-1], rng.randint(0, 1)))) for _ in range(size.extra)]
    broken = frozenset(rng.sample(replaced, min(size.spares, sum(rng.random() < 0.5 for _ in range(size.failing)))))
    flaky = frozenset(rng.sample([name for name in names if name not in broken], size.failing - len(broken)))
    shown = [*required, *spares, *extra]
    rng.shuffle(shown)
    undated = Plan(tuple(shown), dict.fromkeys(goals, 0), flaky, broken)
    return Plan(undated.steps, _due(undated, size.slack), flaky, broken)


def _required(rng: random.Random, names: Sequence[str], goals: int) -> list[Step]:
    """Steps in an order that works. The goals come last and need none of each other; something needs every other one."""
    free = len(names) - goals
    needs: dict[str, set[str]] = {name: set() for name in names}
    for i, name in enumerate(names[1:free], 1):
        needs[name].update(rng.sample(names[:i], rng.randint(0, min(2, i))))
    for goal in names[free:]:
        needs[goal].update(rng.sample(names[:free], min(free, 1)))
    for i, name in enumerate(names[:free]):
        if not any(name in needs[later] for later in names[i + 1 :]):
            needs[rng.choice(names[max(i + 1, free) :])].add(name)
    return [Step(name, rng.randint(1, 3), tuple(sorted(needs[name]))) for name in names]


def _due(plan: Plan, slack: int) -> dict[str, int]:
    """When each goal is done if nothing is run that need not be, and the slack behind it."""
    time, due = 0, dict[str, int]()
    for name in plan.order:
        takes = plan.by_name[name].takes
        time += takes
        if name in plan.flaky:
            time += takes
        elif name in plan.broken:
            time += plan.spares[name].takes
        if name in plan.due:
            due[name] = time + slack
    return due
