"""Accuracies made equal, the parabola of forgetting, demonstrations in two manners, and runs that begin from one that was taught."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from test_lab import lab

from veneer.studies import forgetting, sharpening
from veneer.studies.contest import Arm, Sweep, Terms
from veneer.studies.forgetting import (
    LENGTHS,
    OTHER,
    OWN,
    POSITIVE,
    REWARDED,
    RIGHT,
    Course,
    Point,
    _findings,
    at_accuracy,
    parabola,
    ways_of,
)
from veneer.studies.result import Finding
from veneer.studies.worked import write_worked
from veneer.train.config import ScorecardSettings
from veneer.train.rollouts import Policy
from veneer.types import ConfigError, RunError


def course(kl: float, lost: float, noise: float = 0.0) -> list[Point]:
    """Accuracy rises evenly; so do KL and loss, up to these."""
    return [Point(10 * i, 0.2 * i + noise, kl * i / 4, lost * (i / 4) ** 2) for i in range(5)]


def findings(paths: dict[str, list[Course]], **edges: Literal["lowest", "highest"]) -> list[Finding]:
    """``edges``: of ways whose best learning rate is the last that was tried."""
    return _findings(paths, {way: Sweep({}, edges.get(way), False) for way in paths})


def test_equal_accuracies_are_interpolated_between_measured_lengths() -> None:
    """Before the first of them nobody knows the way from the start: KL grows faster than any line there."""
    points = [Point(0, 0.1, 0.0, 0.0), Point(5, 0.5, 1.0, 0.1), Point(10, 0.4, 1.5, 0.3), Point(20, 0.9, 2.0, 0.2)]
    assert at_accuracy(points, 0.3) is None
    assert at_accuracy(points, 0.65) == Point(20, 0.65, pytest.approx(1.75), pytest.approx(0.25))
    assert at_accuracy(points, 0.95) is None
    dips = [Point(0, 0.5, 0.0, 0.0), Point(5, 0.2, 1.0, 0.1), Point(10, 0.6, 2.0, 0.3)]
    assert at_accuracy(dips, 0.55) == Point(10, 0.55, pytest.approx(1.875), pytest.approx(0.275))


def test_a_parabola_is_found_again() -> None:
    kl = np.random.default_rng(0).uniform(0, 3, 40)
    assert parabola(kl, 0.1 * kl + 0.05 * kl**2) == pytest.approx((0.1, 0.05, 1.0))
    assert parabola(kl, np.random.default_rng(1).normal(0, 1, 40))[2] < 0.3


def test_words() -> None:
    """Reward stays nearer than one and is no further than the others; what it loses follows a parabola."""
    seeds = [0.0, 0.001, -0.001]
    found = findings(
        {
            REWARDED: [course(1.0, 0.1, noise) for noise in seeds],
            POSITIVE: [course(1.0, 0.1, noise) for noise in seeds],
            RIGHT: [course(1.0, 0.2, noise) for noise in seeds],
            OWN: [course(1.0, 0.1, noise) for noise in seeds],
            OTHER: [course(3.0, 0.9, noise) for noise in seeds],
        }
    )
    assert [finding.verdict for finding in found] == [
        *("equal", "equal", "equal", "less", "equal", "equal", "less", "less"),
        *("worse", "worse", "worse", "worse", "worse"),
        "yes",
    ]
    assert "at an accuracy of 0.80: by reward beside" in found[0].question
    assert "; without the runs by demonstrations in another 0." in found[-1].numbers, "it rests on the way that loses most"


def test_each_pair_is_compared_where_both_of_it_come() -> None:
    """One way that gets nowhere does not have the others compared where they have hardly begun."""
    poor = [Point(5 * i, 0.1 * i, 2.0 * i, 0.0) for i in range(4)]
    like = [course(1.0, 0.1)] * 2
    paths = {REWARDED: like, POSITIVE: like, RIGHT: like, OWN: [course(2.0, 0.1)] * 2, OTHER: [poor] * 2}
    found = findings(paths, **{OWN: "highest"})
    assert "at an accuracy of 0.80: by reward beside by demonstrations in its manner" in found[4].question
    assert "; by demonstrations in its manner at the highest learning rate tried" in found[4].numbers
    assert "at an accuracy of 0.30: by reward beside by demonstrations in another" in found[6].question
    assert "highest" not in found[6].numbers
    assert [finding.verdict for finding in found[:8:2]] == ["equal", "equal", "less", "less"]


def test_who_never_gets_there_decides_nothing() -> None:
    """One that falls below its start at once, and one that rises by no more than chance."""
    falls = [Point(0, 0.5, 0.0, 0.0), Point(5, 0.2, 1.0, 0.1), Point(10, 0.1, 2.0, 0.5)]
    rises = [Point(0, 0.5, 0.0, 0.0), Point(5, 0.4, 1.0, 0.1), Point(10, 0.51, 2.0, 0.5)]
    for flat in (falls, rises):
        found = findings({REWARDED: [course(1.0, 0.1)] * 2, POSITIVE: [flat] * 2, RIGHT: [flat] * 2, OWN: [flat] * 2, OTHER: [flat] * 2})
        assert found[0].verdict == "undecided"
        assert "where both have learned as much" in found[0].question
        assert "in 0 of 2 seeds both rise to it" in found[0].numbers


def test_one_seed_that_does_not_get_there_is_not_left_out_in_silence() -> None:
    """It is the reason why nothing is said, and not a seed less."""
    like = [course(1.0, 0.1)] * 2
    late = [Point(0, 0.0, 0.0, 0.0), Point(5, 0.9, 1.0, 0.1), Point(10, 0.95, 2.0, 0.5)]
    paths = {REWARDED: [course(1.0, 0.1), late], POSITIVE: like, RIGHT: like, OWN: [course(2.0, 0.1)] * 2, OTHER: [course(2.0, 0.1)] * 2}
    assert "in 1 of 2 seeds both rise to it between measured lengths" in findings(paths)[0].numbers


def test_a_parabola_explains_nothing_where_nothing_is_lost() -> None:
    """What was measured then is its own error, of which no law explains much."""
    rng = np.random.default_rng(0)

    def still() -> list[Point]:
        return [Point(5 * i, 0.2 * i, float(i), 0.01 * float(rng.normal()), 0.01) for i in range(5)]

    paths = {way: [still(), still(), still()] for way in (REWARDED, POSITIVE, RIGHT, OWN, OTHER)}
    assert findings(paths)[-1].verdict == "undecided"
    assert "errors of measurement leave" in findings(paths)[-1].numbers


@pytest.mark.parametrize("backwards", [False, True])
def test_demonstrations_are_right(tmp_path: Path, backwards: bool) -> None:
    path = write_worked(tmp_path, 30, backwards)
    assert path == write_worked(tmp_path, 30, backwards) != write_worked(tmp_path, 30, not backwards)
    for line in path.read_text().splitlines():
        asked, answer = json.loads(line)["messages"]
        numbers = asked["content"].removesuffix("=?").split("+")
        steps = answer["reasoning_content"].splitlines()
        assert len(steps) == len(numbers) - 1
        for step in steps:
            left, right = step.split("=")
            assert sum(map(int, left.split("+"))) == int(right)
        assert steps[0].split("+")[0] == numbers[-1 if backwards else 0]
        assert int(answer["content"]) == sum(map(int, numbers))


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths of a step or two, rates of which none is best, and a few tries."""

    def cut(arm: Arm) -> Arm:
        kind = arm.settings["kind"]
        sizes = {"rl": {"groups_per_batch": 2, "group_size": 2, "max_tokens": 8}, "rejection": {"problems": 8}, "sft": {"batch_size": 2}}
        return replace(arm, rates=(1e-3, 2e-3, 4e-3), settings={**arm.settings, kind: {**arm.settings[kind], **sizes[kind]}})

    monkeypatch.setattr(forgetting, "ways_of", lambda folder: [cut(arm) for arm in ways_of(folder)])
    monkeypatch.setattr(forgetting, "LENGTHS", dict.fromkeys(LENGTHS, (1, 2)))
    monkeypatch.setattr(forgetting, "ROWS", 20)
    monkeypatch.setattr(forgetting, "SCORECARD", ScorecardSettings(problems=3, tries=2, envs=("sort",), elsewhere=2))
    monkeypatch.setattr(forgetting, "SHARED", {"lora": {"rank": 1}, "eval": {"problems": 8, "every": 10**6}})


