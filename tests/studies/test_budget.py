"""Several studies in a given time: small forms of all first, what is told of them, and what a study's failure does to the others."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from test_lab import lab, never

from veneer.studies.budget import Reached, levels_to, seconds_of, within
from veneer.studies.catalogue import Study
from veneer.studies.contest import Arm, Terms, thinned
from veneer.studies.lab import Lab
from veneer.studies.result import Finding, Result
from veneer.train.session import Interrupted
from veneer.types import ConfigError, RunError

FULL = Terms(5, 2)


@pytest.mark.parametrize(("text", "seconds"), [("2h", 7200), ("90m", 5400), ("1h30m", 5400), ("45s", 45), ("0.5h", 1800), (" 10m ", 600)])
def test_times(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "2", "h", "0m", "-1h", "2 hours", "1m2h", "nan"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="write a time such as"):
        seconds_of(text)


def test_levels_rise_to_what_was_asked_for() -> None:
    levels = levels_to(Terms(5, 2, ("base=x",)))
    assert [(t.seeds, t.choice_seeds, t.coarse) for t in levels] == [(2, 1, True), (2, 1, False), (3, 1, False), (5, 2, False)]
    assert all(t.overrides == ("base=x",) for t in levels)
    assert levels_to(Terms(2, 1, coarse=True)) == [Terms(2, 1, coarse=True)]
    assert levels_to(Terms(2, 1)) == [Terms(2, 1, coarse=True), Terms(2, 1)]
    assert levels_to(Terms(4, 1, coarse=True)) == [Terms(2, 1, coarse=True), Terms(4, 1, coarse=True)]


def test_a_coarse_grid_is_each_second_rate() -> None:
    arm = Arm("a", {}, (1.0, 2.0, 4.0, 8.0, 16.0))
    assert thinned([arm], Terms(2, 1, coarse=True))[0].rates == (1.0, 4.0, 16.0)
    assert thinned([arm], Terms(2, 1)) == [arm]


def study(name: str, seconds: Callable[[Terms], float], error: Callable[[Terms], Exception | None] = lambda terms: None) -> Study:
    """One whose only work is to wait, as interruptibly as runs are."""

    async def conduct(lab: Lab, terms: Terms) -> Result:
        failure = error(terms)
        if failure is not None:
            lab.stop.set()  # as a run that fails stops those beside it
            raise failure
        until = time.monotonic() + seconds(terms)
        while time.monotonic() < until:
            lab.go_on()
            await asyncio.sleep(0.01)
        return Result([Finding("asked", f"{terms.seeds}", "")], "", {}, lambda path: None)

    return Study(name, "?", (), "", conduct)


def made_within(tmp_path: Path, seconds: float, *studies: Study) -> tuple[dict[str, Reached], list[str]]:
    told: list[str] = []
    found = asyncio.run(
        within(
            seconds,
            lab(tmp_path, never),
            studies,
            FULL,
            lambda one: told.append(f"{one.study.name} {one.terms.seeds}"),
            threading.Event(),
        )
    )
    return {one.study.name: one for one in found}, told


def test_all_are_small_before_one_is_large(tmp_path: Path) -> None:
    found, told = made_within(tmp_path, 60, study("a", lambda t: 0.0), study("b", lambda t: 0.0))
    assert told == ["a 2", "b 2", "a 2", "b 2", "a 3", "b 3", "a 5", "b 5"]
    assert {one.shrunk(FULL) for one in found.values()} == {"in full"}


def test_what_does_not_fit_is_shrunk_and_said(tmp_path: Path) -> None:
    slow = study("slow", lambda t: 0.0 if t.seeds < 3 else 60.0)
    found, _ = made_within(tmp_path, 0.5, study("quick", lambda t: 0.0), slow, study("last", lambda t: 0.0))
    assert found["quick"].shrunk(FULL) == "3 of 5 seeds, 1 of 2 choice seeds"
    assert found["slow"].shrunk(FULL) == "2 of 5 seeds, 1 of 2 choice seeds"
    assert found["last"].terms == Terms(2, 1)
    assert found["slow"].result is not None  # that of the level that it did finish
    coarse, _ = made_within(tmp_path, 0.5, study("coarse", lambda t: 0.0 if t.coarse else 60.0))
    assert coarse["coarse"].shrunk(FULL) == "2 of 5 seeds, 1 of 2 choice seeds, every second learning rate"
    fixed = replace(study("fixed", lambda t: 0.0 if t.coarse else 60.0), chooses=False)
    assert made_within(tmp_path, 0.5, fixed)[0]["fixed"].shrunk(FULL) == "2 of 5 seeds", "it had none of these to begin with"


def test_what_chooses_no_rate_is_made_once_for_each_number_of_seeds(tmp_path: Path) -> None:
    """Measuring again what cannot come out larger took time from others."""
    made = made_within(tmp_path, 30, replace(study("fixed", lambda t: 0.0), chooses=False), study("swept", lambda t: 0.0))[1]
    assert [line for line in made if "fixed" in line] == ["fixed 2", "fixed 3", "fixed 5"]
    assert [line for line in made if "swept" in line] == ["swept 2", "swept 2", "swept 3", "swept 5"]


def test_what_is_never_reached_is_left_out_in_words(tmp_path: Path) -> None:
    found, told = made_within(tmp_path, 0.2, study("long", lambda t: 60.0), study("behind", lambda t: 0.0))
    assert told == []
    assert found["behind"].shrunk(FULL) == "left out: the time was over before its smallest form was done"


def test_a_study_that_fails_does_not_take_others_with_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    refuses = study("refuses", lambda t: 0.0, lambda t: ConfigError("nothing to set"))
    breaks = study("breaks", lambda t: 0.0, lambda t: RunError("the disk is full") if t.seeds == 3 else None)
    faulty = study("faulty", lambda t: 0.0, lambda t: KeyError("eval/mean_nll"))
    found, _ = made_within(tmp_path, 60, refuses, breaks, faulty, study("goes on", lambda t: 0.0))
    assert found["faulty"].shrunk(FULL) == "left out; a fault of Veneer's own, shown above: KeyError: 'eval/mean_nll'"
    assert "Traceback" in caplog.text
    assert found["refuses"].shrunk(FULL) == "left out; nothing to set"
    assert found["breaks"].shrunk(FULL) == "2 of 5 seeds, 1 of 2 choice seeds; the disk is full"
    assert found["goes on"].terms == FULL


def test_one_that_cannot_be_kept_does_not_take_others_with_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its picture, its page, or the disk: what was told of it before is what it has reached."""
    told: list[str] = []

    def made(one: Reached) -> None:
        if one.study.name == "undrawn" and one.terms.seeds > 2:
            raise ValueError("no picture of this")
        told.append(one.study.name)

    studies = [study(name, lambda t: 0.0) for name in ("undrawn", "behind")]
    undrawn, behind = asyncio.run(within(60, lab(tmp_path, never), studies, FULL, made, threading.Event()))
    assert undrawn.terms == Terms(2, 1)
    assert undrawn.failed.endswith("ValueError: no picture of this")
    assert "Traceback" in caplog.text
    assert behind.terms == FULL
    assert told.count("behind") == 4


