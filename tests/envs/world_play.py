"""What the worlds' tests share: how an episode is played, and what a policy gone mad might say."""

from __future__ import annotations

import asyncio
import importlib
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from veneer.envs.tools import ToolEnv
from veneer.types import Message, StepResult

ROOT = Path(__file__).parents[2]


def recipe(name: str) -> Any:
    """A recipe as a module; it may import the recipes beside it."""
    sys.path.insert(0, str(ROOT / "recipes"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "recipes"))


def said(content: str) -> Message:
    return {"role": "assistant", "content": content}


def called(tool: str, **arguments: Any) -> Message:
    return {"role": "assistant", "content": "", "tool_calls": [{"name": tool, "arguments": arguments}]}


async def answered(env: ToolEnv, tool: str, **arguments: Any) -> str:
    """What a call brings."""
    result = await env.step(called(tool, **arguments))
    (message,) = result.next_messages
    return message["content"]


async def gold(env: ToolEnv) -> tuple[list[Message], StepResult]:
    """All messages of the episode that gold plays."""
    messages = list((await env.initial_observation()).messages)
    while True:
        messages.append(env.gold())
        result = await env.step(messages[-1])
        if result.episode_done:
            return messages, result
        messages += result.next_messages


async def played(env: ToolEnv, actions: Iterable[Message]) -> StepResult:
    """The last step of an episode in which the actions are said in turn, until it ends."""
    result = None
    for action in actions:
        result = await env.step(action)
        if result.episode_done:
            return result
    assert result is not None
    return result


def play_wild(env: ToolEnv, actions: list[Message]) -> None:
    """Whatever is said, the episode survives it, ends within its turns, and earns between 0 and 1."""
    result = asyncio.run(played(env, [*actions, *[called("nothing")] * env.max_turns]))
    assert result.episode_done
    assert env.turns <= env.max_turns
    assert 0.0 <= result.reward <= 1.0
    assert all(math.isfinite(value) for value in result.metrics.values())


def wild(calls: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[list[Message]]:
    """Turns with several calls, sensible and not, broken ones among them, and perhaps an answer."""
    junk = st.recursive(st.none() | st.integers() | st.floats() | st.text(max_size=9), lambda v: st.lists(v, max_size=2), max_leaves=3)
    nonsense = st.fixed_dictionaries({"name": st.text(max_size=9), "arguments": st.dictionaries(st.text(max_size=9), junk, max_size=2)})
    turn = st.fixed_dictionaries(
        {
            "role": st.just("assistant"),
            "content": st.text(max_size=9),
            "tool_calls": st.lists(st.one_of(calls, calls, calls, nonsense), max_size=4),
            "invalid_tool_calls": st.lists(st.just("<tool_call>{"), max_size=1),
        }
    )
    return st.lists(turn, max_size=30)  # pyright: ignore[reportReturnType]
