"""``code``: write a function; it is run against tests in a sandbox."""

from __future__ import annotations

from typing import Literal

from veneer.envs.code.grading import Judge, code_in
from veneer.envs.code.problems import CodeProblem, draw
from veneer.envs.tools.rows import Row, Rows
from veneer.envs.tools.sandbox import Limits, Sandbox
from veneer.types import ConfigError, DataError, Message, Observation, Split, StepResult, in_one_line

Reward = Literal["all", "share"]
LEAST_MB = 64


class CodeEnv:
    """Asks for a function once, and tests it."""

    def __init__(self, problem: CodeProblem, judge: Judge, reward: Reward) -> None:
        self.problem, self._judge, self._reward = problem, judge, reward

    async def initial_observation(self) -> Observation:
        return Observation([{"role": "user", "content": self.problem.prompt}])

    async def step(self, action: Message) -> StepResult:
        verdict = await self._judge.grade(code_in(action["content"]), self.problem.entry, self.problem.tests)
        reward = verdict.passed if self._reward == "share" else float(verdict.passed == 1.0)
        return StepResult(reward, episode_done=True, metrics={**verdict.metrics(), "correct": float(verdict.passed == 1.0)})

    def gold(self) -> Message:
        """Raises:
        DataError: the row has no solution.
        """
        if self.problem.solution is None:
            raise DataError("this problem has no solution; give its row one")
        return {"role": "assistant", "content": f"```python\n{self.problem.solution.rstrip()}\n```"}


class Code:
    """Rows of a file, or problems made up by rule."""

    name = "code"

    def __init__(self, rows: Rows | None, judge: Judge, reward: Reward, seed: int) -> None:
        self._rows, self._judge, self._seed = rows, judge, seed
        self._reward: Reward = reward

    def env(self, split: Split, index: int) -> CodeEnv:
        problem = draw(split, index, self._seed) if self._rows is None else _problem(self._rows.row(split, index))
        return CodeEnv(problem, self._judge, self._reward)


def code(
    data: str = "", reward: Reward = "all", seconds: float = 5.0, memory_mb: int = 512, unsafe_no_sandbox: bool = False, seed: int = 0
) -> Code:
    """Functions to write, and tests that they have to pass.

    ``data``: a file with a JSON object a line: ``prompt``, ``entry_point`` (the function's name), ``tests`` (a list of assert statements,
    or a text with test cases, ``test...`` functions or ``check(candidate)``) and, if there is one, ``solution``; without it, problems made
    up by rule. ``reward``: "all" tests or nothing, or the "share" of them that pass. ``seconds`` and ``memory_mb``: for the function, all
    tests together; a verdict comes up to two seconds later, below ``env.seconds``. ``unsafe_no_sandbox``: it runs without walls.

    Raises:
        ConfigError: there is no sandbox.
        DataError: the file.
    """
    if reward not in ("all", "share"):
        raise ConfigError(f'env.args: reward is {reward!r}; it is "all" or "share"')
    if seconds <= 0 or memory_mb < LEAST_MB:
        raise ConfigError(f"env.args: seconds is {seconds} and memory_mb is {memory_mb}; Python alone takes time and {LEAST_MB} MB")
    rows = Rows(data, {"entry_point": str, "tests": (list, str)}, seed, _check) if data else None
    limits = Limits(cpu=max(1, int(seconds)), wall=seconds, memory=memory_mb * 2**20)
    return Code(rows, Judge(Sandbox(limits, unsafe_no_sandbox)), reward, seed)


def _check(row: Row) -> None:
    """Raises:
    DataError: its tests are no Python, or none.
    """
    tests = [row["tests"]] if isinstance(row["tests"], str) else row["tests"]
    if not row["entry_point"].isidentifier():
        raise DataError(f"entry_point {row['entry_point']!r:.40} is no name of a function")
    if not tests or not all(isinstance(test, str) and test.strip() for test in tests):
        raise DataError("tests are a text, or a list of texts, and not empty")
    for test in tests:
        try:
            compile(test, "tests", "exec")
        except (SyntaxError, ValueError) as error:
            raise DataError(f"the test {test.strip().splitlines()[0]!r:.60} is no Python ({in_one_line(error)})") from error


def _problem(row: Row) -> CodeProblem:
    tests = row["tests"] if isinstance(row["tests"], str) else tuple(row["tests"])
    return CodeProblem(row["prompt"], row["entry_point"], tests, row.get("solution"))
