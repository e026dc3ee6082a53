"""What a piece of code is worth: two programs in two sandboxes, one with the code and one with the tests.

The tests and what they expect never come to where the code runs, and the code never runs where the verdict is made. So there is nothing to
read, to patch or to print that would make a wrong function right.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from veneer.envs.tools.sandbox import Outcome, Sandbox, SandboxError

_FENCE = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)
MARGIN = 2
"""Seconds that the tests have beyond the code's own time, to see that it is gone."""
VERDICT = 2**20
"""Bytes that it may take."""


def code_in(text: str) -> str:
    """The last fenced block, or all of it."""
    blocks = _FENCE.findall(text)
    return blocks[-1] if blocks else text


@dataclass(frozen=True)
class Verdict:
    """What became of each test."""

    results: Sequence[str]
    """``passed``, ``wrong``, ``raised KIND``, or ``gone``: the code's process had ended."""
    loaded: str
    """Why there was no function to test: an exception's name, ``NoFunction``, or ``gone``. Empty: there was one."""
    outcome: Outcome
    """Of the code's own process."""
    judged: bool = True
    """False: the tests were ended for a limit, which what the function returned may have made them reach."""

    @property
    def passed(self) -> float:
        """The share of tests passed."""
        return self.results.count("passed") / len(self.results) if self.results else 0.0

    def metrics(self) -> dict[str, float]:
        """Shares of the tests by result; and 1 or 0 for what kept the code from being tested, and for limits."""
        count = max(1, len(self.results))
        shares = {"passed": self.passed, "wrong": self.results.count("wrong") / count, "gone": self.results.count("gone") / count}
        shares["raised"] = sum(result.startswith("raised") for result in self.results) / count
        flags = {
            "syntax_error": self.loaded in ("SyntaxError", "IndentationError", "TabError"),
            "no_function": self.loaded == "NoFunction",
            "not_loaded": self.loaded != "",
            "unjudged": not self.judged,
            "timeout": self.outcome.limit in ("cpu", "wall"),
            "over_limit": self.outcome.limit is not None,
        }
        return shares | {name: float(flag) for name, flag in flags.items()}


class Judge:
    """Grades, any number at once."""

    def __init__(self, sandbox: Sandbox) -> None:
        wall = sandbox.limits.wall + MARGIN
        limits = replace(sandbox.limits, wall=wall, cpu=int(wall), output=VERDICT)
        self._for_code, self._for_tests = sandbox, Sandbox(limits, sandbox.unsafe_no_sandbox)
        # Each sandbox has its own threads, and both begin in the order asked: whoever waits for the other has it or will get it.

    async def grade(self, code: str, entry: str, tests: str | Sequence[str]) -> Verdict:
        """Raises:
        SandboxError: the tests themselves did not come to a verdict, without having been ended for a limit.
        """
        asked, ask = os.pipe()
        told, tell = os.pipe()
        order = {"asked": asked, "told": tell, "entry": entry}
        code_runs = self._for_code.run({**_FILES["candidate"], "solution.py": code}, json.dumps(order), (asked, tell))
        order = {"ask": ask, "told": told, "entry": entry, "tests": tests if isinstance(tests, str) else list(tests)}
        tests_run = self._for_tests.run(_FILES["check"], json.dumps(order), (ask, told))
        outcome, checked = await asyncio.gather(code_runs, tests_run)
        if checked.limit is not None:
            return Verdict([], "", outcome, judged=False)
        try:
            said: Mapping[str, Any] = json.loads(checked.stdout)
        except ValueError as error:
            raise SandboxError(f"the tests did not end ({checked.complaint or checked.status})") from error
        return Verdict(said["results"], said["loaded"], outcome)


def _program(name: str) -> dict[str, str]:
    here = Path(__file__).parent
    return {"main.py": (here / f"{name}.py").read_text(), "carry.py": (here / "carry.py").read_text()}


_FILES = {name: _program(name) for name in ("candidate", "check")}
