"""Environments behind an OpenEnv server: a real process that is slow, full, or dies. Every test runs with a stand-in of the server,
and with the servers of the real packages where ``make bridges`` has installed them."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from playing import HERE, REAL, outcome, play, say
from real import python_of

from veneer.engine import LoraEngine, load_base
from veneer.envs import load_env
from veneer.envs.bridges.actions import Action, ActionError, actions_of, read_schema
from veneer.envs.bridges.openenv import OpenEnvDataset, seed_of
from veneer.render import load_renderer
from veneer.train.rollouts import Policy, closing, do_rollouts
from veneer.types import ConfigError, SamplingParams, TrajectoryGroup


class Server:
    def __init__(self, flavour: str, kind: str, sessions: int, port: int) -> None:
        self.command = [
            sys.executable if flavour == "standin" else str(python_of(flavour)),
            str(HERE / "servers" / ("standin.py" if flavour == "standin" else "counting.py")),
            *(str(port), kind, str(sessions)),
        ]
        self.url = f"http://127.0.0.1:{port}"
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
        until = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/schema", timeout=5).close()
                return
            except (urllib.error.URLError, ConnectionError):
                assert self.process.poll() is None, "the server has ended"
                assert time.monotonic() < until
                time.sleep(0.1)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


Start = Callable[..., Server]


@pytest.fixture(params=["standin", pytest.param("openenv", marks=REAL), pytest.param("openenv-core", marks=REAL)])
def start(request: pytest.FixtureRequest) -> Iterator[Start]:
    servers: list[Server] = []

    def begin(kind: str = "say", sessions: int = 64) -> Server:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        servers.append(Server(request.param, kind, sessions, port))
        return servers[-1]

    yield begin
    for server in servers:
        server.stop()


def served(server: Server, **args: Any) -> OpenEnvDataset:
    dataset = load_env(f"openenv:{server.url}", args)
    assert isinstance(dataset, OpenEnvDataset)
    return dataset


def test_an_episode_earns_the_sum_of_its_steps(start: Start) -> None:
    """Observations become user turns, text becomes the action, rewards of all turns count, done ends."""

    async def playing() -> None:
        env = dataset.env("train", 3)
        first = await env.initial_observation()
        assert first.messages == [{"role": "user", "content": f"begin from {seed_of(0, 'train', 3)}"}]
        middle = await env.step(say("1a"))
        assert (middle.reward, middle.episode_done) == (0.5, False)
        assert middle.next_messages == [{"role": "user", "content": "2 letters"}]
        last = await env.step(say("22"))
        assert (last.reward, last.episode_done) == (1.0, True)
        assert last.metrics == {"turns": 2.0, "invalid_actions": 0.0}
        await env.close()  # type: ignore[attr-defined]

    dataset = served(start(), reset={"start": "begin"})
    assert dataset.name == f"openenv:{dataset.rules.name}"
    asyncio.run(playing())


def test_an_action_of_another_type_is_asked_for_and_a_wrong_one_told(start: Start) -> None:
    """The server's own schema says that it is a number; a model that writes a word is told so, and it is counted."""

    async def playing() -> None:
        env = dataset.env("train", 0)
        await env.initial_observation()
        wrong = await env.step(say("seven"))
        assert wrong.next_messages == [{"role": "user", "content": "error: an action is of type integer here, not 'seven'"}]
        assert wrong.metrics["invalid_actions"] == 1.0
        right = await env.step(say(" 7 "))
        assert (right.reward, right.next_messages) == (1.0, [{"role": "user", "content": "1 letters"}])
        await env.close()  # type: ignore[attr-defined]

    dataset = served(start("pick"), action_field="number")
    asyncio.run(playing())


def test_an_action_that_the_server_refuses_is_told_to_the_model(start: Start) -> None:
    """In the server's words; here because of a field that the run adds."""

    async def playing() -> str:
        results = await play(dataset.env("train", 0), [say("1")])
        assert results[0].metrics["invalid_actions"] == 1.0
        return results[0].next_messages[0]["content"]

    dataset = served(start(), action={"colour": "red"})
    assert asyncio.run(playing()) == "error: colour: Extra inputs are not permitted"


