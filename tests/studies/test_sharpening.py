"""Runs that are looked at afterwards: pass@k of base and trained policy, and the law of reward and entropy."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_lab import lab, never

from veneer.studies import crossover, entropy, habits
from veneer.studies.contest import Terms
from veneer.studies.crossover import _crossing
from veneer.studies.entropy import OVER, curve_of, entropy_result, fit, smooth
from veneer.train.config import ScorecardSettings
from veneer.types import ConfigError, RunError

SMALL = ("rl.steps=13", "rl.groups_per_batch=2", "rl.group_size=2", "rl.max_tokens=6", "eval.problems=2", "env.args.min_terms=2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def test_the_studies_run_and_nothing_is_played_twice(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seeds of thirteen small steps, tried four times: pages, pictures, and nothing is made or played twice."""
    monkeypatch.setattr(crossover, "SCORECARD", ScorecardSettings(problems=3, tries=4, envs=("sort",), elsewhere=2))
    terms = Terms(2, 1, SMALL)
    found = asyncio.run(crossover.conduct(lab(runs), terms))
    assert [f.question.partition(":")[0] for f in found.findings[:2]] == ["pass@1", "pass@2"]
    assert {"reward in sort: trained beside base", "bits of the answers to a problem: trained beside base"} <= {
        f.question for f in found.findings
    }
    assert len(json.loads(json.dumps(found.document))["scorecards"]) == 2
    assert "- 1: " in found.tables
    again = asyncio.run(crossover.conduct(lab(runs, never), terms))
    assert (again.findings, again.tables) == (found.findings, found.tables)
    monkeypatch.setattr(habits, "PROBLEMS", 3)
    seen = asyncio.run(habits.conduct(lab(runs), terms))
    assert [one["base"]["episodes"] for one in seen.document["seeds"]] == [12, 12]
    with pytest.raises(RunError, match=r"the run of seed 0 ended after \d+ steps; .*, and a law takes 12"):
        asyncio.run(entropy.conduct(lab(runs, never), terms))  # four tokens solve nothing
    patient = Terms(2, 1, (*SMALL, "rl.max_useless_steps=13"))
    law = asyncio.run(entropy.conduct(lab(runs), patient))
    assert len(law.document["runs"]) == 2
    assert law.tables.count("\n| ") == 2
    for name, result in (("crossover", found), ("entropy", law), ("habits", seen)):
        result.draw(runs / f"{name}.svg")
        assert (runs / f"{name}.svg").read_text().count("<svg") == 1


def test_a_run_too_short_for_a_law_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rl\.steps.*12"):
        asyncio.run(entropy.conduct(lab(tmp_path, never), Terms(2, 1, ("rl.steps=5",))))


@pytest.mark.parametrize(
    ("crossovers", "where"),
    [([8, 16, None, 8, 32], "k = 16"), ([None, None, 4, None, 8], "none up to 64"), ([None] * 3, "none up to 64"), ([2, 4], "k = 4")],
)
def test_where_curves_cross(crossovers: list[int | None], where: str) -> None:
    found = _crossing(crossovers, 64)
    assert found.verdict == where
    assert f"in {sum(k is not None for k in crossovers)} of {len(crossovers)} seeds" in found.numbers


# ---------------------------------------------------------------- the law


def test_a_law_is_found_again() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.uniform(0.1, 1.0), rng.uniform(0.5, 1.5)
        h = np.sort(rng.uniform(0.02, 0.9, 40))[::-1]
        law = fit(h, b - a * np.exp(h))
        assert (law.a, law.b, law.r2) == pytest.approx((a, b, 1.0))
        assert law(h) == pytest.approx(b - a * np.exp(h))
        noisy = fit(h, b - a * np.exp(h) + rng.normal(0, 10, 40))
        assert noisy.r2 < 0.5


def test_what_has_no_law_is_refused() -> None:
    with pytest.raises(ValueError, match="three"):
        fit(np.array([1.0, 2.0]), np.array([1.0, 2.0]))
    with pytest.raises(ValueError, match="over 0 nats"):
        fit(np.full(5, 0.3), np.arange(5.0))


def steps(rewards: list[float], entropies: list[float]) -> list[dict[str, Any]]:
    rows = [{"step": i + 1, "reward/total": r, "optim/entropy": h} for i, (r, h) in enumerate(zip(rewards, entropies, strict=True))]
    return [{"step": 0}, *rows]


def test_the_first_half_foretells_a_lawful_end() -> None:
    """And it does not where the law changes on the way."""
    h = np.linspace(0.8, 0.1, 60)
    lawful = curve_of(steps(list(1.2 - 0.4 * np.exp(h)), list(h)))
    assert lawful.whole.r2 == pytest.approx(1.0, abs=1e-3)  # smoothed, a curve is nearly its own law
    assert lawful.foretold == pytest.approx(lawful.end, abs=2e-3)
    broken = curve_of(steps([*(1.2 - 0.4 * np.exp(h[:30])), *([0.5] * 30)], list(h)))
    assert abs(broken.foretold - broken.end) > 0.1
    assert len(smooth([0.0] * 60)) == 60 - OVER + 1
    assert math.isclose(smooth([0.0, 0.0, 0.0, 0.0, 5.0])[0], 1.0)


def test_a_seed_without_a_law_is_named_and_costs_the_others_nothing() -> None:
    h = np.linspace(0.8, 0.1, 60)
    curve = curve_of(steps(list(1.2 - 0.4 * np.exp(h)), list(h)))
    result = entropy_result({0: curve, 2: curve}, ["the run of seed 1 ended after 9 steps"])
    assert result.findings[0].verdict == "yes"
    assert "- without a law: the run of seed 1 ended after 9 steps" in result.tables
    assert [line.split(" | ")[0] for line in result.tables.splitlines() if line.startswith(("| 0", "| 2"))] == ["| 0", "| 2"]
    assert result.document["ended"] == ["the run of seed 1 ended after 9 steps"]
