"""The tool ``python``: a program in the sandbox, and what it prints."""

from __future__ import annotations

from veneer.envs.tools.sandbox import Outcome, Sandbox
from veneer.envs.tools.tool import Tool, ToolError

CODE = {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]}
STOPPED = {
    "cpu": "it computed for too long",
    "wall": "it took too long",
    "memory": "it took too much memory",
    "output": "it wrote too much",
    "processes": "it started too many processes",
    "files": "it made too many files",
}


class Python:
    """The tool of one episode; it counts what became of the programs. Each begins anew: no state is kept between calls."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self.runs = self.failed = self.stopped = 0
        self._used = 0.0
        """Seconds in this turn."""

    def tool(self) -> Tool:
        return Tool("python", "Run a Python program and see what it prints.", CODE, self._run)

    def next_turn(self) -> None:
        """Programs have time again: those of one turn share the time of one, or a turn with many calls would fail its rollout."""
        self._used = 0.0

    async def _run(self, code: str) -> str:
        if self._used >= self.sandbox.limits.wall:
            raise ToolError("no time is left in this turn; call again in the next")
        outcome = await self.sandbox.run({"main.py": code})
        self._used += outcome.seconds
        self.runs += 1
        self.failed += outcome.status != 0
        self.stopped += outcome.limit is not None
        return shown(outcome)

    def metrics(self) -> dict[str, float]:
        """``python_stopped``: runs that were ended for a limit."""
        return {"python_runs": float(self.runs), "python_failed": float(self.failed), "python_stopped": float(self.stopped)}


def shown(outcome: Outcome) -> str:
    """What it printed and, if it failed, the last line of its error or why it was stopped."""
    lines = [outcome.stdout.rstrip("\n")] if outcome.stdout.strip() else []
    if outcome.limit is not None:
        lines.append(f"stopped: {STOPPED[outcome.limit]}")
    elif outcome.status < 0:
        lines.append(f"killed by signal {-outcome.status}")
    elif outcome.status > 0:
        lines.append(outcome.complaint or f"exit status {outcome.status}")
    return "\n".join(lines) or "(it printed nothing)"