def test_tools_of_an_mcp_environment_are_called(start: Start) -> None:
    """The model sees the server's tools, its calls are the actions, and a turn without a call ends the episode."""

    async def playing() -> None:
        env = dataset.env("train", 0)
        first = await env.initial_observation()
        assert first.messages == [{"role": "user", "content": "add what you like"}]
        assert first.tools[0]["function"]["name"] == "add"
        assert first.tools[0]["function"]["parameters"]["required"] == ["a", "b"]
        sums = await env.step(say("", ("add", {"a": 1, "b": 2}), ("sub", {"a": 1})))
        assert [m["role"] for m in sums.next_messages] == ["tool", "tool"]
        assert sums.next_messages[0]["content"] == "3"
        assert sums.next_messages[1]["content"] == "error: Unknown tool: 'sub'"
        broken = await env.step({"role": "assistant", "content": "<tool_call>", "invalid_tool_calls": ["<tool_call>"]})
        assert broken.next_messages[0]["content"].startswith("error: not a call")
        assert (await env.step(say("done"))).episode_done
        await env.close()  # type: ignore[attr-defined]

    dataset = served(start("tools"), prompt="add what you like")
    asyncio.run(playing())


def test_an_episode_without_end_is_ended(start: Start) -> None:
    """Tool environments need not say done."""

    async def playing() -> bool:
        results = await play(dataset.env("train", 0), [say("", ("add", {"a": i, "b": 1})) for i in range(3)])
        assert [r.episode_done for r in results[:-1]] == [False, False]
        return results[-1].episode_done

    dataset = served(start("tools"), prompt="add", max_turns=3)
    assert asyncio.run(playing())


def test_no_problem_is_in_both_splits_and_seeds_fit_every_generator() -> None:
    """Even seeds train, odd ones are held out; as large as an index of a run may be."""
    indices = [*range(100), 2**40, 2**40 + 1]
    assert all(seed_of(0, "train", i) % 2 == 0 and seed_of(0, "eval", i) % 2 == 1 for i in indices)
    assert all(0 <= seed_of(s, "train", i) < 2**32 for i in indices for s in (0, 7))
    assert len({seed_of(0, "train", i) for i in range(1000)}) == 1000


# ---------------------------------------------------------------- what goes wrong


def test_a_server_that_dies_costs_its_episode_and_is_found_again(start: Start) -> None:
    """The open episode fails in words; while it is down the next ones do; once it is back they are played."""

    async def playing(env_index: int, *words: str) -> float | str:
        return await outcome(dataset.env("train", env_index), [say(w) for w in words])

    server = start()
    dataset = served(server)
    assert str(asyncio.run(playing(0, "!die"))).endswith("closed the connection in the middle of an episode")
    server.process.wait()
    assert "cannot be reached" in str(asyncio.run(playing(0, "1", "2")))
    server.start()
    assert asyncio.run(playing(0, "1", "2")) == 2.0


def test_a_server_that_raises_fails_the_episode_in_one_line(start: Start) -> None:
    dataset = served(start())
    failed = str(asyncio.run(outcome(dataset.env("train", 0), [say("!raise")])))
    assert failed.endswith("failed: EXECUTION_ERROR: that is")


def test_a_full_server_is_waited_for_and_then_told_in_words(start: Start) -> None:
    """More episodes than sessions: they take turns; and if none ends, the line says what to change."""

    async def turns() -> list[float | str]:
        return list(await asyncio.gather(*(outcome(dataset.env("train", i), [say("1"), say("2")]) for i in range(5))))

    async def crowd() -> str:
        first = dataset.env("train", 0)
        second = dataset.env("train", 1)
        await first.initial_observation()
        await second.initial_observation()
        failed = await outcome(impatient.env("train", 2), [say("1")])
        await first.close()  # type: ignore[attr-defined]
        await second.close()  # type: ignore[attr-defined]
        return str(failed)

    server = start(sessions=2)
    dataset, impatient = served(server), served(server, wait_seconds=0.3)
    assert asyncio.run(turns()) == [2.0] * 5
    assert "plays 2 sessions at once and all are taken; raise its max_concurrent_envs" in asyncio.run(crowd())


