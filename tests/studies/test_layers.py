"""Arms of as many parameters as each other, on any base; and a study in two ways."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from test_lab import lab

from veneer.studies.contest import Terms, terms_for
from veneer.studies.layers import NANO_RANKS, SHARED, arms, conduct, matched, parameters
from veneer.types import ConfigError


def test_arms_have_as_many_parameters_as_each_other(tmp_path: Path) -> None:
    """By the engine's own count: no other rank of an arm is nearer to all layers at rank 5, and none is far from it."""
    counts = parameters(lab(tmp_path), SHARED)
    assert matched(counts) == NANO_RANKS
    wanted = 5 * counts["all"]
    for name, rank in NANO_RANKS.items():
        off = [abs(other * counts[name] - wanted) for other in (rank - 1, rank, rank + 1)]
        assert min(off) == off[1]
        assert off[1] <= 0.07 * wanted
    assert counts["all"] == counts["MLP"] + counts["attention"]
    heads = {counts[f"{name} and head"] - counts[name] for name in ("all", "MLP", "attention")}
    assert heads == {128 + 576}  # hidden size and vocabulary
    assert {arm.settings["lora"]["rank"] for arm in arms()} == set(NANO_RANKS.values())


def test_an_arm_too_large_for_any_rank_keeps_rank_one() -> None:
    assert matched({"all": 100, "MLP": 5000}) == {"all": 5, "MLP": 1}


def test_each_way_has_its_own_overrides() -> None:
    terms = Terms(3, 2, ("rl.steps=1", "sft.steps=2", "base=nano"))
    assert terms_for(terms, "rl") == Terms(3, 2, ("rl.steps=1", "base=nano"))
    assert terms_for(terms, "sft") == Terms(3, 2, ("sft.steps=2", "base=nano"))


def test_what_is_wrong_in_the_second_way_is_said_before_the_first_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sft\.stebs"):
        asyncio.run(conduct(lab(tmp_path), Terms(2, 1, ("sft.stebs=1",))))
    assert not (tmp_path / "runs").exists()


def test_the_whole_study_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut to two rates and a step of four episodes or two rows: both ways, every arm, a page and a picture."""
    for name, few in (("RATES", (1e-3, 2e-3)), ("ROWS", 40)):
        monkeypatch.setattr(f"veneer.studies.layers.{name}", few)
    rl = ("rl.steps=1", "rl.groups_per_batch=2", "rl.group_size=2", "rl.max_tokens=4", "eval.problems=2")
    sft = ("sft.steps=1", "sft.batch_size=2", "sft.held_out=0.1")
    result = asyncio.run(conduct(lab(tmp_path, side_by_side=16), Terms(2, 1, rl + sft)))
    assert len(result.findings) == 2 * 6
    assert [f.question.partition(":")[0] for f in result.findings] == ["by reward"] * 6 + ["by demonstrations"] * 6
    ways = json.loads(json.dumps(result.document))["ways"]
    assert [len(part["arms"]) for part in ways.values()] == [6, 6]
    assert "| attention | 16 | 57,344 |" in result.tables
    assert "## By demonstrations\n\n| arm |" in result.tables
    result.draw(tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().count("<svg") == 1
