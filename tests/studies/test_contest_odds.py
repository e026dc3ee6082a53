"""How often a whole contest errs, its choice of learning rates included: many contests of made-up runs whose truth is known."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from veneer.studies import contest
from veneer.studies.contest import Arm, Terms, hold_contest

RATES = tuple(3.75e-4 * 2**k for k in range(5))
MARGIN = 0.03
"""Of most studies of rewards."""
SCATTER, SHARED = 0.015, 0.01
"""Standard deviations of a run's score: its own, and that of its seed, which all arms share. Published runs have about these."""
CONTESTS = 600
SLACK = 2 * math.sqrt(0.05 * 0.95 / CONTESTS)
"""Two standard errors of a share of 5%."""


@dataclass
class Made:
    """Runs whose scores fall off to both sides of an arm's best rate, as swept ones do."""

    rng: np.random.Generator
    worth: dict[str, float]
    """What an arm reaches at its best rate."""
    best: float

    async def run(self, configs: Sequence[Any]) -> list[Any]:
        seeds: dict[int, float] = {}
        found = []
        for config in configs:
            luck = seeds.setdefault(config.seed, self.rng.normal(0.0, SHARED))
            fall = 0.03 * math.log2(config.rate / self.best) ** 2
            score = self.worth[config.arm] - fall + luck + self.rng.normal(0.0, SCATTER)
            found.append(SimpleNamespace(config=config, score=score, score_before=0.2, diverged=None))
        return found


def verdicts(monkeypatch: pytest.MonkeyPatch, terms: Terms, behind: float) -> Counter[str]:
    """Of an arm that reaches ``behind`` less than the reference, over many contests; and how often the noise floor is off."""
    monkeypatch.setattr(contest, "overridden", lambda shared, arms, terms: shared)
    monkeypatch.setattr(contest, "config_of", lambda shared, arm, rate, seed: SimpleNamespace(arm=arm.name, rate=rate, seed=seed))
    rng = np.random.default_rng(0)
    arms = [Arm("reference", {}, RATES), Arm("other", {}, RATES)]
    found: Counter[str] = Counter()
    for _ in range(CONTESTS):
        made = Made(rng, {"reference": 0.85, "other": 0.85 - behind}, 1.5e-3 * 2 ** rng.uniform(-1, 1))
        held = asyncio.run(hold_contest(made, {}, arms, MARGIN, terms))
        told = held.entrants[1].comparison
        assert told is not None
        found[told.verdict] += 1
        found["noise is off"] += held.noise.verdict not in ("equal", "undecided")
    return found


SIZES = [Terms(2, 1, coarse=True), Terms(3, 1), Terms(5, 1), Terms(5, 2)]
"""From the smallest that a budget makes to what is made unless something else is asked for."""


def told_apart(found: Counter[str]) -> float:
    return (found["better"] + found["worse"]) / CONTESTS


@pytest.mark.parametrize("terms", SIZES, ids=str)
def test_equal_arms_are_told_apart_in_5_contests_of_100_at_most(monkeypatch: pytest.MonkeyPatch, terms: Terms) -> None:
    found = verdicts(monkeypatch, terms, 0.0)
    assert told_apart(found) <= 0.05 + SLACK
    assert found["noise is off"] / CONTESTS <= 0.05 + SLACK


def test_it_is_the_choice_of_rates_that_has_to_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its error the promise would be broken."""
    monkeypatch.setattr(contest.Sweep, "choice_error", lambda self, deviation: 0.0)
    assert told_apart(verdicts(monkeypatch, Terms(5, 1), 0.0)) > 0.05 + SLACK


@pytest.mark.parametrize(("terms", "least"), [(Terms(3, 1), 0.75), (Terms(5, 2), 0.98)], ids=str)
def test_a_crippled_arm_is_worse(monkeypatch: pytest.MonkeyPatch, terms: Terms, least: float) -> None:
    """By a tenth, where runs scatter by a hundredth or two."""
    found = verdicts(monkeypatch, terms, 0.1)
    assert found["worse"] / CONTESTS >= least
    assert not found["equal"]
    assert not found["better"]


@pytest.mark.parametrize("terms", SIZES, ids=str)
def test_arms_that_differ_by_the_margin_are_called_equal_in_5_of_100_at_most(monkeypatch: pytest.MonkeyPatch, terms: Terms) -> None:
    assert verdicts(monkeypatch, terms, MARGIN)["equal"] / CONTESTS <= 0.05 + SLACK
