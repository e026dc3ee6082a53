"""``workflow``: carry out a plan whose tasks need each other, take time and sometimes fail, before it is due."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from veneer.envs.tools import Tool, ToolEnv, ToolError
from veneer.envs.worlds.plan import LETTERS, Plan, Size, generate
from veneer.envs.worlds.problems import check_whole, draw
from veneer.types import ConfigError, Message, Split

SYSTEM = (
    "Run what the goals need, each task after those it needs, in time. "
    "If it failed, retry it. If it is broken, run its spare. A wrong call costs 1."
)
TASK: dict[str, object] = {"type": "object", "properties": {"task": {"type": "string"}}, "required": ["task"]}
NONE: dict[str, object] = {"type": "object", "properties": {}, "required": []}

Outcome = Literal["done", "failed", "broken"]


@dataclass(frozen=True)
class Entry:
    """A task that was run, from ``start`` to ``end``, as the log has it."""

    task: str
    start: int
    end: int
    outcome: Outcome


def validate(plan: Plan, log: Sequence[Entry]) -> dict[str, bool]:
    """Per required task: whether the log has its work done, itself or by its spare, after what it needs and before it is due."""
    done: dict[str, int] = {}
    for entry in log:
        step = plan.by_name[entry.task]
        on_time = all(need in done and done[need] <= entry.start for need in step.needs)
        if entry.outcome == "done" and on_time:
            done.setdefault(step.replaces or step.name, entry.end)
    return {name: name in done and done[name] <= due for name, due in plan.due_by.items()}


class WorkflowTask:
    """One plan. One task runs at a time; time passes while it does."""

    def __init__(self, plan: Plan, partial_credit: bool) -> None:
        self.plan, self._partial = plan, partial_credit
        self.time = self.refused = 0
        self.log: list[Entry] = []
        self.state: dict[str, Outcome] = {}
        """Of what was run. A task whose spare has done its work is done."""
        self.messages: Sequence[Message] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": plan.text}]
        self.tools: Sequence[Tool] = [
            Tool("run", "Run a task.", TASK, self._run),
            Tool("retry", "Run a task that failed again.", TASK, self._retry),
            Tool("status", "Time and tasks so far.", NONE, self._status),
        ]

    def _refuse(self, why: str) -> ToolError:
        self.refused += 1
        self.time += 1
        return ToolError(f"{why}, time {self.time}")

    def _run(self, task: str) -> str:
        step = self.plan.by_name.get(task)
        if step is None:
            raise self._refuse("no such task")
        work = step.replaces or task
        if "done" in (self.state.get(task), self.state.get(work)):
            raise self._refuse("done before")
        if task in self.state:
            raise self._refuse("it failed, retry it" if self.state[task] == "failed" else "it is broken")
        missing = [need for need in step.needs if self.state.get(need) != "done"]
        if missing:
            raise self._refuse(f"needs {' '.join(missing)}")
        flaw: Outcome = "failed" if task in self.plan.flaky else "broken"
        return self._spend(task, flaw if task in self.plan.flaky | self.plan.broken else "done")

    def _retry(self, task: str) -> str:
        if self.state.get(task) != "failed":
            raise self._refuse("it did not fail")
        return self._spend(task, "done")

    def _spend(self, task: str, outcome: Outcome) -> str:
        step = self.plan.by_name[task]
        start, self.time = self.time, self.time + step.takes
        self.log.append(Entry(task, start, self.time, outcome))
        self.state[task] = outcome
        if step.replaces and outcome == "done":
            self.state[step.replaces] = "done"
        return f"{outcome}, time {self.time}"

    def _status(self) -> str:
        words = [f"time {self.time}"]
        for outcome in ("done", "failed", "broken"):
            tasks = [task for task, state in self.state.items() if state == outcome]
            words += [f"{outcome} {' '.join(tasks)}"] if tasks else []
        return ", ".join(words)

    def over(self) -> bool:
        """Every goal is done, or cannot be done in time any more."""
        return all(self.state.get(goal) == "done" or self.time >= due for goal, due in self.plan.due.items())

    async def score(self, answer: Message | None) -> Mapping[str, float]:
        verdict = validate(self.plan, self.log)
        share = sum(verdict.values()) / len(verdict)
        success = float(all(verdict.values()))
        entries = {entry.task for entry in self.log}
        return {
            "reward": share if self._partial else success,
            "correct": success,
            "required_done": share,
            "refused": float(self.refused),
            "needless": float(sum(not step.replaces and step.name not in verdict and step.name in entries for step in self.plan.steps)),
            "gave_up": float(answer is not None and not success),
        }

    def gold(self) -> Message:
        for name in self.plan.order:
            state = self.state.get(name)
            if state != "done":
                task = self.plan.spares[name].name if state == "broken" else name
                call = "retry" if self.state.get(task) == "failed" else "run"
                return {"role": "assistant", "content": "", "tool_calls": [{"name": call, "arguments": {"task": task}}]}
        return {"role": "assistant", "content": "done"}


@dataclass(frozen=True)
class Workflow:
    """Plans by split and index."""

    size: Size
    partial_credit: bool
    seed: int
    name: str = "workflow"

    def env(self, split: Split, index: int) -> ToolEnv:
        plan = draw(partial(generate, size=self.size), split, index, f"workflow/{self.seed}")
        return ToolEnv(WorkflowTask(plan, self.partial_credit), 2 * (self.size.steps + self.size.failing) + 4)


def workflow(
    steps: int = 3,
    goals: int = 1,
    extra: int = 1,
    spares: int = 1,
    failing: int = 1,
    slack: int = 1,
    partial_credit: bool = False,
    seed: int = 0,
) -> Workflow:
    """Plans with ``steps`` tasks that ``goals`` of them need, ``extra`` ones that nothing needs, ``spares`` of which each does another
    task's work, ``failing`` tasks that fail or are broken, and ``slack``, the time that may be lost.

    ``partial_credit``: the reward is the share of required tasks that were done in time; otherwise it is 1 for all and 0 for less."""
    check_whole("steps", steps, 2, 20)
    check_whole("goals", goals, 1, steps - 1)
    check_whole("spares", spares, 0, steps)
    check_whole("extra", extra, 0, len(LETTERS) - steps - spares)
    check_whole("failing", failing, 0, steps)
    check_whole("slack", slack, 0, 100)
    if not isinstance(partial_credit, bool):
        raise ConfigError(f"env.args.partial_credit: {partial_credit!r} must be true or false")
    return Workflow(Size(steps, goals, extra, spares, failing, slack), partial_credit, seed)
