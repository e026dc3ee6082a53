"""``openenv:URL``: an environment served by OpenEnv (https://github.com/meta-pytorch/OpenEnv), over its WebSocket.

The wire is that of openenv-core 0.3 and openenv 0.10 (core/env_server/http_server.py): one connection at ``/ws`` is one session;
``{"type": "reset" | "step" | "mcp", "data": ...}`` goes in, ``{"type": "observation" | "mcp" | "error", "data": ...}`` comes out.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import json
import time
import urllib.parse
import urllib.request
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from veneer.envs.bridges.actions import Action, ActionError, actions_of, read_schema
from veneer.envs.bridges.chat import Json
from veneer.envs.bridges.errors import BridgeError
from veneer.types import ConfigError, Message, Observation, Split, StepResult

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection

FULL = "CAPACITY_REACHED"
MAX_MESSAGE = 32 * 2**20
"""Bytes of one answer."""
LOOPBACK = {"localhost", "127.0.0.1", "::1"}


def openenv(
    url: str,
    action_field: str = "message",
    action: Mapping[str, Any] | None = None,
    observation_field: str | None = None,
    prompt: str = "",
    reset: Mapping[str, Any] | None = None,
    max_turns: int = 16,
    seed: int = 0,
    wait_seconds: float = 5.0,
) -> OpenEnvDataset:
    """The environment that an OpenEnv server plays at ``url``.

    The assistant's text becomes ``action_field`` of the action, beside the fixed fields in ``action``; where the server's actions are
    tool calls, the model is shown its tools and its calls are the actions. Of an observation the model sees ``observation_field``, or
    all of it. ``prompt`` stands before the first one. ``reset`` are arguments of reset, beside a seed that is the problem. An episode
    ends with the server's ``done`` or after ``max_turns``. ``wait_seconds``: how long to wait for a session when all are taken.

    Raises:
        ConfigError: no server answers there, its actions have no such field, or websockets is not installed.
    """
    try:
        import websockets  # noqa: F401 - told now rather than in the first rollout
    except ModuleNotFoundError as error:
        raise ConfigError("env.name: openenv needs the package websockets; run: pip install 'veneer[envs]'") from error
    base = url.rstrip("/")
    parts = urllib.parse.urlsplit(base)
    if parts.scheme not in ("http", "https", "ws", "wss") or not parts.hostname:
        raise ConfigError(f"env.name: openenv:{url} must be openenv:http://HOST:PORT")
    web = base.replace("ws", "http", 1) if parts.scheme.startswith("ws") else base
    schema = read_schema(_get(f"{web}/schema", shown(parts)))
    if not schema.calls_tools and action_field not in schema.fields:
        near = difflib.get_close_matches(action_field, schema.fields, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(schema.fields) or 'none'}"
        raise ConfigError(f"env.args.action_field: an action of {shown(parts)} has no field {action_field!r}; {hint}")
    act = Action(schema, action_field, dict(action or {}))
    ws = web.replace("http", "ws", 1) + "/ws"
    rules = Rules(ws, shown(parts), act, observation_field, prompt, dict(reset or {}), max_turns, wait_seconds)
    return OpenEnvDataset(f"openenv:{shown(parts)}", rules, seed)


def shown(parts: urllib.parse.SplitResult) -> str:
    """A URL without what may be secret in it."""
    host = f"{parts.hostname}:{parts.port}" if parts.port else str(parts.hostname)
    return f"{parts.scheme}://{host}{parts.path}"


def _get(url: str, name: str) -> Any:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({})) if _is_local(url) else urllib.request.build_opener()
    try:
        with opener.open(url, timeout=10) as response:
            return json.loads(response.read(MAX_MESSAGE))
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ConfigError(f"env.name: no OpenEnv server answers at {name} ({reason}); start it first") from error


def _is_local(url: str) -> bool:
    return urllib.parse.urlsplit(url).hostname in LOOPBACK


@dataclass(frozen=True)
class Rules:
    """What the episodes of a server share."""

    socket: str
    name: str
    """Of the server, as it may be shown."""
    action: Action
    observation_field: str | None
    prompt: str
    reset: Json
    max_turns: int
    wait_seconds: float


@dataclass(frozen=True)
class OpenEnvDataset:
    """Problems are seeds: even ones to train on, odd ones held out. Whether a seed fixes the problem is up to the environment."""

    name: str
    rules: Rules
    seed: int

    def env(self, split: Split, index: int) -> OpenEnvEnv:
        return OpenEnvEnv(self.rules, seed_of(self.seed, split, index))


def seed_of(seed: int, split: Split, index: int) -> int:
    """Below 2**32, which all generators take."""
    return zlib.crc32(f"{seed}/{index}".encode()) & ~1 | (split == "eval")


@dataclass
class OpenEnvEnv:
    """One episode, one connection."""

    rules: Rules
    seed: int
    turns: int = field(default=0, init=False)
    invalid: int = field(default=0, init=False)
    paid: bool = field(default=False, init=False)
    """Some step had a reward."""
    _socket: ClientConnection | None = field(default=None, init=False)

    async def initial_observation(self) -> Observation:
        first = await self._open()
        tools = await self._tools() if self.rules.action.schema.calls_tools else []
        text = "\n\n".join(part for part in (self.rules.prompt, self._text(first)) if part)
        if not text:
            raise BridgeError("the first observation is empty; say in env.args.prompt what is to be done")
        return Observation([{"role": "user", "content": text}], tools)

    async def _open(self) -> Json:
        """The answer to reset, once the server has a session for it."""
        until = time.monotonic() + self.rules.wait_seconds
        while True:
            await self._connect()
            answer = await self._ask("reset", {**self.rules.reset, "seed": self.seed})
            if answer["type"] != "error" or answer["data"].get("code") != FULL:
                return self._observation(answer)
            await self.close()
            if time.monotonic() > until:
                most = answer["data"].get("max_sessions")
                raise BridgeError(
                    f"{self.rules.name} plays {most} sessions at once and all are taken; raise its max_concurrent_envs, "
                    "or lower rl.group_size and rl.groups_per_batch"
                )
            await asyncio.sleep(0.1)

    async def _connect(self) -> None:
        from websockets.asyncio.client import connect
        from websockets.exceptions import WebSocketException

        try:
            proxy = None if _is_local(self.rules.socket) else True
            self._socket = await connect(self.rules.socket, proxy=proxy, max_size=MAX_MESSAGE, close_timeout=1, ping_interval=None)
        except (OSError, WebSocketException) as error:
            raise BridgeError(f"{self.rules.name} cannot be reached ({error})") from error

    async def _ask(self, kind: str, data: Mapping[str, Any]) -> Json:
        from websockets.exceptions import ConnectionClosed

        assert self._socket is not None
        with contextlib.suppress(ConnectionClosed):  # a server that is full says so before it closes
            await self._socket.send(json.dumps({"type": kind, "data": data}))
        try:
            answer = json.loads(await self._socket.recv())
        except ConnectionClosed as error:
            raise BridgeError(f"{self.rules.name} closed the connection in the middle of an episode") from error
        except ValueError as error:
            raise BridgeError(f"{self.rules.name} answered something other than JSON") from error
        if not isinstance(answer, dict) or not isinstance(answer.get("data"), dict):
            raise BridgeError(f"{self.rules.name} answered {answer!r:.80}")
        return {"type": str(answer.get("type")), "data": answer["data"]}

    def _observation(self, answer: Json) -> Json:
        data = answer["data"]
        if answer["type"] == "error":
            raise BridgeError(f"{self.rules.name} failed: {data.get('code')}: {str(data.get('message')).splitlines()[0]:.200}")
        if answer["type"] != "observation" or not isinstance(data.get("observation"), dict):
            raise BridgeError(f"{self.rules.name} answered no observation but {answer['type']!r:.40}")
        return data

    async def _tools(self) -> list[Json]:
        answer = await self._ask("mcp", {"jsonrpc": "2.0", "method": "tools/list", "params": {}, "id": 1})
        found = answer["data"].get("result") or {}
        if answer["type"] != "mcp" or not isinstance(found.get("tools"), list):
            raise BridgeError(f"{self.rules.name} lists no tools: {json.dumps(answer['data'].get('error'))}")
        return [_tool(tool) for tool in found["tools"]]

    async def step(self, action: Message) -> StepResult:
        self.turns += 1
        over = self.turns >= self.rules.max_turns
        try:
            steps = actions_of(self.rules.action, action)
        except ActionError as error:
            self.invalid += 1
            return StepResult(0.0, over, () if over else _turns(self.rules.action, action, [f"error: {error}"]), self._metrics())
        reward, texts, done = 0.0, [], not steps
        for data in steps:
            result = await self._ask("step", data)
            if result["type"] == "error" and result["data"].get("code") == "VALIDATION_ERROR":
                self.invalid += 1
                texts.append(f"error: {_why(result['data'])}")
                continue
            told = self._observation(result)
            if told.get("reward") is not None:
                reward, self.paid = reward + told["reward"], True
            texts.append(self._text(told))
            done = bool(told.get("done"))
            if done:
                break
        if done and steps and not self.paid:
            raise BridgeError(f"{self.rules.name} ended an episode without any reward: it was null throughout, as NaN is on this wire")
        if done or over:
            return StepResult(reward, episode_done=True, metrics=self._metrics())
        return StepResult(reward, episode_done=False, next_messages=_turns(self.rules.action, action, texts), metrics=self._metrics())

    def _metrics(self) -> dict[str, float]:
        return {"turns": float(self.turns), "invalid_actions": float(self.invalid)}

    def _text(self, told: Json) -> str:
        """What the model sees of an observation."""
        seen = {name: value for name, value in told["observation"].items() if name != "metadata" and value not in (None, "", [], {})}
        if self.rules.action.schema.calls_tools and "tool_name" in seen:
            error = seen.get("error")
            return f"error: {error['message']}" if isinstance(error, dict) and "message" in error else _result_text(seen.get("result"))
        if self.rules.observation_field is not None:
            if self.rules.observation_field not in told["observation"]:
                fields = ", ".join(told["observation"])
                raise BridgeError(f"env.args.observation_field: an observation has no field {self.rules.observation_field!r}, but {fields}")
            return _plain(told["observation"][self.rules.observation_field])
        return _plain(next(iter(seen.values()))) if len(seen) == 1 else json.dumps(seen) if seen else ""

    async def close(self) -> None:
        from websockets.exceptions import WebSocketException

        socket, self._socket = self._socket, None
        if socket is not None:
            with contextlib.suppress(WebSocketException):
                await socket.send(json.dumps({"type": "close"}))
            await socket.close()


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _result_text(result: Any) -> str:
    """The text of a tool's result, which is MCP's: blocks of content, or data."""
    if isinstance(result, dict):
        blocks = result.get("content")
        if isinstance(blocks, list) and blocks and all(isinstance(b, dict) and isinstance(b.get("text"), str) for b in blocks):
            return "\n".join(block["text"] for block in blocks)
        if "data" in result:
            return _plain(result["data"])
    return _plain(result)


def _turns(action: Action, said: Message, texts: Sequence[str]) -> list[Message]:
    """What the environment said, as answers to calls where the model called something."""
    called = action.schema.calls_tools and (said.get("tool_calls") or said.get("invalid_tool_calls"))
    return [{"role": "tool" if called else "user", "content": text} for text in texts]


def _why(data: Json) -> str:
    """What is wrong with an action, in the server's words."""
    errors = data.get("errors")
    if isinstance(errors, list) and errors and isinstance(errors[0], dict):
        where = ".".join(map(str, errors[0].get("loc", ())))
        return f"{where + ': ' if where else ''}{errors[0].get('msg')}"
    return str(data.get("message"))


def _tool(tool: Any) -> Json:
    if not isinstance(tool, dict) or not isinstance(tool.get("name"), str):
        raise BridgeError(f"a tool without a name: {tool!r:.80}")
    schema = tool.get("input_schema") or tool.get("inputSchema") or {"type": "object", "properties": {}}
    return {"type": "function", "function": {"name": tool["name"], "description": tool.get("description") or "", "parameters": schema}}
