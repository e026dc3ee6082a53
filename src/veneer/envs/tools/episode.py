"""An episode with tools: the model calls them until it answers, the task is over, or its turns are used up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from veneer.envs.tools.tool import Tool, ToolError, answer_call
from veneer.types import Closable, Message, Observation, StepResult


class Task(Protocol):
    """What is to be done with the tools, and what it was worth. Single use, like the environment around it."""

    @property
    def messages(self) -> Sequence[Message]:
        """How the conversation begins."""
        ...

    @property
    def tools(self) -> Sequence[Tool]: ...

    def over(self) -> bool:
        """Whether it ended by itself: the last day is done, the goal is reached. Asked behind every turn with calls."""
        ...

    async def score(self, answer: Message | None) -> Mapping[str, float]:
        """Metrics of the whole episode, ``reward`` among them. ``answer``: the turn that called nothing; None: there was none."""
        ...

    def gold(self) -> Message:
        """What a perfect policy says next."""
        ...


class ToolEnv:
    """Plays a task. A call that is no call, names no tool, has wrong arguments or cannot be answered is told to the model as an
    error, and counted."""

    def __init__(self, task: Task, max_turns: int) -> None:
        """``max_turns``: assistant turns, the answer among them."""
        self.task, self.max_turns = task, max_turns
        self._tools = {tool.name: tool for tool in task.tools}
        self.turns = self.calls = self.invalid = self.errors = 0

    async def initial_observation(self) -> Observation:
        return Observation(self.task.messages, [tool.schema() for tool in self._tools.values()])

    async def step(self, action: Message) -> StepResult:
        self.turns += 1
        calls, invalid = action.get("tool_calls", []), action.get("invalid_tool_calls", [])
        if not calls and not invalid:
            return await self._end(action)
        results: list[Message] = []
        for call in calls:
            self.calls += 1
            try:
                content = await answer_call(self._tools, call)
            except ToolError as error:
                self.errors += 1
                content = f"error: {error}"
            results.append({"role": "tool", "content": content.encode(errors="replace").decode()})  # JSON can spell half a character
        for _ in invalid:
            self.invalid += 1
            results.append({"role": "tool", "content": "error: not a call; write a JSON object with name and arguments"})
        if self.task.over() or self.turns >= self.max_turns:
            return await self._end(None)
        return StepResult(0.0, episode_done=False, next_messages=results, metrics=self._counts())

    async def _end(self, answer: Message | None) -> StepResult:
        metrics = {**self._counts(), **await self.task.score(answer)}
        return StepResult(metrics.pop("reward"), episode_done=True, metrics=metrics)

    def _counts(self) -> dict[str, float]:
        counts = {"turns": self.turns, "tool_calls": self.calls, "invalid_calls": self.invalid, "tool_errors": self.errors}
        return {name: float(count) for name, count in counts.items()}

    def gold(self) -> Message:
        return self.task.gold()

    async def close(self) -> None:
        if isinstance(self.task, Closable):
            await self.task.close()
