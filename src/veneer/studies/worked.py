"""Sums with every partial sum written down: what a policy that has learned them would say, token for token."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from veneer.envs.arithmetic import generate
from veneer.envs.dataset import Problem, draw
from veneer.studies.demonstrations import write_rows
from veneer.types import Message


def worked(problem: Problem, backwards: bool = False) -> list[Message]:
    """Question and answer. ``backwards``: from the last number on, which the bundled base has never seen; otherwise as it does it."""
    numbers = [int(number) for number in problem.prompt.removesuffix("=?").split("+")][:: -1 if backwards else 1]
    lines, total = list[str](), numbers[0]
    for number in numbers[1:]:
        lines.append(f"{total}+{number}={total + number}")
        total += number
    answer: Message = {"role": "assistant", "reasoning_content": "\n".join(lines), "content": problem.answer}
    return [{"role": "user", "content": problem.prompt}, answer]


def write_worked(folder: Path, rows: int, backwards: bool, terms: tuple[int, int] = (3, 5)) -> Path:
    """Training problems of so many numbers with their worked answers, a line each, in a file named by its content.

    Raises:
        StorageError: it cannot be written.
    """
    problems = (draw(partial(generate, terms=terms), "train", i, "studies/worked") for i in range(rows))
    return write_rows(folder, [{"messages": worked(problem, backwards)} for problem in problems])
