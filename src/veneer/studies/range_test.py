"""Which learning rate suits an adapter? A few rates side by side for a few steps: an estimate for a plan, not a study.

Short runs bear larger rates than long ones, and one seed is one seed; so the rate that is taken is the middle of those that end as well
as the best one does, within what so few held-out problems can tell, and its range is theirs and one grid point to either side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from veneer.studies.lab import Lab, Outcome
from veneer.train.config import RunConfig

PROBLEMS = 128
FACTOR, POINTS = 2.0, 5


@dataclass(frozen=True)
class Tried:
    rate: float
    before: float
    after: float
    """Held-out rewards."""
    diverged: bool


@dataclass(frozen=True)
class Range:
    """What the rates came to, and what follows."""

    tried: Sequence[Tried]
    value: float | None
    """None: no rate improved on the base."""
    low: float
    high: float
    edge: str
    """"lowest tried" or "highest tried" where the best rate is the last on a side: it may be further out."""


def grid(centre: float) -> list[float]:
    """Rates a factor apart around one."""
    return [centre * FACTOR ** (i - POINTS // 2) for i in range(POINTS)]


async def try_rates(lab: Lab, config: RunConfig, rates: Sequence[float], steps: int) -> Range:
    """Make the runs of so many steps, as adapters of one engine; those of an earlier time are taken over."""
    loop = config.rl.model_copy(update={"steps": steps})
    evaluation = config.eval.model_copy(update={"problems": PROBLEMS, "every": steps})
    short = config.model_copy(update={"rl": loop, "eval": evaluation, "checkpoint_every": steps})
    configs = [short.model_copy(update={"rl": loop.model_copy(update={"learning_rate": rate})}) for rate in rates]
    return choose([_tried(outcome) for outcome in await lab.run(configs)])


def choose(tried: Sequence[Tried], problems: int = PROBLEMS) -> Range:
    """From rates in rising order."""
    rates = [one.rate for one in tried]
    best = max(tried, key=lambda one: one.after)
    error = math.sqrt(max(best.after * (1 - best.after), 0.25 / problems) / problems)
    if best.diverged or best.after <= best.before + error:
        return Range(tried, None, rates[0], rates[-1], "")
    good = [i for i, one in enumerate(tried) if not one.diverged and one.after >= best.after - error]
    first, last = good[0], good[-1]
    low, high = rates[first] / FACTOR, rates[last] * FACTOR
    edge = "highest tried" if last == len(rates) - 1 else "lowest tried" if first == 0 else ""
    return Range(tried, math.sqrt(rates[first] * rates[last]), low, high, edge)


def _tried(outcome: Outcome) -> Tried:
    rate = outcome.config.rl.learning_rate
    return Tried(rate, outcome.score_before, outcome.score, outcome.diverged is not None)
