"""Equal epochs whatever the batch, and whether a gap grows with it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
from test_lab import lab, never

from veneer.render import load_renderer
from veneer.studies import batch, batch_rl
from veneer.studies.batch import HELD_OUT, ROWS
from veneer.studies.batch_rl import EPISODES
from veneer.studies.batches import trends
from veneer.studies.budget import Reached
from veneer.studies.catalogue import find_study
from veneer.studies.contest import Terms
from veneer.studies.demonstrations import write_demonstrations
from veneer.train.config import make_config
from veneer.train.sft import load_rows
from veneer.types import ConfigError


def test_all_batches_read_as_much(tmp_path: Path) -> None:
    rows = {size: {arm.settings["sft"]["steps"] * size for arm in batch.SIZES.arms(size)} for size in batch.SIZES.batches}
    assert len(set.union(*rows.values())) == 1
    train, _ = load_rows(write_demonstrations(tmp_path, ROWS, 0), load_renderer("nano"), HELD_OUT, 256)
    assert rows[8].pop() == pytest.approx(6 * len(train), rel=0.05)
    for size in batch_rl.SIZES.batches:
        for arm in batch_rl.SIZES.arms(size):
            rl = make_config({**batch_rl.SHARED, **arm.settings}).rl
            assert rl.groups_per_batch * rl.group_size == size
            assert rl.steps * size == EPISODES


def test_a_coarse_grid_has_the_outermost_batches_and_says_so() -> None:
    assert batch.SIZES.asked(Terms(2, 1, coarse=True)) == (8, 128)
    assert batch.SIZES.asked(Terms(2, 1)) == (8, 32, 128)
    small = Reached(find_study("batch"), Terms(5, 2, coarse=True))
    assert small.shrunk(Terms(5, 2)) == "every second learning rate, the outermost batches"
    same = replace(small, study=find_study("batch_rl"))
    assert same.shrunk(Terms(5, 2)) == "every second learning rate"


@pytest.mark.parametrize(
    ("study", "override"),
    [
        *((batch, override) for override in ("sft.steps=3", "sft.batch_size=2", "sft.held_out=0", "lora.rank=3")),
        *((batch_rl, override) for override in ("rl.group_size=4", "rl.epochs=2", "rl.refill=1", "lora.rank=3")),
    ],
)
def test_what_makes_batches_comparable_cannot_be_set(study: ModuleType, override: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the study itself decides"):
        asyncio.run(study.conduct(lab(tmp_path, never), Terms(2, 1, (override,))))


def contest(full: list[float], thin: list[float], choice: float = 0.0) -> SimpleNamespace:
    judged = {"full": None, "rank 8": SimpleNamespace(choice=choice)}
    scores = {"full": full, "rank 8": thin}
    entrants = [SimpleNamespace(arm=SimpleNamespace(name=name), scores=scores[name], comparison=judged[name]) for name in judged]
    return SimpleNamespace(entrants=entrants, reference=entrants[0])


@pytest.mark.parametrize(
    ("lacking", "word"),
    [([0.2, 0.21, 0.19], "grows"), ([0.0, 0.001, -0.001], "equal"), ([-0.2, -0.21, -0.19], "shrinks"), ([0.1, -0.2, 0.1], "undecided")],
)
def test_words_for_a_trend(lacking: list[float], word: str) -> None:
    seeds = [-0.5, -0.6, -0.7]
    small, large = contest(seeds, seeds), contest(seeds, [score - more for score, more in zip(seeds, lacking, strict=True)])
    (finding,) = trends(batch.SIZES, cast("Any", {8: small, 128: large}))
    assert finding.verdict == word


def test_a_trend_that_another_choice_of_rates_might_have_made_is_none() -> None:
    seeds = [-0.5, -0.6, -0.7]
    small, large = contest(seeds, seeds, 0.03), contest(seeds, [score - 0.2 for score in seeds], 0.04)
    (finding,) = trends(batch.SIZES, cast("Any", {8: small, 128: large}))
    assert finding.verdict == "undecided"
    assert "choice of rates +-0.05" in finding.numbers


@pytest.mark.parametrize(
    ("study", "batches", "changed", "overrides"),
    [
        (batch, (8, 32), {"ROWS": 40, "EPOCHS": 1}, ()),
        (batch_rl, (8, 16), {"EPISODES": 16}, ("rl.max_tokens=8", "eval.problems=2")),
    ],
)
def test_the_whole_study_runs(
    study: ModuleType,
    batches: tuple[int, int],
    changed: dict[str, int],
    overrides: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Cut to two sizes and two rates, to forty rows that are read once or to sixteen episodes."""
    few = replace(study.SIZES, batches=batches, ranks=(4,), lora_rates=(1e-3, 2e-3), full_rates=(1e-4, 2e-4))
    for name, value in {**changed, "SIZES": few}.items():
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr("veneer.studies.contest._beyond", lambda rates, best: [])  # grids are not widened: test_contest.py does
    result = asyncio.run(study.conduct(lab(tmp_path, side_by_side=16), Terms(2, 1, overrides)))
    named = [few.named(size) for size in batches]
    assert [f.question.partition(":")[0] for f in result.findings] == ["rank 4", *[named[0]] * 2, *[named[1]] * 2]
    assert f"| {named[1]} | " in result.tables
    result.draw(tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().count("<svg") == 1
