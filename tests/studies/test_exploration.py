"""Sampling anew beside imitating what the base sampled once."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from test_lab import lab

from veneer.studies import exploration
from veneer.studies.contest import Terms, config_of
from veneer.studies.exploration import ONCE, REWARDED, ROUNDS, Reach, arms, conduct, reach, reach_findings, sort_problems
from veneer.types import ConfigError


def test_all_arms_play_as_many_episodes_and_train_on_as_many_rows() -> None:
    played, trained = set(), set()
    for arm in arms():
        config = config_of(exploration.SHARED, arm, 1e-3, 0)
        if config.kind == "rl":
            played.add(config.rl.steps * config.rl.groups_per_batch * config.rl.group_size)
            trained |= played
        else:
            played.add(config.rejection.rounds * config.rejection.problems * config.rejection.group_size)
            trained.add(config.total_steps * config.rejection.batch_size)
    assert played == trained == {2560}


def test_problems_are_sorted_by_what_the_base_solves() -> None:
    def tries(right: int) -> list[bool]:
        return [True] * right + [False] * (64 - right)

    strata = sort_problems([tries(0), tries(64), tries(4), tries(5), tries(1), tries(0)])
    assert strata == {"never": [0, 5], "seldom": [2, 4], "more often": [1, 3]}
    solved = [[True, False], [False] * 2, [True] * 2, [True] * 2, [False] * 2, [False] * 2]
    assert reach(solved, strata).solved == {"never": 0.25, "seldom": 0.5, "more often": 0.5}
    assert reach(solved, {"never": [], "seldom": [0]}).solved == {"never": 0.0, "seldom": 0.5}


def test_words() -> None:
    """The base's own luck on problems that it happened to miss is not counted as a find."""
    strata = {"never": list(range(8))}
    base = Reach({"never": 0.02})
    found = {
        REWARDED: [Reach({"never": share}) for share in (0.3, 0.32, 0.31)],
        ONCE: [Reach({"never": share}) for share in (0.02, 0.03, 0.01)],
        ROUNDS: [Reach({"never": share}) for share in (0.3, 0.31, 0.32)],
    }
    beside_base, beside_reward = reach_findings(strata, base, found)[:3], reach_findings(strata, base, found)[3:]
    assert [finding.verdict for finding in beside_base] == ["better", "equal", "better"]
    assert [finding.verdict for finding in beside_reward] == ["worse", "equal"]
    (few,) = reach_findings({"never": [1, 2]}, base, found)
    assert few.verdict == "untested"


def test_what_makes_the_arms_equal_cannot_be_set() -> None:
    for override in ("rl.steps=3", "rejection.rounds=2", "rl.max_tokens=8"):
        with pytest.raises(ConfigError, match="the study itself decides"):
            exploration.overridden(exploration.SHARED, arms(), Terms(2, 1, (override,)))


def test_the_whole_study_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LORA_RATES": (1e-3, 2e-3), "IMITATION_RATES": (1e-3, 2e-3), "STEPS": 4, "GROUPS": 4, "PROBLEMS": 8}.items():
        monkeypatch.setattr(exploration, name, value)
    for name, value in {"SORTED": 4, "ANEW": 2, "AFTER": 2}.items():
        monkeypatch.setattr(exploration, name, value)
    monkeypatch.setattr(exploration, "STRATA", {"never": (0, 0), "seldom": (1, 2), "more often": (3, 4)})
    monkeypatch.setattr("veneer.studies.contest._beyond", lambda rates, best: [])  # grids are not widened: test_contest.py does
    small = ("env.name=sort", "env.args={}", "eval.problems=4")
    result = asyncio.run(conduct(lab(tmp_path, side_by_side=16), Terms(2, 1, small)))
    assert sum(result.document["strata"].values()) == 8
    assert {arm: len(solved) for arm, solved in result.document["solved"].items()} == {REWARDED: 2, ONCE: 2, ROUNDS: 2}
    assert [finding.question for finding in result.findings][:2] == [
        f"{arm} beside {REWARDED}, each at its best learning rate" for arm in (ONCE, ROUNDS)
    ]
    json.dumps(result.document)
    result.draw(tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().count("<svg") == 1
