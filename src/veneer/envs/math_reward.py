"""The final answer against the answer column, by math-verify in a process apart."""

from __future__ import annotations

from collections.abc import Mapping

from veneer.envs.apart import Apart, Ended, Refused
from veneer.envs.dataset import final_answer
from veneer.envs.optional import need
from veneer.envs.rows import Row
from veneer.types import Message

GRADE = 5
"""CPU seconds that one answer may take. What needs longer is no answer."""


class MathReward:
    """1 for the same number, formula or set, however it is written; else 0. ``parsed``: there was something to compare; ``ungraded``:
    it could not be compared in time, and is wrong."""

    def __init__(self) -> None:
        need("math_verify")
        self._grader = Apart("veneer.envs.math_grading")

    async def score(self, row: Row, action: Message) -> tuple[float, Mapping[str, float]]:
        try:
            metrics = await self._grader.ask(GRADE, said=final_answer(action), reference=str(row.answer))
        except (Ended, Refused):
            metrics = {"correct": 0.0, "ungraded": 1.0}
        return metrics["correct"], metrics

    async def close(self) -> None:
        self._grader.close()
