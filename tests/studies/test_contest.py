"""Arms compared: the same is equal, a crippled one is worse, and what the numbers do not carry is not said. All runs are real."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from test_lab import Counted, lab, never

from veneer.studies.contest import AGAIN, CHOICE, Arm, Contest, Terms, hold_contest
from veneer.studies.contest_page import contest_result
from veneer.types import ConfigError

pytestmark = pytest.mark.xdist_group("contest")  # its runs are made once
RATES = (1e-3, 3e-3, 9e-3)
TERMS = Terms(seeds=4, choice_seeds=1)
ARMS = [
    Arm("rank 1", {"lora": {"rank": 1}}, RATES),
    Arm("rank 4", {"lora": {"rank": 4}}, RATES),
    Arm("crippled", {"lora": {"rank": 1}}, (1e-7, 3e-7, 9e-7)),
    Arm("wild", {"lora": {"rank": 1}}, (1e28, 1e30, 1e32)),
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """Demonstrations of a task that the base has never seen: the digits from above."""
    data = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rng = random.Random(0)
    problems = sorted({"".join(rng.choices("123456789", k=rng.randint(4, 6))) for _ in range(200)})
    rows = [{"prompt": f"sort {digits}", "completion": "".join(sorted(digits, reverse=True))} for digits in problems]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"kind": "sft", "sft": {"data": str(data), "steps": 8, "batch_size": 8, "held_out": 0.3}, "eval": {"every": 8}}


@pytest.fixture(scope="module")
def home_of_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("contest")


@pytest.fixture(scope="module")
def contest(shared: Mapping[str, Any], home_of_runs: Path) -> Contest:
    return asyncio.run(hold_contest(lab(home_of_runs), shared, ARMS, 0.2, TERMS))


def test_the_same_is_equal(contest: Contest) -> None:
    """On other seeds, and with another rank where so little is asked of it."""
    assert contest.noise.verdict == "equal"
    assert contest.noise.difference.value != 0
    assert contest.entrants[1].comparison is not None
    assert contest.entrants[1].comparison.verdict == "equal"


def test_a_crippled_arm_is_worse_and_its_grid_is_blamed(contest: Contest) -> None:
    crippled = contest.entrants[2]
    assert crippled.comparison is not None
    assert crippled.comparison.verdict == "worse"
    assert crippled.sweep.edge == "highest"
    assert crippled.sweep.widened
    assert list(crippled.sweep.tried) == pytest.approx([1e-7, 3e-7, 9e-7, 2.7e-6, 8.1e-6])


def test_an_arm_that_always_diverges_stays_in(contest: Contest) -> None:
    """As what it is worth: nothing gained."""
    wild = contest.entrants[3]
    assert all(outcome.diverged for outcome in wild.outcomes)
    assert wild.scores == [outcome.score_before for outcome in wild.outcomes]
    assert wild.comparison is not None
    assert wild.comparison.verdict == "worse"
    page = contest_result(contest, "{arm}").tables
    assert page.count("- diverged: wild, seed") == TERMS.seeds
    assert "1e+28 " in page
    assert " d" in page


def test_rates_are_chosen_on_seeds_of_their_own(contest: Contest) -> None:
    for entrant in contest.entrants:
        assert [outcome.config.seed for outcome in entrant.outcomes] == list(range(TERMS.seeds))
        assert {o.config.sft.learning_rate for o in entrant.outcomes} == {entrant.sweep.best}
        chosen = {outcome.config.seed for outcomes in entrant.sweep.tried.values() for outcome in outcomes}
        assert chosen == {CHOICE}
        means = entrant.sweep.means
        assert means[entrant.sweep.best] == max(means.values())
    assert TERMS.seeds < AGAIN - CHOICE


def test_all_arms_read_the_same(contest: Contest) -> None:
    """Equal steps and equal tokens, step by step and seed by seed."""
    tokens = [[m["tokens"] for m in outcome.metrics[1:]] for outcome in contest.reference.outcomes]
    assert len({tuple(seed) for seed in tokens}) == TERMS.seeds
    for entrant in contest.entrants[1:3]:
        assert [[m["tokens"] for m in outcome.metrics[1:]] for outcome in entrant.outcomes] == tokens


def test_more_seeds_make_new_runs_alone(contest: Contest, shared: Mapping[str, Any], home_of_runs: Path) -> None:
    told: list[int] = []
    more = lab(home_of_runs, Counted(), told=lambda outcome, done, of: told.append(outcome.config.seed))
    two = ARMS[:2]
    again = asyncio.run(hold_contest(lab(home_of_runs, never), shared, two, 0.2, TERMS))
    assert again.entrants[1] == contest.entrants[1]
    asyncio.run(hold_contest(more, shared, two, 0.2, Terms(5, 1)))
    assert again.reference.sweep.best == contest.reference.sweep.best
    assert set(told) == {CHOICE, *range(5), *range(AGAIN, AGAIN + 5)}


def test_a_comparison_without_power_says_how_many_seeds_would_do(shared: Mapping[str, Any], home_of_runs: Path, contest: Contest) -> None:
    strict = asyncio.run(hold_contest(lab(home_of_runs, never), shared, ARMS[:2], 1e-4, Terms(2, 1)))
    assert strict.noise.verdict == "undecided"
    result = contest_result(strict, "{arm} beside {reference}")
    undecided = [finding for finding in result.findings if finding.verdict == "undecided"]
    assert undecided
    assert all("seeds would do" in finding.numbers for finding in undecided)


def test_a_wrong_setting_names_itself(tmp_path: Path, shared: Mapping[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"lora\.rang"):
        asyncio.run(hold_contest(lab(tmp_path, never), shared, [Arm("a", {"lora": {"rang": 1}}, RATES)], 0.1, TERMS))


def test_the_page_has_every_number(contest: Contest, tmp_path: Path) -> None:
    result = contest_result(contest, "{arm} beside {reference}")
    assert [finding.question for finding in result.findings] == [
        "rank 4 beside rank 1",
        "crippled beside rank 1",
        "wild beside rank 1",
        "noise floor: rank 1 on other seeds, compared with itself",
    ]
    assert json.loads(json.dumps(result.document))["arms"][2]["edge"] == "highest"
    for entrant in contest.entrants:
        assert f"| {entrant.arm.name} | {entrant.sweep.best:.3g}" in result.tables
    assert "(highest tried)" in result.tables
    result.draw(tmp_path / "a.svg")
    result.draw(tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.svg").read_text().count("<svg") == 1
