"""Episodes with tools: whatever a young policy writes is answered, counted and survived."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from veneer.envs.tools import Tool, ToolEnv, ToolError
from veneer.types import Message, StepResult


def divide(a: int, b: int) -> str:
    if b == 0:
        raise ToolError("division by zero")
    return str(a / b)


async def wait(seconds: float = 0) -> str:
    await asyncio.sleep(seconds)
    return "waited"


NUMBERS = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]}
SECONDS = {"type": "object", "properties": {"seconds": {"type": "number"}}}


@dataclass
class Division:
    """Say 2; or call ``wait`` to give up."""

    messages: list[Message] = field(default_factory=lambda: [{"role": "user", "content": "4/2"}])
    tools: list[Tool] = field(default_factory=lambda: [Tool("divide", "a/b", NUMBERS, divide), Tool("wait", "", SECONDS, wait)])
    done: bool = False
    closed: bool = False

    def over(self) -> bool:
        return self.done

    async def score(self, answer: Message | None) -> Mapping[str, float]:
        return {"reward": float(answer is not None and answer["content"] == "2"), "answered": float(answer is not None)}

    def gold(self) -> Message:
        return said("2")

    async def close(self) -> None:
        self.closed = True


def said(content: str = "", calls: list[Any] | None = None, invalid: list[str] | None = None) -> Message:
    message: Message = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = [{"name": name, "arguments": arguments} for name, arguments in calls]
    if invalid:
        message["invalid_tool_calls"] = invalid
    return message


def play(env: ToolEnv, *actions: Message) -> list[StepResult]:
    async def episode() -> list[StepResult]:
        shown = await env.initial_observation()
        assert [tool["function"]["name"] for tool in shown.tools] == ["divide", "wait"]
        results = [await env.step(action) for action in actions]
        await env.close()
        return results

    return asyncio.run(episode())


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        (("divide", {"a": 4, "b": 2}), "2.0"),
        (("wait", {}), "waited"),
        (("divide", {"a": 4, "b": 0}), "error: division by zero"),
        (("divide", {"a": "4", "b": 2}), "error: divide: a: '4' is not of type 'integer'"),
        (("divide", {"a": 4}), "error: divide: 'b' is a required property"),
        (("divide", {"a": 4, "b": 2, "c": 1}), "error: divide: Additional properties are not allowed ('c' was unexpected)"),
        (("divine", {}), "error: there is no tool divine; there are divide, wait"),
        (("\ud800", {}), "error: there is no tool ?; there are divide, wait"),
    ],
)
def test_a_call_is_answered(call: tuple[str, dict[str, Any]], answer: str) -> None:
    """The model learns from what it is told; an error that ends the episode teaches nothing."""
    env = ToolEnv(Division(), max_turns=4)
    first, last = play(env, said(calls=[call]), said("2"))
    assert (first.reward, first.episode_done, list(first.next_messages)) == (0.0, False, [{"role": "tool", "content": answer}])
    assert (last.reward, last.episode_done) == (1.0, True)
    errors = float(answer.startswith("error"))
    assert last.metrics == {"turns": 2, "tool_calls": 1, "invalid_calls": 0, "tool_errors": errors, "answered": 1}


def test_gold_is_the_tasks() -> None:
    env = ToolEnv(Division(), max_turns=4)
    assert play(env, env.gold())[0].reward == 1.0


def test_what_is_no_call_is_told_and_counted() -> None:
    env = ToolEnv(Division(), max_turns=4)
    first, last = play(env, said("<tool_call>{", calls=[("wait", {})], invalid=["<tool_call>{"]), said("3"))
    assert [m["content"] for m in first.next_messages] == ["waited", "error: not a call; write a JSON object with name and arguments"]
    assert (last.reward, last.metrics["invalid_calls"], last.metrics["tool_calls"]) == (0.0, 1, 1)


def test_turns_run_out_and_tasks_end() -> None:
    """A policy that calls for ever would never be graded."""
    results = play(ToolEnv(Division(), max_turns=3), *[said(calls=[("wait", {})])] * 3)
    assert [r.episode_done for r in results] == [False, False, True]
    assert (results[-1].reward, results[-1].metrics["answered"]) == (0.0, 0.0)
    (result,) = play(ToolEnv(Division(done=True), max_turns=3), said(calls=[("wait", {})]))
    assert result.episode_done


def test_a_tool_that_dies_fails_its_rollout_alone_and_the_task_is_closed() -> None:
    def broken() -> str:
        raise OSError("no such server")

    task = Division()
    task.tools.append(Tool("broken", "", {"type": "object"}, broken))
    env = ToolEnv(task, max_turns=3)
    with pytest.raises(OSError, match="no such server"):
        asyncio.run(env.step(said(calls=[("broken", {})])))
    asyncio.run(env.close())
    assert task.closed
