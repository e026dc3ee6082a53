"""Reward functions that others wrote for TRL and verl, called as there, in one batch for a group.

TRL: https://huggingface.co/docs/trl/grpo_trainer#using-a-custom-reward-function. verl: https://verl.readthedocs.io/en/latest/preparation/reward_function.html.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

from veneer.envs.rows import Row
from veneer.types import DataError, Trajectory, Ungraded, in_one_line

Score = float | None | Ungraded
"""None: the function does not apply to this row."""
NOT_COLUMNS = ("prompt", "completion", "completion_ids")
"""What TRL takes out of a row."""


@dataclass(frozen=True)
class RewardFunction:
    """A function of the user's, by one of two signatures."""

    reference: str
    """FILE.py:FUNCTION."""
    function: Callable[..., Any]
    style: Literal["trl", "verl"]
    check: Callable[[Any, str], float]
    """A value as a reward in range, or a DataError; the text says whose and for which row."""

    async def __call__(self, row: Row, trajectories_G: Sequence[Trajectory]) -> tuple[list[Score], list[dict[str, float]]]:
        """Per member a score, and metrics.

        Raises:
            DataError: the function raised, or did not return a list of as many as there are members.
        """
        call = self._trl if self.style == "trl" else self._verl
        return await call(row, trajectories_G)

    async def _trl(self, row: Row, trajectories_G: Sequence[Trajectory]) -> tuple[list[Score], list[dict[str, float]]]:
        members = range(len(trajectories_G))
        turns = [t.transitions[-1] for t in trajectories_G]
        told = not isinstance(row.prompt, str)
        columns = {name: [copy.deepcopy(value) for _ in members] for name, value in row.columns.items() if name not in NOT_COLUMNS}
        adapter, log = turns[0].sample.adapter, _Log(len(turns))
        arguments = {
            **columns,
            "prompts": [copy.deepcopy(row.prompt) for _ in members],
            "completions": [[{"role": "assistant", "content": turn.text}] if told else turn.text for turn in turns],
            "completion_ids": [turn.sample.tokens.tolist() for turn in turns],
            "trainer_state": SimpleNamespace(global_step=0 if adapter is None else adapter.version),
            "log_extra": log.extra,
            "log_metric": log.metric,
        }
        values = await self._call(arguments, row)
        if not isinstance(values, list | tuple) or len(values) != len(turns):
            raise DataError(f"{self._who(row)} must return a list of {len(turns)} rewards, not {values!r:.80}")
        return [None if value is None else self._score(value, row) for value in values], log.metrics()

    async def _verl(self, row: Row, trajectories_G: Sequence[Trajectory]) -> tuple[list[Score], list[dict[str, float]]]:
        scores: list[Score] = []
        metrics_G: list[dict[str, float]] = []
        for trajectory in trajectories_G:
            model = row.columns.get("reward_model")
            arguments = {
                "data_source": row.columns.get("data_source"),
                "solution_str": trajectory.transitions[-1].text,
                "ground_truth": model["ground_truth"] if isinstance(model, Mapping) and "ground_truth" in model else row.answer,
                "extra_info": copy.deepcopy(row.columns.get("extra_info")),
            }
            metrics: dict[str, float] = {}
            try:
                value = await self._call(arguments, row)
                if isinstance(value, Mapping):
                    metrics = _numbers(value)
                    value = value.get("score")
                scores.append(self._score(value, row))
            except DataError as error:  # one answer's, and no other's
                scores.append(Ungraded(str(error)))
            metrics.pop("score", None)
            metrics_G.append(metrics)
        return scores, metrics_G

    async def _call(self, arguments: dict[str, Any], row: Row) -> Any:
        """The function takes all by name; one without ``**kwargs`` gets what it names."""
        parameters = inspect.signature(self.function).parameters.values()
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
            names = {p.name for p in parameters}
            arguments = {name: value for name, value in arguments.items() if name in names}
        try:
            value = self.function(**arguments)
            return await value if inspect.isawaitable(value) else value
        except Exception as error:  # the user's own code may raise anything
            raise DataError(f"{self._who(row)} raised {in_one_line(error)}") from error

    def _score(self, value: Any, row: Row) -> Score:
        try:
            return self.check(value, self._who(row))
        except DataError as error:
            return Ungraded(str(error))

    def _who(self, row: Row) -> str:
        return f"reward function {self.reference} on {row.place}"


@dataclass
class _Log:
    """What TRL lets a function log: a number for all, and columns; of these the numbers are kept, as metrics of each member."""

    members: int
    means: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    columns: dict[str, Sequence[Any]] = field(default_factory=dict[str, Sequence[Any]])

    def metric(self, name: str, value: float) -> None:
        self.means.setdefault(name, []).append(float(value))

    def extra(self, column: str, values: Sequence[Any]) -> None:
        self.columns[column] = values

    def metrics(self) -> list[dict[str, float]]:
        shared = {name: sum(values) / len(values) for name, values in self.means.items()}
        told = [{name: values[member] for name, values in self.columns.items() if member < len(values)} for member in range(self.members)]
        return [{**shared, **_numbers(row)} for row in told]


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