def test_slow_and_nan_steps_fail_their_rollouts_under_the_loop(start: Start) -> None:
    """With the bundled base: a scripted policy is not needed to see that the time box holds and that others go on."""
    dataset = served(start("say"))
    policy = Policy(LoraEngine(load_base("nano")), load_renderer("nano"), None, SamplingParams(max_tokens=64), env_seconds=2.0)

    @asynccontextmanager
    async def scripted() -> AsyncGenerator[Any]:
        """Says "!slow" for the model in every third episode and "!nan" in every third."""

        class Scripted:
            name = "scripted"

            def env(self, split: Any, index: int) -> Any:
                env = dataset.env(split, index)
                if index % 3:
                    step = env.step
                    env.step = lambda _action: step(say("!slow" if index % 3 == 1 else "!nan"))  # type: ignore[method-assign]
                return env

        async with closing(Scripted()) as found:
            yield found

    async def playing() -> list[TrajectoryGroup]:
        async with scripted() as found:
            return await do_rollouts(policy, found, "train", range(6), 1, seed=0)

    errors = [group.trajectories_G[0].error for group in asyncio.run(playing())]
    slow, nan = "step took longer than 2 s", "without any reward: it was null throughout, as NaN is on this wire"
    assert [None if e is None else slow if e == slow else nan if e.endswith(nan) else e for e in errors] == [None, slow, nan] * 2


def test_a_server_that_is_not_there_or_is_none_is_told_before_the_run(start: Start) -> None:
    """With exit code 2, and without what may be secret in its address."""
    with pytest.raises(ConfigError, match=r"no OpenEnv server answers at http://127\.0\.0\.1:1 ") as told:
        load_env("openenv:http://user:secret@127.0.0.1:1")
    assert "secret" not in str(told.value)
    with pytest.raises(ConfigError, match="must be openenv:http://HOST:PORT"):
        load_env("openenv:echo")
    with pytest.raises(ConfigError, match="no field 'massage'; did you mean 'message'"):
        served(start(), action_field="massage")
    with pytest.raises(ConfigError, match="/schema names no action"):
        read_schema({"detail": "not found"})


def test_an_observation_field_that_is_not_there_fails_with_those_that_are(start: Start) -> None:
    dataset = served(start(), observation_field="txt")
    assert "no field 'txt', but" in str(asyncio.run(outcome(dataset.env("train", 0), [])))


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, " 12 ", "12"),
        ({"type": "integer"}, "12", 12),
        ({"type": "number"}, "1.5", 1.5),
        ({"type": "boolean"}, "true", True),
        ({"type": "array"}, "[1, 2]", [1, 2]),
        ({"type": "object"}, '{"a": 1}', {"a": 1}),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "3", 3),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "3", "3"),
        ({}, "x", "x"),
    ],
)
def test_text_becomes_what_the_schema_names(schema: Any, text: str, value: Any) -> None:
    action = Action(read_schema({"action": {"properties": {"field": schema}}}), "field", {"player": 1})
    (made,) = actions_of(action, say(text))
    assert made == {"player": 1, "field": value}
    assert json.dumps(made["field"]) == json.dumps(value)


@pytest.mark.parametrize(("kind", "text"), [("integer", "1.5"), ("integer", "true"), ("number", "x"), ("array", "{}"), ("boolean", "1")])
def test_text_of_another_type_is_no_action(kind: str, text: str) -> None:
    action = Action(read_schema({"action": {"properties": {"field": {"type": kind}}}}), "field", {})
    with pytest.raises(ActionError, match=f"of type {kind}"):
        actions_of(action, say(text))
