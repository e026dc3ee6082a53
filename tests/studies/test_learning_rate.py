"""The best learning rate between the points of a grid, the power of the rank that it follows, and the words for both."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path

import numpy as np
import pytest
from test_lab import lab, small

from veneer.render import load_renderer
from veneer.studies.contest import Sweep, Terms
from veneer.studies.demonstrations import write_demonstrations
from veneer.studies.lab import Outcome
from veneer.studies.learning_rate import LORA_RATES, RANKS, _power, _ratio, best_rates, conduct, slopes
from veneer.train.sft import load_rows

SEEDS = 3


def sweep(optimum: float, rates: tuple[float, ...] = LORA_RATES, bent: float = 0.1) -> Sweep:
    """Scores that fall as a parabola in the rate's logarithm on both sides of an optimum, a little elsewhere for every seed."""

    def outcome(rate: float, seed: int) -> Outcome:
        score = -bent * math.log2(rate / (optimum * 1.1**seed)) ** 2 - 0.5
        metrics = [{"eval/mean_nll": 3.0}, {"eval/mean_nll": -score}]
        return Outcome(small(kind="sft", seed=seed), Path(), metrics, None, 1.0)

    return Sweep({rate: [outcome(rate, seed) for seed in range(SEEDS)] for rate in rates}, None, False)


@pytest.mark.parametrize("optimum", [1.1e-3, 2e-3, 2.9e-3, 4e-3])
def test_a_parabolas_vertex_is_found_between_the_points(optimum: float) -> None:
    assert best_rates(sweep(optimum)) == pytest.approx([optimum * 1.1**seed for seed in range(SEEDS)])


def test_beyond_the_grid_nothing_is_invented() -> None:
    assert best_rates(sweep(1e-6)) == [LORA_RATES[0]] * SEEDS
    assert best_rates(sweep(10.0)) == [LORA_RATES[-1]] * SEEDS
    assert best_rates(sweep(2e-3, bent=0.0)) == [LORA_RATES[0]] * SEEDS


@pytest.mark.parametrize("power", [0.0, -0.5, 0.3])
def test_powers_are_those_of_a_law(power: float) -> None:
    """Rank 1 is left out: it is said to be an exception."""
    found = slopes({rank: sweep(2e-3 * (rank / 16) ** power if rank > 1 else 1e-4) for rank in RANKS})
    assert found == pytest.approx([power] * SEEDS, abs=1e-6)


def test_words() -> None:
    rng = np.random.default_rng(0)
    assert _power("", list(rng.normal(-0.5, 0.02, 5)), -0.5).verdict == "equal"
    assert _power("", list(rng.normal(0.0, 0.02, 5)), -0.5).verdict == "higher"
    assert _power("", list(rng.normal(-0.9, 0.02, 5)), -0.5).verdict == "lower"
    assert _power("", [0.5, -0.5, 0.1], 0.0).verdict == "undecided"
    ratio = _ratio([math.log2(4)] * 3)
    assert (ratio.verdict, ratio.numbers) == ("lower", "4.0 [4.0, 4.0], margin a factor of 2")


def test_demonstrations_are_right_and_the_base_has_room_for_them(tmp_path: Path) -> None:
    path = write_demonstrations(tmp_path / "data", 50, 0)
    assert path == write_demonstrations(tmp_path / "data", 50, 0)
    assert path != write_demonstrations(tmp_path / "data", 50, 1)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == 50
    for row in rows:
        digits = row["prompt"].removeprefix("sort ")
        assert sorted(row["completion"]) == sorted(digits)
        assert all(a >= b for a, b in zip(row["completion"], row["completion"][1:], strict=False))
    train, held_out = load_rows(path, load_renderer("nano"), 0.2, 256)
    assert len(train) + len(held_out) == 50
    assert len(held_out) > 0


def test_the_whole_study_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut to two ranks, two rates and two steps of two rows: every arm at every rate, and a page."""
    for name, few in (("RANKS", (4, 64)), ("LORA_RATES", (1e-3, 2e-3)), ("FULL_RATES", (1e-4, 2e-4)), ("ROWS", 40)):
        monkeypatch.setattr(f"veneer.studies.learning_rate.{name}", few)
    overrides = ("sft.steps=2", "sft.batch_size=2", "sft.held_out=0.1")
    result = asyncio.run(conduct(lab(tmp_path, side_by_side=16), Terms(2, 1, overrides)))
    assert [finding.question.partition(":")[0] for finding in result.findings] == ["alpha 32", "alpha 2 r", "alpha 32"]
    assert set(result.document["rules"]) == {"alpha 32", "alpha 2 r"}
    assert result.tables.count("\n| alpha") == 4
    result.draw(tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().count("<svg") == 1
