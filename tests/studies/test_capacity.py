"""Bits stored against closed forms, and where an adapter falls behind."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_lab import lab, never

from veneer.measure.verdict import compare_seeds
from veneer.studies import capacity
from veneer.studies.capacity import FACT_BITS, Memories, Memory, _last_quarter, arms, capacity_findings, conduct, write_facts
from veneer.studies.contest import Terms, config_of
from veneer.train.config import make_config
from veneer.types import ConfigError


def test_facts_are_random_and_each_seeds_own(tmp_path: Path) -> None:
    path = write_facts(tmp_path, 50, 0)
    assert path == write_facts(tmp_path, 50, 0) != write_facts(tmp_path, 50, 1)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == 50
    digits = "".join(row["completion"] for row in rows)
    assert len(digits) == 16 * 50
    assert all(40 < digits.count(digit) < 120 for digit in "0123456789")


def test_the_course_of_a_loss() -> None:
    assert _last_quarter([1.0] * 80) == 0.0
    assert _last_quarter([0.6931471805599453] * 60 + [0.0] * 20) == pytest.approx(1.0)


def memory(stored: float, facts: int, diverged: str | None = None) -> Memory:
    return Memory(make_config({}), facts, facts * FACT_BITS - stored, facts * FACT_BITS * 1.5, 0.0, diverged)


def test_scores() -> None:
    assert memory(16 * FACT_BITS, 16).score == 1.0
    assert memory(0.0, 16).score == 0.0
    assert memory(100.0, 16).score_before == -0.5
    assert memory(-1e9, 16, "gone").score == 0.0


def contest(facts: int, thin: float) -> Any:
    """Full fine-tuning stores all, the adapter this share."""

    def entrant(name: str, share: float, reference: bool) -> SimpleNamespace:
        found = [memory(share * facts * FACT_BITS * (1 - 1e-4 * i), facts) for i in range(3)]
        comparison = None if reference else compare_seeds([m.score for m in found], [1.0, 0.9999, 0.9998], 0.05)
        return SimpleNamespace(arm=SimpleNamespace(name=name), outcomes=found, comparison=comparison)

    return SimpleNamespace(entrants=[entrant("full", 1.0, True), entrant("rank 1", thin, False)])


@pytest.mark.parametrize(
    ("few", "many", "words"), [(1.0, 0.5, ("holds", "1 of 1")), (1.0, 1.0, ("holds", "0 of 1")), (0.5, 0.5, ("broken", "1 of 1"))]
)
def test_words(few: float, many: float, words: tuple[str, str]) -> None:
    """1,000 parameters: 16 facts have 850 bits, 64 have 3,402."""
    parameters = {"full": 1_000_000, "rank 1": 1000}
    room, behind, most = capacity_findings({16: contest(16, few), 64: contest(64, many)}, parameters)
    assert (room.verdict, behind.verdict) == words
    assert float(most.verdict) == pytest.approx(max(few * 16, many * 64) * FACT_BITS / 1000, rel=0.01)


def test_what_is_stored_is_what_the_answers_no_longer_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base knows nothing; a run that reads two facts often knows them, and never more than there is to know."""
    monkeypatch.setattr(capacity, "STEPS", {2: 80})
    shared = {**capacity.SHARED, "sft": {**capacity.SHARED["sft"], "batch_size": 2}}
    config = config_of(shared, arms(2)[3], 4e-3, seed=0)
    (found,) = asyncio.run(Memories(lab(tmp_path), 2).run([config]))
    assert found.score_before < 0.1
    assert 0.9 < found.score <= 1.0
    (again,) = asyncio.run(Memories(lab(tmp_path, never), 2).run([config]))
    assert again == found


@pytest.mark.parametrize("override", ["lora.rank=3", "sft.steps=7", "sft.held_out=0.5"])
def test_what_the_study_decides_cannot_be_set(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="the study itself decides"):
        asyncio.run(conduct(lab(tmp_path, never), Terms(2, 1, (override,))))


def test_the_whole_study_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veneer.studies.contest._beyond", lambda rates, best: [])  # grids are not widened: test_contest.py does
    few = {"STEPS": {2: 4}, "LORA_RATES": (1e-3, 2e-3), "FULL_RATES": (1e-4, 2e-4)}
    for name, value in few.items():
        monkeypatch.setattr(capacity, name, value)
    result = asyncio.run(conduct(lab(tmp_path, side_by_side=16), Terms(2, 1)))
    assert result.document["parameters"]["rank 1"] == 11_264
    assert result.document["parameters"]["rank 1 of down_proj"] < 4_000
    assert len(result.findings) == 3 + 4
    result.draw(tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().count("<svg") == 1