def teach(monkeypatch: pytest.MonkeyPatch, **rl: float) -> None:
    monkeypatch.setattr(forgetting, "TEACHING", {**forgetting.TEACHING, "rl": {**forgetting.TEACHING["rl"], "steps": 6, **rl}})


def test_the_whole_study_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five ways, findings, a page and a picture; every run begins from the one that was taught, and is measured beside it."""
    small(monkeypatch)
    teach(monkeypatch)
    here, began = lab(tmp_path), list[str | None]()
    measure = sharpening.measure_scorecard

    async def seen(start: Policy, *rest: Any, **more: Any) -> Any:
        held = await start.engine.publish(start.adapter) if start.adapter else None
        began.append(held and held.digest)
        return await measure(start, *rest, **more)

    monkeypatch.setattr(sharpening, "measure_scorecard", seen)
    result = asyncio.run(forgetting.conduct(here, Terms(2, 1)))
    assert len(result.findings) == 15
    assert result.findings[0].question.startswith("reward of the taught policy")
    assert {way: len(found) for way, found in result.document["ways"].items()} == dict.fromkeys(LENGTHS, 2)
    assert result.tables.count("\n| by ") == 10
    assert result.tables.count("\n- by ") == 5
    result.draw(tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().count("<svg") == 1
    manifests = [json.loads(path.read_text()) for path in here.folder.glob("*/adapter/veneer.json")]
    (taught,) = [manifest["digest"] for manifest in manifests if manifest["env"] == "sort"]
    assert {parent["digest"] for manifest in manifests for parent in manifest["parents"]} == {taught}
    assert began == [taught] * 20


def test_teaching_that_came_to_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    teach(monkeypatch, learning_rate=1e30)
    with pytest.raises(RunError, match="teaching came to nothing"):
        asyncio.run(forgetting.conduct(lab(tmp_path), Terms(2, 1)))


@pytest.mark.parametrize("override", ["init=mine", "rl.steps=3", "sft.data=mine.jsonl", "rejection.rounds=2", "env.args.max_terms=9"])
def test_what_would_make_ways_unequal_is_refused(override: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"the study itself decides {override.partition('=')[0]}"):
        asyncio.run(forgetting.conduct(lab(tmp_path), Terms(2, 1, (override,))))
