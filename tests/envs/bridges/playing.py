"""Loading an environment over a bridge, and playing it with words that a test chooses."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from real import python_of

from veneer.envs import load_env
from veneer.envs.bridges.verifiers import VerifiersDataset
from veneer.types import Env, Message, StepResult

HERE = Path(__file__).parent
STANDIN = {"PYTHONPATH": os.pathsep.join(filter(None, [str(HERE / "standin"), os.environ.get("PYTHONPATH")]))}
REAL = pytest.mark.skipif(os.environ.get("VENEER_BRIDGES") != "real", reason="needs the libraries of make bridges, which runs it")


def interpreter(flavour: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """One that has verifiers: the stand-in, or the real package in .bench."""
    if flavour == "standin":
        for name, value in STANDIN.items():
            monkeypatch.setenv(name, value)
        return sys.executable
    return str(python_of(flavour))


def episodes(python: str, **args: Any) -> VerifiersDataset:
    dataset = load_env("verifiers:episodes", {"python": python, "folder": str(HERE / "modules"), "args": args})
    assert isinstance(dataset, VerifiersDataset)
    return dataset


def say(content: str, *calls: tuple[str, dict[str, Any]]) -> Message:
    message: Message = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = [{"name": name, "arguments": arguments} for name, arguments in calls]
    return message


async def play(env: Env, actions: Sequence[Message]) -> list[StepResult]:
    """Say them one after the other, and close the environment as a rollout does."""
    try:
        await env.initial_observation()
        return [await env.step(action) for action in actions]
    finally:
        await env.close()  # type: ignore[attr-defined]


async def outcome(env: Env, actions: Sequence[Message]) -> float | str:
    """What it earned, or how it failed."""
    try:
        return sum(result.reward for result in await play(env, actions))
    except Exception as error:
        return str(error)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def below(pid: int) -> list[int]:
    """Children of a process, and theirs."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [child for child, parent in parents.items() if parent == pid and alive(child)]
    return found + [deeper for child in found for deeper in below(child)]


async def gone(pids: Sequence[int], seconds: float) -> bool:
    """Whether they end within a time."""
    until = time.monotonic() + seconds
    while any(map(alive, pids)):
        if time.monotonic() > until:
            return False
        await asyncio.sleep(0.05)
    return True
