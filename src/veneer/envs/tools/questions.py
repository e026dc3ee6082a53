"""``tools``: questions with tools at hand, graded by the final answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from veneer.envs.calculator import generate
from veneer.envs.dataset import Problem, draw, final_answer
from veneer.envs.tools.calculator import CALCULATOR
from veneer.envs.tools.episode import ToolEnv
from veneer.envs.tools.mcp_client import McpServer, McpSession, read_settings
from veneer.envs.tools.python import Python
from veneer.envs.tools.rows import Rows
from veneer.envs.tools.sandbox import Limits, Sandbox
from veneer.envs.tools.tool import Tool
from veneer.types import ConfigError, Message, Split

KNOWN = ("calculator", "python")


class QuestionTask:
    """One question. It is worth 1 if what is said in the end is the answer, whatever was called on the way."""

    def __init__(self, problem: Problem, names: Sequence[str], sandbox: Sandbox | None, servers: Sequence[McpServer]) -> None:
        self.problem = problem
        self.messages: list[Message] = [{"role": "user", "content": problem.prompt}]
        self._python = Python(sandbox) if sandbox is not None else None
        self._sessions: list[McpSession] = [server.session() for server in servers]
        own = {"calculator": CALCULATOR, **({} if self._python is None else {"python": self._python.tool()})}
        self.tools: list[Tool] = [own[name] for name in names] + [tool for session in self._sessions for tool in session.tools()]

    def over(self) -> bool:
        if self._python is not None:
            self._python.next_turn()
        return False

    async def score(self, answer: Message | None) -> Mapping[str, float]:
        correct = float(answer is not None and final_answer(answer) == self.problem.answer)
        python = {} if self._python is None else self._python.metrics()
        return {"reward": correct, "correct": correct, "answered": float(answer is not None), **python}

    def gold(self) -> Message:
        return {"role": "assistant", "content": self.problem.answer}

    async def close(self) -> None:
        for session in self._sessions:
            await session.close()


class Questions:
    """Rows of a file, or products of two numbers."""

    name = "tools"

    def __init__(
        self, rows: Rows | None, names: Sequence[str], sandbox: Sandbox | None, servers: Sequence[McpServer], max_turns: int, seed: int
    ) -> None:
        self._rows, self._names, self._sandbox, self._servers = rows, names, sandbox, servers
        self._max_turns, self._seed = max_turns, seed

    def env(self, split: Split, index: int) -> ToolEnv:
        task = QuestionTask(self._problem(split, index), self._names, self._sandbox, self._servers)
        return ToolEnv(task, self._max_turns)

    def _problem(self, split: Split, index: int) -> Problem:
        if self._rows is None:
            return draw(generate, split, index, f"{self.name}/{self._seed}")
        row = self._rows.row(split, index)
        return Problem(row["prompt"], str(row["answer"]).strip())

    async def close(self) -> None:
        for server in self._servers:
            await server.close()


def tools(
    tools: Sequence[str] = ("calculator",),
    mcp: Sequence[Mapping[str, Any]] = (),
    data: str = "",
    max_turns: int = 4,
    python_seconds: float = 4.0,
    unsafe_no_sandbox: bool = False,
    seed: int = 0,
) -> Questions:
    """Questions that ``tools`` ("calculator", "python") and MCP servers help with.

    ``mcp``: servers, each a table with ``command`` or ``url`` (``McpSettings``). ``data``: a file with a JSON object a line, ``prompt`` and
    ``answer``; without it, products of two two-digit numbers. ``max_turns``: of the assistant, the answer among them.
    ``python_seconds``: for a program; twice as much has to fit into ``env.seconds``. ``unsafe_no_sandbox``: programs run without walls.

    Raises:
        ConfigError: no such tool, a server does not start, or there is no sandbox for ``python``.
        DataError: the file.
    """
    if unknown := [name for name in tools if name not in KNOWN]:
        raise ConfigError(f"env.args: tools: there is no {unknown[0]!r}; there are {', '.join(KNOWN)}, and those of mcp servers")
    rows = Rows(data, {"answer": (str, int, float)}, seed) if data else None
    sandbox = Sandbox(Limits(wall=python_seconds), unsafe_no_sandbox) if "python" in tools else None
    servers = [McpServer(read_settings(each)) for each in mcp]
    names = [*tools, *(f"{server.settings.prefix}{listed.name}" for server in servers for listed in server.listed)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"env.args: there are two tools named {twice[0]}; give a server a prefix")
    if python_seconds <= 0:
        raise ConfigError(f"env.args: python_seconds is {python_seconds}; a program takes some time")
    if max_turns < 1:
        raise ConfigError(f"env.args: max_turns is {max_turns}; the answer alone takes one")
    if not names:
        raise ConfigError("env.args: there are no tools; name some, or MCP servers that have some")
    return Questions(rows, tuple(tools), sandbox, servers, max_turns, seed)
