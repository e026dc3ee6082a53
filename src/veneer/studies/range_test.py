"""Which learning rate suits an adapter? A few rates side by side for a few steps: an estimate for a plan, not a study.

Short runs bear larger rates than long ones, and what one seed says is mostly its own: scores are means over a few. What is taken is where
the parabola through the rate that ends best and its two neighbours is highest; its range are the rates that end as well, within what so few
held-out problems can tell, with one grid point to either side. Where nothing is known of the base, rates far apart are tried first, for
published ones are of models a thousand times as large.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from veneer.studies.contest import peak
from veneer.studies.lab import Lab, Outcome
from veneer.train.config import RunConfig

PROBLEMS = 256
FACTOR, POINTS = 2.0, 5
LOWEST, RUNG, RUNGS = 1e-5, 8.0, 5
"""Of a ladder: the lowest rate of published recipes, and how far apart the rungs are, up to 0.04, where everything diverges."""


@dataclass(frozen=True)
class Tried:
    """A rate, on every seed."""

    rate: float
    before: float
    after: float
    """Mean held-out rewards."""
    diverged: bool
    """Some seed did."""
    problems: int = PROBLEMS
    """Of all seeds."""


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


def ladder() -> list[float]:
    """Rates where nothing is known."""
    return [LOWEST * RUNG**i for i in range(RUNGS)]


async def find_rate(lab: Lab, config: RunConfig, centre: float | None, steps: int, seeds: int = 1) -> Range:
    """Make the runs of so many steps on as many seeds, from that of ``config`` on, as adapters of one engine; those of an earlier time are
    taken over. ``centre``: around which the grid
    lies; None: where a ladder leads. A grid whose good rates go up to a side is widened there by two, once.

    Raises:
        Interrupted, VeneerError: as ``Lab.run``.
    """
    if centre is None:
        centre = climb(await _try_rates(lab, config, ladder(), steps, seeds))
    tried = await _try_rates(lab, config, grid(centre), steps, seeds)
    more = beyond(tried)
    if more:
        tried = sorted([*tried, *await _try_rates(lab, config, more, steps, seeds)], key=lambda one: one.rate)
    return choose(tried)


async def _try_rates(lab: Lab, config: RunConfig, rates: Sequence[float], steps: int, seeds: int) -> list[Tried]:
    loop = config.rl.model_copy(update={"steps": steps})
    evaluation = config.eval.model_copy(update={"problems": PROBLEMS, "every": steps})
    short = config.model_copy(update={"eval": evaluation, "checkpoint_every": steps})

    def one(rate: float, seed: int) -> RunConfig:
        return short.model_copy(update={"rl": loop.model_copy(update={"learning_rate": float(f"{rate:.6g}")}), "seed": config.seed + seed})

    outcomes = await lab.run([one(rate, seed) for rate in rates for seed in range(seeds)])
    return [_tried(outcomes[i : i + seeds]) for i in range(0, len(outcomes), seeds)]


def climb(tried: Sequence[Tried]) -> float:
    """From the rungs of a ladder: the best if it improved on the base, else the largest that did no harm, for harm shows sooner than good;
    the lowest if all did."""
    if _good(tried):
        return _best(tried).rate
    harmless = [one.rate for one in tried if not one.diverged and one.after >= one.before - _error(one.before, one.problems)]
    return max(harmless, default=tried[0].rate)


def beyond(tried: Sequence[Tried]) -> list[float]:
    """Two more rates on every side that the good ones go up to; none if none is good."""
    good = _good(tried)
    below = [tried[0].rate / FACTOR**2, tried[0].rate / FACTOR] if good and good[0] == 0 else []
    above = [tried[-1].rate * FACTOR, tried[-1].rate * FACTOR**2] if good and good[-1] == len(tried) - 1 else []
    return [*below, *above]


def choose(tried: Sequence[Tried]) -> Range:
    """From rates in rising order."""
    rates, good = [one.rate for one in tried], _good(tried)
    if not good:
        return Range(tried, None, rates[0], rates[-1], "")
    first, last = good[0], good[-1]
    edge = "highest tried" if last == len(rates) - 1 else "lowest tried" if first == 0 else ""
    value = peak(rates, [0.0 if one.diverged else one.after for one in tried])
    return Range(tried, value, rates[first] / FACTOR, rates[last] * FACTOR, edge)


def _good(tried: Sequence[Tried]) -> list[int]:
    """Places of those that end as well as the best, within one standard error; none if that one did not improve on the base."""
    best = _best(tried)
    error = _error(best.after, best.problems)
    if best.diverged or best.after <= best.before + error:
        return []
    return [i for i, one in enumerate(tried) if not one.diverged and one.after >= best.after - error]


def _error(share: float, problems: int) -> float:
    """The standard error of a share of so many problems, not below that of a quarter of one."""
    return math.sqrt(max(share * (1 - share), 0.25 / problems) / problems)


def _best(tried: Sequence[Tried]) -> Tried:
    return max(tried, key=lambda one: one.after)


def _tried(outcomes: Sequence[Outcome]) -> Tried:
    """Of one rate."""
    before, after = (statistics.fmean(scores) for scores in zip(*((o.score_before, o.score) for o in outcomes), strict=True))
    diverged = any(outcome.diverged is not None for outcome in outcomes)
    return Tried(outcomes[0].config.rl.learning_rate, before, after, diverged, PROBLEMS * len(outcomes))