def test_who_interrupts_is_not_taken_for_the_clock(tmp_path: Path) -> None:
    one, asked = lab(tmp_path, never), threading.Event()

    def interrupt() -> None:
        asked.set()
        one.stop.set()

    async def interrupted() -> None:
        asyncio.get_running_loop().call_later(0.1, interrupt)
        await within(60, one, [study("a", lambda t: 60.0)], FULL, lambda one: None, asked)

    with pytest.raises(Interrupted):
        asyncio.run(interrupted())


def test_who_interrupts_is_not_taken_for_a_run_that_fails(tmp_path: Path) -> None:
    """Both at once: the next study must not begin."""
    one, asked, begun = lab(tmp_path, never), threading.Event(), []

    def fails(terms: Terms) -> Exception:
        asked.set()
        one.stop.set()
        return RunError("the environment is gone")

    def begins(terms: Terms) -> float:
        begun.append(terms)
        return 60.0

    with pytest.raises(Interrupted):
        asyncio.run(within(60, one, [study("a", lambda t: 0.0, fails), study("b", begins)], FULL, lambda one: None, asked))
    assert len(begun) <= 1  # it stops at its first look around


def test_a_failure_when_the_time_is_over_begins_nothing_new(tmp_path: Path) -> None:
    def fails(terms: Terms) -> Exception:
        time.sleep(0.4)
        return RunError("the environment is gone")

    found, told = made_within(tmp_path, 0.2, study("a", lambda t: 0.0, fails), study("b", lambda t: 60.0))
    assert told == []
    assert found["a"].shrunk(FULL) == "left out; the environment is gone"
    assert found["b"].shrunk(FULL).startswith("left out: the time was over")
