"""``jsonl`` and ``math``: questions from a file, answered once, and rewarded by a table of rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.envs.framing import Framing
from veneer.envs.judge import NAMED
from veneer.envs.rewards import Rewards, Verdict, read_rewards
from veneer.envs.rows import Row, read_rows, split_rows
from veneer.types import ConfigError, Env, Message, Observation, Split, StepResult, Trajectory, Ungraded


def jsonl(
    data: str,
    rewards: Sequence[Mapping[str, Any]] = (),
    eval_data: str = "",
    prompt: str = "",
    answer: str = "",
    gold: str = "",
    system: str = "",
    suffix: str = "",
    seed: int = 0,
) -> QuestionDataset:
    """Prompts from a jsonl, json or csv file; rewards by functions with TRL's or verl's signature, math-verify, or a judge."""
    table = read_rewards([dict(row) if isinstance(row, Mapping) else row for row in rewards])
    needs_answer = any(spec.get("math") for spec in rewards)
    return _dataset("jsonl", data, eval_data, prompt, answer, needs_answer, table, Framing(system, suffix), gold, seed)


def math(
    data: str,
    eval_data: str = "",
    prompt: str = "",
    answer: str = "",
    rewards: Sequence[Mapping[str, Any]] = (),
    system: str = "",
    suffix: str = "",
    seed: int = 0,
) -> QuestionDataset:
    """Problems with answers from a jsonl, json or csv file, graded by math-verify; further rewards are added to it."""
    table = read_rewards([{"math": True}, *(dict(row) if isinstance(row, Mapping) else row for row in rewards)])
    return _dataset("math", data, eval_data, prompt, answer, True, table, Framing(system, suffix), "", seed)


def _dataset(
    name: str,
    data: str,
    eval_data: str,
    prompt: str,
    answer: str,
    needs_answer: bool,
    rewards: Rewards,
    framing: Framing,
    gold: str,
    seed: int,
) -> QuestionDataset:
    rows = read_rows(Path(data), prompt, answer, need_answer=needs_answer)
    held = read_rows(Path(eval_data), prompt, answer, need_answer=needs_answer) if eval_data else None
    if unknown := [n for n in NAMED.findall(gold) if n not in rows[0].columns]:
        raise ConfigError(f"env.args.gold: no column {unknown[0]!r}; there are {', '.join(rows[0].columns)}")
    return QuestionDataset(name, split_rows(rows, held, seed), rewards, framing, gold)


@dataclass(frozen=True)
class QuestionDataset:
    """Rows of a file. Behind the last one it begins again."""

    name: str
    rows: Mapping[Split, Sequence[Row]]
    rewards: Rewards
    framing: Framing
    gold: str
    """What a right answer looks like, columns in braces; empty: what stands in the answer column."""

    def row(self, split: Split, index: int) -> Row:
        return self.rows[split][index % len(self.rows[split])]

    def problem_count(self, split: Split) -> int:
        return len(self.rows[split])

    def env(self, split: Split, index: int) -> Env:
        row = self.row(split, index)
        known = bool(self.gold) or (row.answer is not None and str(row.answer).strip() != "")
        return (SolvableRowEnv if known else RowEnv)(self, row)

    async def compute_group_rewards(self, split: Split, index: int, trajectories_G: Sequence[Trajectory]) -> list[Verdict | Ungraded]:
        return await self.rewards.of_group(self.row(split, index), trajectories_G)

    async def close(self) -> None:
        await self.rewards.close()


class RowEnv:
    """Asks one question once."""

    def __init__(self, dataset: QuestionDataset, row: Row) -> None:
        self.dataset, self.row = dataset, row

    async def initial_observation(self) -> Observation:
        return Observation(self.dataset.framing.messages(self.row.prompt))

    async def step(self, action: Message) -> StepResult:
        return await self.dataset.rewards.of_answer(self.row, action)


class SolvableRowEnv(RowEnv):
    def gold(self) -> Message:
        columns = self.row.columns
        filled = NAMED.sub(lambda found: str(columns.get(found[1], found[0])), self.dataset.gold)
        return {"role": "assistant", "content": filled or str(self.row.answer)}
