"""Tools of real MCP servers, over stdio and HTTP: what they answer, and what it costs when they do not."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sandboxes import children, command_of

from veneer.envs import load_env
from veneer.envs.tools import Tool, ToolError
from veneer.envs.tools.mcp_client import LONGEST, McpFailure, McpServer, McpSettings, read_settings, usable
from veneer.types import ConfigError, Message

SERVER = str(Path(__file__).with_name("mcp_server.py"))
COMMAND = (sys.executable, SERVER)
SECONDS = 20.0
"""For servers to start on a busy machine."""


@pytest.fixture(scope="module")
def stdio() -> McpServer:
    return McpServer(McpSettings(COMMAND, seconds=SECONDS))


@pytest.fixture(scope="module")
def url() -> Generator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with subprocess.Popen([*COMMAND, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + 30
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}/mcp"
        process.kill()


@contextlib.asynccontextmanager
async def session(server: McpServer) -> AsyncGenerator[dict[str, Tool]]:
    taken = server.session()
    try:
        yield {tool.name: tool for tool in taken.tools()}
    finally:
        await taken.close()


def call(server: McpServer, name: str, **arguments: Any) -> str:
    async def once() -> str:
        async with session(server) as tools:
            return await tools[name].call(arguments)

    return asyncio.run(once())


def servers() -> set[int]:
    """Those over stdio that come from this process."""
    return {pid for pid in children(SERVER) if command_of(pid)[-2:] == [SERVER, ""]}


# ---------------------------------------------------------------- what is answered


@pytest.mark.parametrize("way", ["stdio", "url"])
def test_tools_are_shown_and_answer(way: str, request: pytest.FixtureRequest) -> None:
    """Over either transport: the server's own schema, its answer, and its error as an error."""
    found = request.getfixturevalue(way)
    server = found if way == "stdio" else McpServer(McpSettings(url=found, seconds=SECONDS, prefix="web_"))
    prefix = "" if way == "stdio" else "web_"

    async def talk() -> None:
        async with session(server) as tools:
            shown = tools[f"{prefix}add"].schema()["function"]
            assert (shown["name"], shown["description"]) == (f"{prefix}add", "Add two numbers.")
            assert shown["parameters"]["properties"]["a"]["type"] == "integer"
            assert await tools[f"{prefix}add"].call({"a": 19, "b": 23}) == "42"
            with pytest.raises(ToolError, match="Error executing tool fail"):
                await tools[f"{prefix}fail"].call({"why": "so"})
            with pytest.raises(ToolError, match="'x' is not of type 'integer'"):
                await tools[f"{prefix}add"].call({"a": "x", "b": 1})
            assert await tools[f"{prefix}picture"].call({}) == "look:\n[image]"
            flood = await tools[f"{prefix}flood"].call({})
            assert len(flood) < LONGEST + 100
            assert flood.endswith(f"[cut at {LONGEST} characters]")

    asyncio.run(talk())
    assert servers() == set()


def test_an_episode_has_a_server_of_its_own(stdio: McpServer) -> None:
    """What one episode leaves in a server is not there for the next, whose reward would hang on it."""
    assert call(stdio, "keep", word="one") == "one"
    assert call(stdio, "keep", word="two") == "two"
    kept = McpServer(McpSettings(COMMAND, seconds=SECONDS, reuse=True))

    async def twice() -> list[str]:
        answers = []
        for word in ("one", "two"):
            async with session(kept) as tools:
                answers.append(await tools["keep"].call({"word": word}))
        assert len(servers()) == 1
        await kept.close()
        return answers

    assert asyncio.run(twice()) == ["one", "one two"]
    assert servers() == set()


def test_no_call_no_server(stdio: McpServer) -> None:
    """Most episodes of a young policy call nothing; a process for each would be for nothing."""

    async def idle() -> None:
        async with session(stdio):
            assert servers() == set()

    asyncio.run(idle())


def test_a_server_sees_little_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are in the environment; a server gets what it is given."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("FOR_THE_SERVER", "open")
    server = McpServer(McpSettings(COMMAND, seconds=SECONDS, env={"TOKEN": "$FOR_THE_SERVER", "MODE": "dry"}))
    seen = call(server, "environment").split()
    assert {"TOKEN", "MODE"} <= set(seen) <= {"TOKEN", "MODE", "PATH", "HOME", "USER", "LOGNAME", "SHELL", "TERM", "LC_CTYPE"}


