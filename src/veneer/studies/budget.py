"""Several studies in a given time: all of them small first, then larger, and never one of them left out for another's seeds."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from veneer.studies.catalogue import Study
from veneer.studies.contest import Terms
from veneer.studies.lab import Lab
from veneer.studies.result import Result
from veneer.train.session import Interrupted
from veneer.types import ConfigError, VeneerError

LOG = logging.getLogger("veneer.studies")
SMALLER: Sequence[Terms] = (Terms(2, 1, coarse=True), Terms(2, 1), Terms(3, 1))


def levels_to(full: Terms) -> list[Terms]:
    """From the smallest form of a study to this one. What a level has made the next takes over, so that little is made twice."""
    less = [level for level in SMALLER if level.seeds <= full.seeds and level.choice_seeds <= full.choice_seeds]
    levels = [replace(level, overrides=full.overrides) for level in less if level.coarse or not full.coarse]
    return [level for level in levels if level != full] + [full]


@dataclass
class Reached:
    """How far a study came."""

    study: Study
    terms: Terms | None = None
    """None: not even the smallest form was finished."""
    result: Result | None = None
    failed: str = ""
    """Why it cannot be made, or made larger."""

    def gains(self, level: Terms) -> bool:
        """Whether the study does more on this level: one that chooses no learning rate has no use for another grid."""
        return not self.failed and (self.terms is None or self.study.chooses or level.seeds > self.terms.seeds)

    def shrunk(self, full: Terms) -> str:
        """In words, what it does with less of than ``full``."""
        parts = []
        if self.terms is None:
            parts.append("left out" if self.failed else "left out: the time was over before its smallest form was done")
        else:
            if self.terms.seeds < full.seeds:
                parts.append(f"{self.terms.seeds} of {full.seeds} seeds")
            if self.study.chooses and self.terms.choice_seeds < full.choice_seeds:
                parts.append(f"{self.terms.choice_seeds} of {full.choice_seeds} choice seeds")
            if self.study.chooses and self.terms.coarse and not full.coarse:
                parts.append(self.study.coarse)
        return "; ".join([", ".join(parts) or "in full", *([self.failed] if self.failed else [])])


def seconds_of(text: str) -> float:
    """Of "2h", "90m", "1h30m" or "45s".

    Raises:
        ConfigError: it is none of these, or no time at all.
    """
    found = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", text.strip())
    seconds = sum(float(part) * unit for part, unit in zip(found.groups(), (3600, 60, 1), strict=True) if part) if found else 0.0
    if seconds <= 0:
        raise ConfigError(f"--budget {text!r}: write a time such as 2h, 90m or 1h30m")
    return seconds


async def within(
    budget: float, lab: Lab, studies: Sequence[Study], full: Terms, made: Callable[[Reached], None], asked: threading.Event
) -> list[Reached]:
    """Make the studies, all of them on one level and then on the next, until ``budget`` seconds are over or all are there in full.

    A study that refuses an override, fails in whatever way, or cannot be told of, is left where it is, and the others go on. ``made``:
    told of a study whenever it has been finished on a level. ``asked``: set together with ``lab.stop`` when the user wants it to end; the
    latter is also set by a run that fails, for those beside it.

    Raises:
        Interrupted: the user stopped it; what was done is kept.
    """
    reached = [Reached(study) for study in studies]
    over = threading.Event()

    def stop() -> None:
        over.set()
        lab.stop.set()

    timer = threading.Timer(min(budget, threading.TIMEOUT_MAX), stop)
    timer.daemon = True
    timer.start()
    try:
        for level in levels_to(full):
            for one in reached:
                if one.gains(level):
                    await _advance(one, lab, level, made)
                    if over.is_set() or asked.is_set():  # the failure of a run may have been taken for it
                        lab.stop.set()
    except Interrupted:
        if asked.is_set() or not over.is_set():
            raise
    finally:
        timer.cancel()
    return reached


async def _advance(one: Reached, lab: Lab, level: Terms, made: Callable[[Reached], None]) -> None:
    try:
        result = await one.study.conduct(lab, level)
        made(Reached(one.study, level, result))
    except Interrupted:
        raise
    except Exception as error:
        if isinstance(error, VeneerError):
            one.failed = str(error)
        else:  # a fault of ours: an evening of other studies is not to be lost for it
            LOG.exception("the study %s failed", one.study.name)
            one.failed = f"a fault of Veneer's own, shown above: {type(error).__name__}: {error}"
        lab.stop.clear()  # one run's failure stops those beside it
        return
    one.terms, one.result = level, result
