"""Sampling anew beside imitating what the base sampled once."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from test_lab import lab

from veneer.studies import exploration
from veneer.studies.contest import Terms, config_of, overridden
from veneer.studies.exploration import ONCE, REWARDED, ROUNDS, arms, conduct, found_findings, right_answers
from veneer.types import ConfigError


def test_all_play_as_many_episodes_and_imitation_takes_as_many_steps() -> None:
    configs = {arm.name: config_of(exploration.SHARED, arm, 1e-3, 0) for arm in arms()}
    rl = configs[REWARDED].rl
    assert rl.steps * rl.groups_per_batch * rl.group_size == 2560
    for name, rounds in ((ONCE, 1), (ROUNDS, 4)):
        rejection = configs[name].rejection
        assert rejection.rounds == rounds
        assert rounds * rejection.problems * rejection.group_size == 2560
        assert configs[name].total_steps == 80
        assert rejection.keep == rejection.group_size, "every right answer is imitated"


def outcome(*metrics: dict[str, float]) -> Any:
    return SimpleNamespace(metrics=metrics)


def test_right_answers_are_counted_by_episodes() -> None:
    """Evaluations are not, and a step in which more was played counts for more."""
    run = outcome(
        {"step": 0, "eval/reward": 0.9}, {"reward/total": 0.5, "episodes": 10}, {"step": 2}, {"reward/total": 0.1, "episodes": 30}
    )
    assert right_answers(cast("Any", run)) == pytest.approx(0.2)


def test_words() -> None:
    rounds, reward = found_findings({ONCE: [0.1, 0.12, 0.11], ROUNDS: [0.3, 0.37, 0.32], REWARDED: [0.1, 0.12, 0.11]})
    assert (rounds.verdict, reward.verdict) == ("more", "equal")
    (unsure, _) = found_findings({ONCE: [0.1, 0.1], ROUNDS: [0.1, 0.15], REWARDED: [0.1, 0.1]})
    assert unsure.verdict == "undecided"
    assert unsure.numbers.endswith("seeds would do")


@pytest.mark.parametrize("override", ["rl.steps=3", "rl.epochs=2", "rejection.rounds=2", "rejection.bar=0.5", "rejection.learning_rate=1"])
def test_what_makes_the_arms_comparable_cannot_be_set(override: str) -> None:
    with pytest.raises(ConfigError, match="the study itself decides"):
        overridden(exploration.SHARED, arms(), Terms(2, 1, (override,)))


def test_the_whole_study_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same seed all play the same problems; in one round every episode is the base's."""
    small = {"REWARD_RATES": (1e-3, 2e-3), "IMITATION_RATES": (1e-3, 2e-3), "STEPS": 4, "GROUPS": 4, "IMITATIONS": 8, "FOUR": 2}
    for name, value in small.items():
        monkeypatch.setattr(exploration, name, value)
    monkeypatch.setattr("veneer.studies.contest._beyond", lambda rates, best: [])  # grids are not widened: test_contest.py does
    here = lab(tmp_path, side_by_side=16)
    terms = Terms(2, 1, ("env.name=sort", "eval.problems=4"))
    result = asyncio.run(conduct(here, terms))
    found = result.document["right_answers"]
    assert {arm: len(shares) for arm, shares in found.items()} == {ONCE: 2, ROUNDS: 2, REWARDED: 2}
    shared = overridden(exploration.SHARED, arms(), terms)
    by_name = {arm.name: arm for arm in arms()}
    rates = {arm["arm"]: arm["learning_rate"] for arm in result.document["arms"]}
    configs = [config_of(shared, by_name[name], rates[name], 0) for name in (ONCE, ROUNDS, REWARDED)]
    runs = asyncio.run(here.run(configs))
    assert [[m["episodes"] for m in run.metrics if "episodes" in m] for run in runs] == [[128], [64, 64], [32] * 4]
    assert [finding.question for finding in result.findings] == [
        f"{ROUNDS} beside {ONCE}, each at its best learning rate",
        f"{REWARDED} beside {ONCE}, each at its best learning rate",
        f"noise floor: {ONCE} on other seeds, compared with itself",
        f"{REWARDED} beside {ROUNDS}, each at its best learning rate",
        f"right answers among the episodes: {ROUNDS} beside {ONCE}",
        f"right answers among the episodes: {REWARDED} beside {ONCE}",
    ]
    json.dumps(result.document)
    result.draw(tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().count("<svg") == 1