# ---------------------------------------------------------------- what it costs


def test_a_server_that_is_killed_costs_its_own_episode(stdio: McpServer) -> None:
    """kill -9 in the middle: the call fails, the others' servers answer on, and the next episode has one that lives."""
    server = stdio

    async def three() -> None:
        async with session(server) as hit, session(server) as beside:
            pids = [int(await tools["pid"].call({})) for tools in (hit, beside)]
            waiting = asyncio.create_task(hit["hang"].call({}))
            await asyncio.sleep(0.3)
            os.kill(pids[0], 9)
            with pytest.raises(McpFailure, match=r"python.* did not answer hang .*[Cc]onnection closed"):
                await waiting
            with pytest.raises(McpFailure):
                await hit["add"].call({"a": 1, "b": 2})
            assert await beside["add"].call({"a": 1, "b": 2}) == "3"
        async with session(server) as next_one:
            assert int(await next_one["pid"].call({})) not in pids

    asyncio.run(three())
    assert servers() == set()


def test_a_reused_server_that_dies_is_replaced() -> None:
    """Also between two episodes, while nobody calls it."""
    server = McpServer(McpSettings(COMMAND, seconds=SECONDS, reuse=True))

    async def episodes() -> None:
        async with session(server) as tools:
            first = int(await tools["pid"].call({}))
        os.kill(first, 9)
        await asyncio.sleep(0.3)
        with contextlib.suppress(McpFailure):  # its death may not be seen yet
            async with session(server) as tools:
                await tools["pid"].call({})
        async with session(server) as tools:
            assert int(await tools["pid"].call({})) != first
            with pytest.raises(McpFailure):
                await tools["die"].call({})
        async with session(server) as tools:
            assert await tools["add"].call({"a": 1, "b": 2}) == "3"
        await server.close()

    asyncio.run(episodes())
    assert servers() == set()


@pytest.mark.parametrize("way", ["stdio", "url"])
def test_a_server_that_hangs_costs_its_own_episode(way: str, stdio: McpServer, url: str) -> None:
    """Within ``seconds``; nothing of it stays."""
    server = stdio if way == "stdio" else McpServer(McpSettings(url=url, seconds=SECONDS))

    async def hang() -> float:
        async with session(server) as tools:
            await tools["add"].call({"a": 1, "b": 2})  # the server is up
            server.settings = replace(server.settings, seconds=1.0)
            began = time.monotonic()
            with pytest.raises(McpFailure, match="did not answer hang"):
                await tools["hang"].call({})
            waited = time.monotonic() - began
        server.settings = replace(server.settings, seconds=SECONDS)
        async with session(server) as tools:
            assert await tools["add"].call({"a": 2, "b": 2}) == "4"
        return waited

    assert asyncio.run(hang()) < 6
    assert servers() == set()


def test_who_stops_waiting_leaves_no_server(tmp_path: Path) -> None:
    """An episode's time is over while its server still starts."""
    slow = tmp_path / "slow.py"
    mark = tmp_path / "second"
    slow.write_text(
        f"import os, sys, time\nif os.path.exists({str(mark)!r}): time.sleep(60)\n"
        f"open({str(mark)!r}, 'w')\nsys.argv = [{SERVER!r}]\nexec(compile(open({SERVER!r}).read(), {SERVER!r}, 'exec'))"
    )
    server = McpServer(McpSettings((sys.executable, str(slow)), seconds=SECONDS))

    async def impatient() -> None:
        taken = server.session()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(taken.tools()[0].call({"a": 1, "b": 2}), 0.5)
        await taken.close()

    asyncio.run(impatient())
    assert children(str(slow)) == set()


# ---------------------------------------------------------------- what is refused at the start

