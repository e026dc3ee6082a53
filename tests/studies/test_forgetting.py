"""Accuracies made equal, the parabola of forgetting, demonstrations in two manners, and runs that begin from one that was taught."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
from test_lab import lab

from veneer.store.adapters import read_adapter
from veneer.studies import forgetting
from veneer.studies.contest import Terms
from veneer.studies.forgetting import LENGTHS, OTHER, OWN, REWARDED, RIGHT, WAYS, Point, _findings, at_accuracy, configs_of, parabola
from veneer.studies.worked import write_worked
from veneer.train.config import ScorecardSettings, make_config
from veneer.types import ConfigError

SMALL = (
    *("rl.groups_per_batch=2", "rl.group_size=2", "rl.max_tokens=8", "eval.problems=2", "sft.batch_size=2", "sft.held_out=0.1"),
    *("rejection.problems=8", "rejection.group_size=4", "rejection.batch_size=2", "lora.rank=1"),
)


def course(kl: float, lost: float, noise: float = 0.0) -> list[Point]:
    """Accuracy rises evenly; so do KL and loss, up to these."""
    return [Point(10 * i, 0.2 * i + noise, kl * i / 4, lost * (i / 4) ** 2) for i in range(5)]


def test_equal_accuracies_are_interpolated() -> None:
    points = [Point(0, 0.1, 0.0, 0.0), Point(5, 0.5, 1.0, 0.1), Point(10, 0.4, 1.5, 0.3), Point(20, 0.9, 2.0, 0.2)]
    assert at_accuracy(points, 0.3) == Point(5, 0.3, pytest.approx(0.5), pytest.approx(0.05))
    assert at_accuracy(points, 0.5) == Point(5, 0.5, pytest.approx(1.0), pytest.approx(0.1))
    assert at_accuracy(points, 0.65) == Point(20, 0.65, pytest.approx(1.75), pytest.approx(0.25))
    assert at_accuracy(points, 0.95) is None


def test_a_parabola_is_found_again() -> None:
    kl = np.random.default_rng(0).uniform(0, 3, 40)
    assert parabola(kl, 0.1 * kl + 0.05 * kl**2) == pytest.approx((0.1, 0.05, 1.0))
    assert parabola(kl, np.random.default_rng(1).normal(0, 1, 40))[2] < 0.3


def test_words() -> None:
    """Reward stays nearer than one and is no further than the other; what it loses follows a parabola."""
    seeds = [0.0, 0.001, -0.001]
    found = _findings(
        {
            REWARDED: [course(1.0, 0.1, noise) for noise in seeds],
            RIGHT: [course(1.0, 0.2, noise) for noise in seeds],
            OWN: [course(1.0, 0.1, noise) for noise in seeds],
            OTHER: [course(3.0, 0.9, noise) for noise in seeds],
        }
    )
    assert [finding.verdict for finding in found] == [
        *("equal", "less", "equal", "equal", "less", "less"),
        *("worse", "worse", "worse", "worse"),
        "yes",
    ]
    assert "at an accuracy of 0.80: by reward beside" in found[0].question


def test_each_pair_is_compared_where_both_of_it_come() -> None:
    """One way that gets nowhere does not have the others compared where they have hardly begun."""
    poor = [Point(5 * i, 0.1 * i, 2.0 * i, 0.0) for i in range(3)]
    found = _findings({REWARDED: [course(1.0, 0.1)] * 2, RIGHT: [course(1.0, 0.1)] * 2, OWN: [course(2.0, 0.1)] * 2, OTHER: [poor] * 2})
    assert "at an accuracy of 0.80: by reward beside by demonstrations in its manner" in found[2].question
    assert "at an accuracy of 0.20: by reward beside by demonstrations in another" in found[4].question
    assert [finding.verdict for finding in found[:6:2]] == ["equal", "less", "less"]


def test_who_never_gets_there_decides_nothing() -> None:
    flat = [[Point(0, 0.5, 0.0, 0.0), Point(5, 0.2, 1.0, 0.1), Point(10, 0.1, 2.0, 0.5)]] * 2
    found = _findings({REWARDED: [course(1.0, 0.1)] * 2, RIGHT: flat, OWN: flat, OTHER: flat})
    assert found[0].verdict == "undecided"
    assert "0 seeds" in found[0].numbers


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


def test_every_run_begins_from_what_was_taught(tmp_path: Path) -> None:
    """Every way at each of its lengths, with the settings of its own loop alone."""
    configs = configs_of(tmp_path, "taught", Terms(3, 1, SMALL))
    assert {config.init for config in configs} == {"taught"}
    assert [config.kind for config in configs] == [WAYS[way]["kind"] for way, lengths in LENGTHS.items() for _ in range(3 * len(lengths))]
    assert [config.total_steps for config in configs[:5]] == list(LENGTHS[REWARDED])
    assert {Path(config.sft.data).is_file() for config in configs if config.kind == "sft"} == {True}
    with pytest.raises(ConfigError, match="the study itself decides init"):
        configs_of(tmp_path, "taught", Terms(3, 1, ("init=mine",)))


def test_the_whole_study_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut to two lengths of a step or two, two seeds and a few tries: four ways, findings, a page and a picture. The policy of the start is
    the one that was taught."""
    teaching = {**forgetting.TEACHING, "rl": {**forgetting.TEACHING["rl"], "steps": 2, "groups_per_batch": 4}}
    monkeypatch.setattr(forgetting, "TEACHING", teaching)
    monkeypatch.setattr(forgetting, "LENGTHS", dict.fromkeys(WAYS, (1, 2)))
    monkeypatch.setattr(forgetting, "ROWS", 20)
    monkeypatch.setattr(forgetting, "SCORECARD", ScorecardSettings(problems=3, tries=2, envs=("sort",), elsewhere=2))
    here = lab(tmp_path)
    result = asyncio.run(forgetting.conduct(here, Terms(2, 1, SMALL)))
    assert len(result.findings) == 11
    assert {way: len(found) for way, found in result.document["ways"].items()} == dict.fromkeys(WAYS, 2)
    assert result.tables.count("\n| by ") == 8
    result.draw(tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().count("<svg") == 1
    (taught,) = asyncio.run(here.run([make_config(teaching, ["lora.rank=1"])]))
    parents = {
        json.loads(manifest.read_text())["parents"][0]["digest"]
        for manifest in here.folder.glob("*/adapter/veneer.json")
        if manifest.parents[1] != taught.folder
    }
    assert parents == {read_adapter(taught.folder / "adapter")[0].adapter.digest}
