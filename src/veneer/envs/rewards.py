"""Rewards as a table: one row for each part of what an answer is worth, with its weight.

[[env.args.rewards]]
function = "rewards.py:correct"     # or math = true, or judge = { ... }
weight = 0.8
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from veneer.envs.judge import Judge, JudgeSpec
from veneer.envs.math_reward import MathReward
from veneer.envs.reward_functions import RewardFunction, Score
from veneer.envs.rows import Row
from veneer.envs.spec import Spec, read_specs
from veneer.envs.user_file import from_file
from veneer.types import ConfigError, DataError, Message, StepResult, Trajectory, Ungraded

Verdict = tuple[float, Mapping[str, float]]


class RewardSpec(Spec):
    name: str = ""
    """Of its metric, reward/NAME; the function's own, "math" or "judge" unless given."""
    weight: float = 1.0
    """The reward is the sum of weight times score."""
    function: str = ""
    """FILE.py:FUNCTION."""
    style: Literal["trl", "verl"] = "trl"
    """The function's signature."""
    range: tuple[float, float] | None = None
    """What a function may return; anything else fails the rollout."""
    math: bool = False
    """Grade the final answer against the answer column, by math-verify."""
    judge: JudgeSpec | None = None
    """Ask a model."""


class AnswerReward(Protocol):
    """What one answer is worth by itself, as soon as it is there."""

    async def score(self, row: Row, action: Message) -> Verdict: ...

    async def close(self) -> None: ...


@dataclass(frozen=True)
class Rewards:
    """All that an answer is worth. Judges and math look at each answer alone; functions are called once for a group."""

    answers: Sequence[tuple[str, float, AnswerReward]]
    functions: Sequence[tuple[str, float, RewardFunction]]
    """(name, weight, reward)"""

    async def of_answer(self, row: Row, action: Message) -> StepResult:
        total, metrics = 0.0, dict[str, float]()
        for name, weight, reward in self.answers:
            score, more = await reward.score(row, action)
            total += weight * score
            metrics |= {f"reward/{name}": score, **more}
        return StepResult(total, episode_done=True, metrics=metrics)

    async def of_group(self, row: Row, trajectories_G: Sequence[Trajectory]) -> list[Verdict | Ungraded]:
        """``unrewarded``: no function applied to the answer, and nothing else graded it."""
        scores_F: list[list[Score]] = []
        metrics_G: list[dict[str, float]] = [{} for _ in trajectories_G]
        for name, _, function in self.functions if trajectories_G else ():
            scores, logged = await function(row, trajectories_G)
            scores_F.append(scores)
            for metrics, score, more in zip(metrics_G, scores, logged, strict=True):
                metrics |= more | ({f"reward/{name}": score} if isinstance(score, float) else {})
        verdicts: list[Verdict | Ungraded] = []
        for member, metrics in enumerate(metrics_G):
            scores = [scores_G[member] for scores_G in scores_F]
            failed = next((s for s in scores if isinstance(s, Ungraded)), None)
            total = sum(weight * s for s, (_, weight, _) in zip(scores, self.functions, strict=False) if isinstance(s, float))
            if scores and not self.answers and all(s is None for s in scores):
                metrics["unrewarded"] = 1.0
            verdicts.append(failed or (total, metrics))
        return verdicts

    async def close(self) -> None:
        for _, _, reward in self.answers:
            await reward.close()


def read_rewards(table: Any, key: str = "env.args.rewards") -> Rewards:
    """Raises:
    ConfigError: names the row of the table and what is wrong with it.
    """
    specs = read_specs(RewardSpec, table, key)
    if not specs:
        raise ConfigError(f'{key}: say what an answer is worth, such as [[{key}]] function = "rewards.py:correct"')
    answers: list[tuple[str, float, AnswerReward]] = []
    functions: list[tuple[str, float, RewardFunction]] = []
    names = set[str]()
    for number, spec in enumerate(specs):
        where = f"{key}[{number}]"
        if sum((bool(spec.function), spec.math, spec.judge is not None)) != 1:
            raise ConfigError(f"{where}: give one of function, math = true and judge")
        if not spec.function and spec.model_fields_set & {"range", "style"}:
            raise ConfigError(f"{where}: range and style are of a function")
        name = spec.name or (spec.function.rpartition(":")[2] if spec.function else "math" if spec.math else "judge")
        if name in names:
            raise ConfigError(f"{where}: there are two rewards {name!r}; give one of them another name")
        names.add(name)
        if spec.function:
            function = from_file(spec.function, f"{where}.function")
            functions.append((name, spec.weight, RewardFunction(spec.function, function, spec.style, _check_in(spec.range))))
        else:
            answers.append((name, spec.weight, Judge(name, spec.judge, where) if spec.judge else MathReward()))
    return Rewards(answers, functions)


def _check_in(limits: tuple[float, float] | None) -> Any:
    low, high = limits or (-math.inf, math.inf)

    def check(value: Any, who: str) -> float:
        if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
            raise DataError(f"{who} gave {value!r:.80}, not a number")
        number = float(value)
        if not (math.isfinite(number) and low <= number <= high):
            bounds = f" between {low:g} and {high:g}" if limits else ""
            raise DataError(f"{who} gave {number:g}; a reward is a finite number{bounds}")
        return number

    return check