BAD = """
import anyio, mcp.types as types
from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server
schema = {schema}

async def listed(context, parameters):
    tools = [types.Tool(name="good", input_schema={{"type": "object"}}), types.Tool(name="odd", input_schema=schema)]
    return types.ListToolsResult(tools=tools)

async def main():
    server = Server("bad", on_list_tools=listed)
    async with stdio_server() as (reading, writing):
        await server.run(reading, writing, server.create_initialization_options())

anyio.run(main)
"""


BROKEN = [
    ({"type": "object", "properties": {"a": {"type": "integr"}}}, "'integr' is not valid"),
    ({"type": "object", "required": 3}, "3 is not of type 'array'"),
    ({"type": "object", "properties": {"a": {"$ref": "http://127.0.0.1/schema.json"}}}, "it refers to http://127.0.0.1/schema.json"),
    ({"type": "object", "properties": {"a": {"$ref": "#/$defs/none"}}}, "#/$defs/none leads nowhere"),
    ({}, "its type is not object"),
]


def test_a_tool_without_a_schema_is_refused_by_name(tmp_path: Path) -> None:
    """Arguments that cannot be checked fail in the middle of a run, one episode at a time."""
    schema, words = BROKEN[0]
    program = tmp_path / "bad.py"
    program.write_text(BAD.format(schema=schema))
    with pytest.raises(ConfigError, match=r"MCP server python.*: tool odd: no usable JSON schema") as caught:
        McpServer(McpSettings((sys.executable, str(program))))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("schema", "words"), BROKEN)
def test_schemas_that_cannot_check_arguments(schema: dict[str, Any], words: str) -> None:
    """Wrong ones, and such as would be fetched from somewhere while an episode waits."""
    from mcp.types import Tool as Listed

    with pytest.raises(ConfigError, match="tool odd") as caught:
        usable(McpSettings(url="http://x"), Listed(name="odd", input_schema=schema))
    assert words in str(caught.value)


def test_a_server_that_does_not_start_is_told_in_one_line(tmp_path: Path) -> None:
    """With its last words."""
    program = tmp_path / "broken.py"
    program.write_text("import nothing_of_this_name")
    for command in ((sys.executable, str(program)), ("no-such-program-anywhere",)):
        with pytest.raises(ConfigError, match="does not start") as caught:
            McpServer(McpSettings(command))
        assert "\n" not in str(caught.value)
        assert "nothing_of_this_name" in str(caught.value) or "no-such-program-anywhere" in str(caught.value)
    with pytest.raises(ConfigError, match=r"MCP server http://127.0.0.1:9/mcp does not start"):
        McpServer(McpSettings(url="http://127.0.0.1:9/mcp?token=secret"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "either a command or a url"),
        ({"command": ["x"], "url": "http://x"}, "either a command or a url"),
        ({"command": "python server.py"}, "a list of words"),
        ({"commnd": ["x"]}, "a table with command, url"),
        ("http://x", "a table with command, url"),
        ({"command": ["x"], "env": {"KEY": "$NOT_THERE"}}, "no environment variable NOT_THERE"),
    ],
)
def test_settings_that_are_none(given: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        McpServer(read_settings(given))


# ---------------------------------------------------------------- in an environment


def test_tools_of_servers_stand_beside_the_others(url: str) -> None:
    """In one question; and no two of one name."""
    server = {"url": url, "prefix": "odd_", "seconds": SECONDS}
    dataset: Any = load_env("tools", {"mcp": [server], "tools": ["calculator"]})

    async def episode() -> tuple[list[str], list[str]]:
        env = dataset.env("train", 0)
        shown = await env.initial_observation()
        calls: Any = [{"name": "odd_add", "arguments": {"a": 1, "b": 2}}, {"name": "odd_fail", "arguments": {"why": "x"}}]
        action: Message = {"role": "assistant", "content": "", "tool_calls": calls}
        result = await env.step(action)
        await env.close()
        await dataset.close()
        return [tool["function"]["name"] for tool in shown.tools], [message["content"] for message in result.next_messages]

    names, answers = asyncio.run(episode())
    assert names[:3] == ["calculator", "odd_add", "odd_keep"]
    assert answers == ["3", "error: Error executing tool fail"]
    assert servers() == set()
    with pytest.raises(ConfigError, match="two tools named odd_add"):
        load_env("tools", {"mcp": [server, server]})
