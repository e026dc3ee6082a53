"""``calculator``: products that the model cannot do in its head, and a tool that can."""

from __future__ import annotations

import math
import random
import re
from typing import Any

from veneer.envs.dataset import Problem, ProblemDataset, final_answer
from veneer.types import Message, Observation, StepResult

CALCULATOR: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluate an arithmetic expression.",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    },
}
MAX_CALLS = 2


def calculate(expression: object) -> str:
    """Sums and products of whole numbers; anything else is answered with a word, never evaluated."""
    if not isinstance(expression, str) or not re.fullmatch(r"\d{1,6}([+*]\d{1,6}){0,7}", expression):
        return "error"
    products = [math.prod(int(factor) for factor in product.split("*")) for product in expression.split("+")]
    return str(sum(products))


def generate(rng: random.Random) -> Problem:
    a, b = rng.randint(12, 99), rng.randint(12, 99)
    return Problem(f"{a}*{b}=?", str(a * b))


class CalculatorEnv:
    """A question, then up to two tool calls, then an answer."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.calls = problem, 0

    async def initial_observation(self) -> Observation:
        return Observation([{"role": "user", "content": self.problem.prompt}], [CALCULATOR])

    async def step(self, action: Message) -> StepResult:
        calls = action.get("tool_calls", [])
        if calls and self.calls < MAX_CALLS:
            self.calls += 1
            results: list[Message] = [{"role": "tool", "content": calculate(c["arguments"].get("expression"))} for c in calls]
            return StepResult(0.0, episode_done=False, next_messages=results, metrics={"called": 1.0})
        correct = float(final_answer(action) == self.problem.answer)
        return StepResult(correct, episode_done=True, metrics={"correct": correct, "called": float(self.calls > 0)})

    def gold(self) -> Message:
        return {"role": "assistant", "content": self.problem.answer}


def calculator(seed: int = 0) -> ProblemDataset:
    """Products of two two-digit numbers, with a calculator at hand."""
    return ProblemDataset("calculator", generate, CalculatorEnv, seed)
