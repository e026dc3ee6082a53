"""The calculator environment with a tool that takes its time, as servers, sandboxes and browsers do."""

from __future__ import annotations

import asyncio
import random
from functools import partial

from veneer.envs.calculator import CalculatorEnv, generate
from veneer.envs.dataset import Problem, ProblemDataset
from veneer.types import Message, StepResult

LONGEST = 2.0
"""Seconds that a call takes at most."""


class WaitingCalculatorEnv(CalculatorEnv):
    """Each call waits exponentially distributed seconds. An answer without a call waits for nothing."""

    def __init__(self, problem: Problem, seconds: float) -> None:
        super().__init__(problem)
        self.seconds = seconds

    async def step(self, action: Message) -> StepResult:
        if action.get("tool_calls"):
            await asyncio.sleep(min(LONGEST, random.expovariate(1 / self.seconds)))
        return await super().step(action)


def waiting(seconds: float = 0.3) -> ProblemDataset:
    """Products of two two-digit numbers, with a calculator that takes ``seconds`` on average."""
    return ProblemDataset("waiting", generate, partial(WaitingCalculatorEnv, seconds=seconds))
