"""Equal epochs whatever the batch, and whether a gap grows with it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from test_lab import lab, never

from veneer.render import load_renderer
from veneer.studies import batch
from veneer.studies.batch import EPISODES, HELD_OUT, ROWS, WAYS, _trends, arms, conduct
from veneer.studies.contest import Terms
from veneer.studies.demonstrations import write_demonstrations
from veneer.train.config import make_config
from veneer.train.sft import load_rows
from veneer.types import ConfigError


def test_all_batches_read_as_much(tmp_path: Path) -> None:
    shown, rewarded = WAYS
    rows = {size: {arm.settings["sft"]["steps"] * size for arm in arms(shown, size)} for size in shown.batches}
    assert len(set.union(*rows.values())) == 1
    train, _ = load_rows(write_demonstrations(tmp_path, ROWS, 0), load_renderer("nano"), HELD_OUT, 256)
    assert rows[8].pop() == pytest.approx(6 * len(train), rel=0.05)
    for size in rewarded.batches:
        for arm in arms(rewarded, size):
            assert len(arm.rates) >= 5
            rl = make_config({**batch.REWARDED, **arm.settings}).rl
            assert rl.groups_per_batch * rl.group_size == size
            assert rl.steps * size == EPISODES


@pytest.mark.parametrize(
    "override", ["sft.steps=3", "sft.batch_size=2", "lora.rank=3", "rl.group_size=4", "rl.epochs=2", "rl.refill=1", "sft.held_out=0"]
)
def test_what_makes_batches_comparable_cannot_be_set(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="the study itself decides"):
        asyncio.run(conduct(lab(tmp_path, never), Terms(2, 1, (override,))))


def contest(full: list[float], thin: list[float]) -> SimpleNamespace:
    entrants = [SimpleNamespace(arm=SimpleNamespace(name=name), scores=scores) for name, scores in (("full", full), ("rank 8", thin))]
    return SimpleNamespace(entrants=entrants, reference=entrants[0])


@pytest.mark.parametrize(
    ("lacking", "word"),
    [([0.2, 0.21, 0.19], "grows"), ([0.0, 0.001, -0.001], "equal"), ([-0.2, -0.21, -0.19], "shrinks"), ([0.1, -0.2, 0.1], "undecided")],
)
def test_words_for_a_trend(lacking: list[float], word: str) -> None:
    seeds = [-0.5, -0.6, -0.7]
    small, large = contest(seeds, seeds), contest(seeds, [score - more for score, more in zip(seeds, lacking, strict=True)])
    (finding,) = _trends(WAYS[0], cast("Any", {8: small, 128: large}))
    assert finding.verdict == word


def test_the_whole_study_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut to two sizes, two rates, forty rows that are read once and sixteen episodes."""
    few = {"ranks": (4,), "lora_rates": (1e-3, 2e-3), "full_rates": (1e-4, 2e-4)}
    shown, rewarded = WAYS
    monkeypatch.setattr(batch, "WAYS", (replace(shown, batches=(8, 32), **few), replace(rewarded, batches=(8, 16), **few)))
    for name, value in {"ROWS": 40, "EPOCHS": 1, "EPISODES": 16}.items():
        monkeypatch.setattr(batch, name, value)
    monkeypatch.setattr("veneer.studies.contest._beyond", lambda rates, best: [])  # grids are not widened: test_contest.py does
    small = ("rl.max_tokens=8", "eval.problems=2")
    result = asyncio.run(conduct(lab(tmp_path, side_by_side=16), Terms(2, 1, small)))
    batches = ["batches of 8 demonstrations", "batches of 32 demonstrations", "batches of 8 episodes", "batches of 16 episodes"]
    assert [f.question.partition(":")[0] for f in result.findings] == ["rank 4"] * 2 + [name for name in batches for _ in range(2)]
    assert "| batches of 16 episodes | rank 4 | " in result.tables
    result.draw(tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().count("<svg") == 1
