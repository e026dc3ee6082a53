"""Do behaviours get in each other's way? The base, each adapter alone and each two stacked, on every adapter's task.

All arms answer the same held-out problems with the same draws, side by side on one engine, so two arms differ in the adapter alone
and are compared problem by problem. A stack is the sum of its updates, each with the same scale.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from veneer.measure.canary import canary_tokens, check_drawn, check_loaded
from veneer.measure.intervals import Mean, Rate, paired_difference
from veneer.render import Renderer
from veneer.store.stack import stack_adapters
from veneer.studies.drawing import picture
from veneer.train.evaluate import evaluate
from veneer.train.metrics import check_failures
from veneer.train.rollouts import Policy
from veneer.types import AdapterError, Checkpoint, Engine, EnvDataset, SamplingParams

BASE = "base"
MARGIN = 0.05
"""A loss below this share of the problems is small enough to be called none, if the interval says so."""


@dataclass(frozen=True)
class Task:
    """What an adapter was made for."""

    name: str
    dataset: EnvDataset
    max_tokens: int
    """Of one turn."""


@dataclass(frozen=True)
class Cell:
    """One arm on one task."""

    arm: str
    task: str
    solved: Rate
    wins: tuple[bool, ...]
    """By problem."""


@dataclass(frozen=True)
class Finding:
    """What ``arm`` loses or gains on a task compared with ``against``, problem by problem."""

    arm: str
    against: str
    task: str
    difference: Mean
    verdict: str
    """harms, helps, none (the interval leaves room for no loss of MARGIN or more) or undecided."""


@dataclass(frozen=True)
class Matrix:
    """All arms on all tasks, in order."""

    arms: tuple[str, ...]
    tasks: tuple[str, ...]
    cells: Mapping[tuple[str, str], Cell]
    findings: tuple[Finding, ...]


async def interfere(
    engine: Engine,
    renderer: Renderer,
    adapters: Mapping[str, Checkpoint],
    tasks: Mapping[str, Task],
    problems: int,
    seed: int,
    *,
    scale: float = 1.0,
    max_failed_share: float = 0.5,
) -> Matrix:
    """Measure adapters, by name, each of which has its task in ``tasks``; ``scale`` is that of each part of a stack. What is loaded
    under the names of arms is replaced, and removed in the end.

    Raises:
        AdapterError: fewer than two adapters, or a stack that the base has no room for.
        AttestationError: an adapter does not act as it did where it was saved, or an answer comes from another arm.
    """
    if len(adapters) < 2 or BASE in adapters:
        raise AdapterError(f"give two adapters or more, none of them called {BASE!r}; got {', '.join(adapters) or 'none'}")
    pairs = {f"{a}+{b}": [(adapters[a], scale), (adapters[b], scale)] for a, b in itertools.combinations(adapters, 2)}
    arms = {**adapters, **{name: stack_adapters(parts, name) for name, parts in pairs.items()}}
    once = {task.name: task for task in tasks.values()}
    try:
        for name, checkpoint in arms.items():
            await engine.load_state(name, checkpoint)
            check_loaded(engine, name, checkpoint, canary_tokens(renderer.vocab_size))

        async def cell(arm: str, task: Task) -> Cell:
            adapter = None if arm == BASE else arm
            policy = Policy(engine, renderer, adapter, SamplingParams(max_tokens=task.max_tokens))
            result = await evaluate(policy, task.dataset, problems, seed)
            check_failures([result.group()], max_failed_share)
            digest = None if adapter is None else arms[adapter].adapter.digest
            check_drawn((turn.sample for t in result.trajectories for turn in t.transitions), digest, engine.base_digest)
            return Cell(arm, task.name, result.solved, tuple(t.reward >= 1 for t in result.trajectories))

        cells = await asyncio.gather(*(cell(arm, task) for arm in (BASE, *arms) for task in once.values()))
    finally:
        for name in arms:
            with contextlib.suppress(AdapterError):  # it was not loaded yet
                engine.remove_adapter(name)
    found = {(cell.arm, cell.task): cell for cell in cells}
    return Matrix((BASE, *arms), tuple(once), found, tuple(_findings(found, list(adapters), {a: t.name for a, t in tasks.items()})))


def _findings(cells: Mapping[tuple[str, str], Cell], adapters: Sequence[str], own: Mapping[str, str]) -> list[Finding]:
    """What each adapter does to the others' tasks by itself, and what a stack does to each of its parts' own."""
    compared = [(a, BASE, own[b]) for a, b in itertools.permutations(adapters, 2) if own[a] != own[b]]
    compared += [(f"{a}+{b}", part, own[part]) for a, b in itertools.combinations(adapters, 2) for part in (a, b)]
    findings: list[Finding] = []
    for arm, against, task in dict.fromkeys(compared):
        difference = paired_difference(cells[against, task].wins, cells[arm, task].wins)
        findings.append(Finding(arm, against, task, difference, _verdict(difference)))
    return findings


def _verdict(difference: Mean) -> str:
    if difference.high < 0:
        return "harms"
    if difference.low > 0:
        return "helps"
    return "none" if difference.low > -MARGIN else "undecided"


# ---------------------------------------------------------------- what people read


def as_document(matrix: Matrix) -> dict[str, object]:
    """As JSON."""

    def rate(rate: Rate) -> dict[str, float]:
        return {"value": rate.value, "low": rate.low, "high": rate.high, "trials": rate.trials}

    return {
        "arms": list(matrix.arms),
        "tasks": list(matrix.tasks),
        "solved": [{"arm": c.arm, "task": c.task, **rate(c.solved)} for c in matrix.cells.values()],
        "findings": [
            {
                "arm": f.arm,
                "against": f.against,
                "task": f.task,
                "difference": {"value": f.difference.value, "low": f.difference.low, "high": f.difference.high},
                "verdict": f.verdict,
            }
            for f in matrix.findings
        ],
    }


def as_table(matrix: Matrix) -> str:
    """As Markdown: the shares solved, and what they say."""
    lines = [f"| arm | {' | '.join(matrix.tasks)} |", "|---" * (len(matrix.tasks) + 1) + "|"]
    lines += [f"| {arm} | {' | '.join(str(matrix.cells[arm, task].solved) for task in matrix.tasks)} |" for arm in matrix.arms]
    lines += ["", "| arm | on | compared with | difference | interference |", "|---|---|---|---|---|"]
    for f in matrix.findings:
        interval = f"{f.difference.value:+.3f} [{f.difference.low:+.3f}, {f.difference.high:+.3f}]"
        lines.append(f"| {f.arm} | {f.task} | {f.against} | {interval} | {f.verdict} |")
    return "\n".join(lines) + "\n"


def draw(matrix: Matrix, path: Path) -> None:
    """As a picture: a field for each arm and task, shaded by the share solved."""
    values = [[matrix.cells[arm, task].solved for task in matrix.tasks] for arm in matrix.arms]
    with picture(path, 2.2 + 1.9 * len(matrix.tasks), 1.2 + 0.55 * len(matrix.arms)) as figure:
        axes = figure.subplots()
        axes.imshow([[rate.value for rate in row] for row in values], cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for y, row in enumerate(values):
            for x, rate in enumerate(row):
                text = f"{rate.value:.2f}\n[{rate.low:.2f}, {rate.high:.2f}]"
                axes.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if rate.value > 0.6 else "black")
        axes.set_xticks(range(len(matrix.tasks)), matrix.tasks)
        axes.set_yticks(range(len(matrix.arms)), matrix.arms)
        axes.set_title(f"share of {values[0][0].trials} held-out problems solved", fontsize=9)
