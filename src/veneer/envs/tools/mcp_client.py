"""Tools of MCP servers (https://modelcontextprotocol.io), over stdio and streamable HTTP, by the official client.

A session belongs to one episode: its server may keep state, and one that dies or hangs takes no other episode with it. A server that keeps
no state and starts slowly is told so (``reuse``): its session then goes on to the next episode.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import tempfile
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import IO, TYPE_CHECKING, Any, TypeVar

import jsonschema

from veneer.envs.tools.tool import Tool, ToolError
from veneer.types import ConfigError, RunError, in_one_line

if TYPE_CHECKING:
    from mcp import Client
    from mcp.types import CallToolResult, ContentBlock
    from mcp.types import Tool as ListedTool

T = TypeVar("T")

LONGEST = 2**14
"""Characters of an answer; what is longer is cut."""
START_SECONDS = 30.0
"""For a server to start and name its tools, before anything else begins."""
CLOSE_SECONDS = 10.0
"""The official client gives a server two seconds to leave, two more after SIGTERM, and then kills it."""
STREAM_SECONDS = 300.0
"""Without a byte, for the stream on which a server may speak by itself; calls have a limit of their own."""


class McpFailure(RunError):
    """A server died, hung, or does not speak the protocol. It costs the rollout that met it."""


@dataclass(frozen=True)
class McpSettings:
    """One server, as in ``env.args``: ``mcp = [{command = ["npx", "some-server"]}, {url = "https://host/mcp", prefix = "web_"}]``."""

    command: Sequence[str] = ()
    """What starts it, for stdio."""
    url: str = ""
    """Where it is, for streamable HTTP."""
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    """Variables that it gets beside PATH, HOME, USER, LOGNAME, SHELL and TERM. ``"$NAME"`` stands for ours of that name: a secret does not
    belong in a file."""
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    """Of HTTP; ``"$NAME"`` as in ``env``."""
    prefix: str = ""
    """Put before the names of its tools."""
    seconds: float = 8.0
    """For a call, and for a session to open. Keep it below ``env.seconds``."""
    reuse: bool = False
    """It keeps no state: its session goes on from one episode to the next."""

    def __post_init__(self) -> None:
        if bool(self.command) == bool(self.url):
            raise ConfigError("env.args: mcp: a server has either a command or a url")
        if isinstance(self.command, str):
            raise ConfigError('env.args: mcp: command is a list of words: ["python", "server.py"]')

    @property
    def label(self) -> str:
        """How it is named in errors, without what may be secret in arguments."""
        return self.url.partition("?")[0] if self.url else os.path.basename(self.command[0])


def read_settings(given: Mapping[str, Any]) -> McpSettings:
    """Raises:
    ConfigError: a key is unknown, or a value is none.
    """
    known = list(McpSettings.__dataclass_fields__)
    if not isinstance(given, Mapping) or not set(given) <= set(known):
        raise ConfigError(f"env.args: mcp: a server is a table with {', '.join(known)}; got {given!r:.80}")
    return McpSettings(**given)


class McpServer:
    """The tools of a server, and sessions with it."""

    def __init__(self, settings: McpSettings) -> None:
        """Start it once and ask what it can do.

        Raises:
            ConfigError: it does not start, or one of its tools has no valid schema.
        """
        _need_the_client()
        self.settings = settings
        self._env, self._headers = (_resolved(getattr(settings, key), key) for key in ("env", "headers"))
        self._idle: list[_Connection] = []
        self._open: set[_Connection] = set()
        self.listed = [usable(settings, tool) for tool in _in_a_loop_of_its_own(self._list)]

    async def _list(self) -> list[ListedTool]:
        connection = self._connect()
        try:
            client = await asyncio.wait_for(connection.client(), START_SECONDS)
            tools, cursor = [], None
            while True:
                page = await asyncio.wait_for(client.list_tools(cursor=cursor), START_SECONDS)
                tools += page.tools
                if (cursor := page.next_cursor) is None:
                    return tools
        except Exception as error:  # the client, its transports and the operating system each raise their own
            raise ConfigError(f"MCP server {self.settings.label} does not start ({_reason(error)}{connection.last_words()})") from error
        finally:
            await connection.close()
            self._open.discard(connection)

    def _connect(self) -> _Connection:
        connection = _Connection(self.settings, self._env, self._headers)
        self._open.add(connection)
        return connection

    def take(self) -> _Connection:
        """A connection for one episode."""
        while self._idle:
            connection = self._idle.pop()
            if connection.usable():
                return connection
            self._open.discard(connection)
        return self._connect()

    async def give_back(self, connection: _Connection) -> None:
        if self.settings.reuse and connection.usable():
            self._idle.append(connection)
        else:
            self._open.discard(connection)
            await connection.close()

    def session(self) -> McpSession:
        return McpSession(self)

    async def close(self) -> None:
        """End what is still open."""
        connections = [each for each in self._open if each.loop is asyncio.get_running_loop()]
        self._open.clear()
        self._idle.clear()
        await asyncio.gather(*(connection.close() for connection in connections))


class McpSession:
    """A server's tools for one episode. It connects when one is called first."""

    def __init__(self, server: McpServer) -> None:
        self.server = server
        self._connection: _Connection | None = None

    def tools(self) -> list[Tool]:
        prefix = self.server.settings.prefix
        return [
            Tool(f"{prefix}{listed.name}", listed.description or "", _parameters(listed), partial(self._call, listed.name))
            for listed in self.server.listed
        ]

    async def _call(self, tool: str, /, **arguments: Any) -> str:
        """Raises:
        ToolError: the server says that the call failed.
        McpFailure: it says nothing, or nothing that is of the protocol.
        """
        from mcp import MCPError
        from mcp.types import INVALID_PARAMS

        settings = self.server.settings
        if self._connection is None:
            self._connection = self.server.take()
        connection = self._connection
        try:
            client = await asyncio.wait_for(connection.client(), settings.seconds)
            result = await asyncio.wait_for(client.call_tool(tool, arguments), settings.seconds)
        except MCPError as error:
            if error.code == INVALID_PARAMS:
                raise ToolError(in_one_line(error)) from error
            raise connection.failure(tool, error) from error
        except Exception as error:  # the client, its transports and the operating system each raise their own
            raise connection.failure(tool, error) from error
        text = _text(result)
        if result.is_error:
            raise ToolError(text)
        return text

    async def close(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            await self.server.give_back(connection)


class _Connection:
    """A session, owned by a task of its own: the client must be left by the task that entered it."""

    def __init__(self, settings: McpSettings, env: Mapping[str, str], headers: Mapping[str, str]) -> None:
        from anyio import CancelScope

        self.settings, self.env, self.headers = settings, env, headers
        self.loop, self.broken = asyncio.get_running_loop(), False
        self._scope = CancelScope()
        self._entered: asyncio.Future[Client] = self.loop.create_future()
        self._entered.add_done_callback(lambda future: future.cancelled() or future.exception())  # somebody may have stopped waiting
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed by the task below
        self._words = ""
        self._owner = asyncio.create_task(self._own())

    async def _own(self) -> None:
        """Cancelled by its scope alone: a task that is cancelled from outside may leave the server running."""
        from anyio import sleep_forever

        try:
            with self._scope:
                async with self._client() as client:
                    self._entered.set_result(client)
                    await sleep_forever()
        except Exception as error:
            if not self._entered.done():
                self._entered.set_exception(error)
        finally:
            self.broken = True
            if not self._entered.done():
                self._entered.set_exception(ConnectionError("it was left before it was there"))
            self._words = self.last_words()
            self._stderr.close()

    @contextlib.asynccontextmanager
    async def _client(self) -> AsyncGenerator[Client]:
        import httpx2
        from mcp import Client, StdioServerParameters, stdio_client
        from mcp.client.streamable_http import streamable_http_client

        async with contextlib.AsyncExitStack() as stack:
            if self.settings.url:
                timeout = httpx2.Timeout(self.settings.seconds, read=STREAM_SECONDS)
                web = await stack.enter_async_context(httpx2.AsyncClient(headers=dict(self.headers), timeout=timeout))
                transport = streamable_http_client(self.settings.url, http_client=web)
            else:
                program, *arguments = self.settings.command
                parameters = StdioServerParameters(command=program, args=arguments, env=dict(self.env))
                transport = stdio_client(parameters, errlog=self._stderr)  # type: ignore[arg-type]  # only its file descriptor is used
            yield await stack.enter_async_context(Client(transport, cache=None))

    async def client(self) -> Client:
        """Once it is there. Raises whatever kept it from being there."""
        return await asyncio.shield(self._entered)

    def usable(self) -> bool:
        return not self.broken and self.loop is asyncio.get_running_loop()

    def failure(self, tool: str, error: BaseException) -> McpFailure:
        """The connection is of no use any more."""
        self.broken = True
        return McpFailure(f"MCP server {self.settings.label} did not answer {tool} ({_reason(error)}{self.last_words()})")

    def last_words(self) -> str:
        """The last line of a server's stderr. Read where it lies: the server writes at the file's one position."""
        if self._stderr.closed:
            return self._words
        fd = self._stderr.fileno()
        lines = os.pread(fd, 2**12, max(0, os.fstat(fd).st_size - 2**12)).decode(errors="replace").strip().splitlines()
        return f"; it said: {lines[-1].strip()[:200]}" if lines else ""

    async def close(self) -> None:
        """Leave the server, which has to end with that."""
        self.broken = True
        self._scope.cancel()
        await asyncio.wait({self._owner}, timeout=CLOSE_SECONDS)


# ---------------------------------------------------------------- what servers say


def usable(settings: McpSettings, tool: ListedTool) -> ListedTool:
    """Raises:
    ConfigError: its arguments have no valid schema, or one that has to be fetched.
    """
    schema, wrong = tool.input_schema, ""
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
        for reference in _references(schema):
            if not reference.startswith("#"):
                wrong = f"it refers to {reference}"
            elif reference.startswith("#/") and not _leads_somewhere(schema, reference):
                wrong = f"{reference} leads nowhere"
    except jsonschema.SchemaError as error:
        wrong = error.message
    if not wrong and schema.get("type") != "object":
        wrong = "its type is not object"
    if wrong:
        raise ConfigError(f"MCP server {settings.label}: tool {tool.name}: no usable JSON schema ({wrong:.200})")
    return tool


def _references(schema: Any) -> list[str]:
    if isinstance(schema, Mapping):
        own = [schema["$ref"]] if isinstance(schema.get("$ref"), str) else []
        return own + [found for value in schema.values() for found in _references(value)]
    return [found for value in schema for found in _references(value)] if isinstance(schema, list) else []


def _leads_somewhere(schema: Any, pointer: str) -> bool:
    """https://www.rfc-editor.org/rfc/rfc6901, through mappings."""
    for part in pointer.removeprefix("#/").split("/"):
        name = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(schema, Mapping) or name not in schema:
            return False
        schema = schema[name]
    return True


def _parameters(tool: ListedTool) -> dict[str, Any]:
    """Arguments may be named elsewhere than in ``properties``; then others than those are let through to the server."""
    schema = tool.input_schema
    elsewhere = {"allOf", "anyOf", "oneOf", "$ref", "patternProperties", "if"} & set(schema)
    return {"additionalProperties": True, **schema} if elsewhere else dict(schema)


def _text(result: CallToolResult) -> str:
    """For a model that reads text alone; other contents are told by a word."""
    parts = [_words(block) for block in result.content]
    if not parts and result.structured_content is not None:
        parts = [json.dumps(result.structured_content)]
    text = "\n".join(parts)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}\n[cut at {LONGEST} characters]"


def _words(block: ContentBlock) -> str:
    if block.type == "text":
        return block.text
    if block.type == "resource":
        return getattr(block.resource, "text", f"[file {block.resource.uri}]")
    return f"[link {block.uri}]" if block.type == "resource_link" else f"[{block.type}]"


def _need_the_client() -> None:
    try:
        import mcp  # noqa: F401
    except ImportError as error:
        raise ConfigError("MCP servers need the package mcp; pip install 'veneer[envs]'") from error


def _reason(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return in_one_line(error)


def _resolved(values: Mapping[str, str], key: str) -> dict[str, str]:
    missing = [v for v in values.values() if v.startswith("$") and v[1:] not in os.environ]
    if missing:
        raise ConfigError(f"env.args: mcp: {key}: there is no environment variable {missing[0][1:]}")
    return {name: os.environ[value[1:]] if value.startswith("$") else value for name, value in values.items()}


def _in_a_loop_of_its_own(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """On a thread, because the caller may stand in a loop."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: asyncio.run(work())).result()
