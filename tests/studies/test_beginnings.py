"""How adapters begin, and whether the best rate depends on a run's length: on made-up curves, and on small runs."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from test_lab import lab, never

from veneer.studies import early, horizon
from veneer.studies.contest import Terms
from veneer.studies.early import RANKS, curves_result
from veneer.studies.horizon import best_rates, horizon_result
from veneer.types import ConfigError

STEPS = np.linspace(1.0, 0.8, 11)


def curves(drop: float = 1.0, end: float = 1.0, noise: float = 1e-3, power: float = -0.5) -> dict[int, np.ndarray]:
    """Of twenty starts: all fall alike, but rank 1 by ``drop`` times as much in its first step and to ``end`` times the loss."""
    rng, found = np.random.default_rng(0), dict[int, np.ndarray]()
    for rank in RANKS:
        curve = np.tile(STEPS, (20, 1))
        curve[:, 1] = 1 - 0.02 * (drop if rank == 1 else 1.0) + noise * rank**power * rng.normal(size=20)
        curve[:, -1] *= end if rank == 1 else 1.0
        found[rank] = curve
    return found


def verdicts(curves: dict[int, np.ndarray]) -> dict[str, str]:
    return {finding.question: finding.verdict for finding in curves_result(curves).findings}


def test_equal_beginnings_are_equal_and_others_are_not() -> None:
    same = verdicts(curves())
    assert [same[asked] for asked in same if "first step takes" in asked] == ["equal"] * 3
    assert [same[asked] for asked in same if "held-out loss behind" in asked] == ["equal"] * 3
    other = verdicts(curves(drop=0.5, end=1.05))
    assert [other[asked] for asked in other if "rank 1 beside" in asked] == ["less", "higher"]
    assert [other[asked] for asked in other if "rank 4 beside" in asked] == ["equal", "equal"]


@pytest.mark.parametrize("power", [-0.5, 0.0])
def test_the_scatter_of_starts_is_found(power: float) -> None:
    (finding,) = [f for f in curves_result(curves(power=power)).findings if "scatter" in f.question]
    assert float(finding.verdict) == pytest.approx(power, abs=0.15)


def losses(best: float, seeds: int = 3) -> dict[float, list[float]]:
    rates = [1e-3 * 2**k for k in range(-4, 5)]
    return {rate: [1 + np.log2(rate / best) ** 2 + 0.01 * seed for seed in range(seeds)] for rate in rates}


def test_a_vertex_lies_between_the_points() -> None:
    assert best_rates(losses(1.3e-3)) == pytest.approx([1.3e-3] * 3)


def test_a_ratio_that_falls_and_one_that_stays() -> None:
    falls = horizon_result({"rank 16": {30: losses(3e-3), 480: losses(1e-3)}, "full": {30: losses(2e-4), 480: losses(2e-4)}})
    assert falls.findings[-1].verdict == "larger"
    assert falls.findings[-1].numbers.startswith("3.00 [")
    stays = horizon_result({"rank 16": {30: losses(3e-3), 480: losses(1.5e-3)}, "full": {30: losses(1e-3), 480: losses(5e-4)}})
    assert stays.findings[-1].verdict == "equal"
    edge = horizon_result({"rank 16": {30: losses(1.0), 480: losses(1e-3)}, "full": {30: losses(1e-3), 480: losses(1e-3)}})
    assert "rank 16 at the highest tried" in edge.findings[0].numbers


@pytest.mark.parametrize(("study", "override"), [(early, "lora.rank=3"), (early, "eval.every=5"), (horizon, "eval.every=7")])
def test_what_the_studies_decide_cannot_be_set(study: object, override: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the study itself decides"):
        asyncio.run(study.conduct(lab(tmp_path, never), Terms(2, 1, (override,))))  # type: ignore[attr-defined]


def test_beginnings_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, few in (("RANKS", (1, 16, 64)), ("WIDEST", 64), ("STARTS", 1), ("ROWS", 40)):
        monkeypatch.setattr(early, name, few)
    result = asyncio.run(early.conduct(lab(tmp_path), Terms(2, 1, ("sft.steps=3",))))
    assert len(result.findings) == 5
    assert {len(curve) for found in result.document["curves"].values() for curve in found} == {4}
    result.draw(tmp_path / "a.svg")
    assert "<svg" in (tmp_path / "a.svg").read_text()


def test_lengths_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The short length is read off the long runs."""
    few = {"LENGTHS": (1, 3), "ROWS": 60, "LORA_RATES": (5e-4, 1e-3, 2e-3), "FULL_RATES": (5e-5, 1e-4, 2e-4)}
    for name, value in few.items():
        monkeypatch.setattr(horizon, name, value)
    monkeypatch.setattr(horizon, "SHARED", {**horizon.SHARED, "sft": {**horizon.SHARED["sft"], "steps": 3}, "eval": {"every": 1}})
    result = asyncio.run(horizon.conduct(lab(tmp_path), Terms(2, 1)))
    assert [f.question.split(" after ")[-1] for f in result.findings] == ["1 steps", "3 steps", "3"]
    result.draw(tmp_path / "a.svg")
    assert "<svg" in (tmp_path / "a.svg").read_text()
