"""Useful groups: the laws against scipy and simulation, and the study on the real base."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from test_lab import Counted, lab, never

from veneer.studies import groups
from veneer.studies.contest import Terms
from veneer.studies.groups import HALF, PROBLEMS, SIZES, conduct, judge, size_for, spread_of, useful, useful_of_beta
from veneer.train.session import Interrupted
from veneer.types import ConfigError, RunError

chances = st.integers(0, 1000).map(lambda n: n / 1000)


@given(chances, st.integers(1, 12))
def test_the_law_is_the_binomial_distributions(p: float, size: int) -> None:
    assert useful(p, size) == pytest.approx(1 - stats.binom.pmf(0, size, p) - stats.binom.pmf(size, size, p), abs=1e-9)


@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99), st.integers(1, 64))
@settings(max_examples=100, deadline=None)
def test_the_law_of_mean_and_spread_is_the_beta_binomial_distributions(mean: float, share: float, size: int) -> None:
    """``share``: the variance as a share of the largest that there can be. It is never above the law of the mean alone."""
    both = 1 / share - 1
    found = useful_of_beta(mean, share * mean * (1 - mean), size)
    reference = stats.betabinom(size, mean * both, (1 - mean) * both)
    assert found == pytest.approx(1 - reference.pmf(0) - reference.pmf(size), abs=1e-7)
    assert found <= useful(mean, size) + 1e-9


def test_the_ends_of_the_spread() -> None:
    assert useful_of_beta(0.3, 0.0, 4) == useful_of_beta(0.3, -0.1, 4) == useful(0.3, 4)
    assert useful_of_beta(0.3, 0.21, 4) == 0.0
    assert useful_of_beta(0.0, 0.1, 4) == useful_of_beta(1.0, 0.0, 4) == 0.0


@pytest.mark.parametrize("spread", [0.0, 0.15])
def test_the_spread_is_that_of_the_chances_alone(spread: float) -> None:
    """Without what few tries add: of problems that are all alike it is 0 in the mean."""
    rng = np.random.default_rng(0)
    both = math.inf if spread == 0 else 0.3 * 0.7 / spread**2 - 1
    found = []
    for _ in range(400):
        p = np.full(50, 0.3) if spread == 0 else rng.beta(0.3 * both, 0.7 * both, 50)
        found.append(spread_of((rng.random((50, 8)) < p[:, None]).astype(np.int64)))
    assert np.mean(found) == pytest.approx(spread**2, abs=4 * float(np.std(found)) / 20)
    with pytest.raises(ValueError, match="two of both"):
        spread_of(np.zeros((1, 8), np.int64))


def drawn(rng: np.random.Generator, mean: float, both: float, seeds: int = 5) -> Any:
    p = np.full((seeds, PROBLEMS, 1), mean) if math.isinf(both) else rng.beta(mean * both, (1 - mean) * both, (seeds, PROBLEMS, 1))
    return (rng.random((seeds, PROBLEMS, 2 * HALF)) < p).astype(np.int64)


def test_problems_that_differ_fool_the_mean_and_nothing_else() -> None:
    """Chances of a known beta distribution: what was measured is that distribution's share, and each law gets the verdict it deserves."""
    found = judge("drawn", drawn(np.random.default_rng(0), 0.2, 1.5, 20))
    for size, one in found.sizes.items():
        truth = useful_of_beta(0.2, 0.2 * 0.8 / 2.5, size)
        assert one.measured.low - 0.02 < truth < one.measured.high + 0.02
        assert one.problem.verdict == "equal"
        assert one.mean.verdict == "better"
        assert one.mean.difference.value == pytest.approx(useful(0.2, size) - truth, abs=0.06)
    assert found.spread == pytest.approx(math.sqrt(0.2 * 0.8 / 2.5), abs=0.03)
    assert found.wanted["problem"] is not None
    assert found.wanted["mean"] is not None
    assert found.wanted["mean"] < found.wanted["problem"]
    assert [f.verdict for f in groups._findings(found)[:2]] == ["equal", "too high"]


def test_problems_that_are_alike_fool_nobody() -> None:
    found = judge("drawn", drawn(np.random.default_rng(1), 0.2, math.inf))
    assert {one.problem.verdict for one in found.sizes.values()} == {"equal"}
    assert {one.mean.verdict for one in found.sizes.values()} <= {"equal", "undecided"}
    assert found.wanted["mean"] == found.wanted["beta"] or found.spread > 0
    assert found.spread < 0.03


def test_groups_that_do_not_follow_the_law_are_found() -> None:
    """Members that copy each other, as with one seed for all: groups are constant far more often than each problem's chance says."""
    rng = np.random.default_rng(2)
    played = drawn(rng, 0.3, 3.0)
    pairs = played.reshape(*played.shape[:2], -1, 2)
    pairs[..., 1] = pairs[..., 0]
    found = judge("copies", pairs.reshape(played.shape))
    assert {one.problem.verdict for size, one in found.sizes.items() if size <= 8} == {"better"}
    assert groups._findings(found)[0].verdict == "too high"


def test_false_alarms_are_rare() -> None:
    """Under the law at most 5 in 100 studies say of a size that it does not hold."""
    rng = np.random.default_rng(3)
    verdicts = [judge("drawn", drawn(rng, 0.25, 4.0, 2)).sizes[8].problem.verdict for _ in range(40)]
    assert verdicts.count("better") + verdicts.count("worse") <= 4


def test_sizes_are_the_smallest_that_do() -> None:
    assert size_for(0.6, {2: 0.5, 4: 0.6, 8: 0.9}) == 4
    assert size_for(0.95, {2: 0.5, 4: 0.6, 8: 0.9}) is None


# ---------------------------------------------------------------- the study

SMALL = ("rl.max_tokens=16",)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, few in (("PROBLEMS", 4), ("HALF", 8), ("SIZES", (2, 4)), ("TOGETHER", 3)):
        monkeypatch.setattr(f"veneer.studies.groups.{name}", few)


@pytest.mark.usefixtures("small")
def test_the_whole_study_plays_once(tmp_path: Path) -> None:
    opener = Counted()
    first = asyncio.run(conduct(lab(tmp_path, opener), Terms(2, 1, SMALL)))
    assert opener.opened == ["lora"]
    again = asyncio.run(conduct(lab(tmp_path, never), Terms(2, 1, SMALL)))
    assert again.document == first.document
    assert again.tables == first.tables
    assert [len(one["solved"]) for one in first.document["environments"]] == [8, 8, 8]
    names = [one["env"] for one in first.document["environments"]]
    assert names == ["arithmetic", "sort", "arithmetic (min_terms = 2, max_terms = 7)"]
    assert len(first.findings) == 3 * 4
    json.dumps(first.document)
    first.draw(tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().count("<svg") == 1

    more = asyncio.run(conduct(lab(tmp_path), Terms(3, 1, SMALL)))  # the first seeds' problems and draws stay
    for one, other in zip(more.document["environments"], first.document["environments"], strict=True):
        assert one["solved"][:8] == other["solved"]


@pytest.mark.usefixtures("small")
def test_tries_and_groups_are_draws_of_their_own(tmp_path: Path) -> None:
    """On the base's real answers: no member of a problem repeats another's draw."""
    one = lab(tmp_path)
    (config,) = groups._configs(Terms(2, 1, ("env.name=sort", *SMALL)))
    played = np.array(asyncio.run(groups._play(one, 0, config)))
    assert played.shape == (4, 16)
    assert set(played.ravel()) == {0, 1}
    assert not np.array_equal(played[:, :8], played[:, 8:])
    other = np.array(asyncio.run(groups._play(one, 1, config)))
    assert not np.array_equal(played, other)


ENVIRONMENT = """
from veneer.envs.dataset import Problem, ProblemDataset, QuestionEnv

class Few(ProblemDataset):
    def problem_count(self, split):
        return COUNT

def grade(action, answer):
    return GRADE

def make():
    return Few("few", lambda rng: Problem(f"{rng.randint(10, 99)}+11=?", "0"), lambda problem: QuestionEnv(problem, grade=grade), 0)
"""


@pytest.mark.parametrize(
    ("count", "grade", "error", "words"),
    [
        (6, '{"correct": 0.0}', ConfigError, "has 6 training problems; seed 1 needs 8"),
        (99, '{"correct": 0.5}', ConfigError, "rewards other than 0 and 1"),
        (99, '{}["none"]', RunError, "rollouts failed"),
    ],
)
@pytest.mark.usefixtures("small")
def test_environments_that_do_not_fit(tmp_path: Path, count: int, grade: str, error: type[Exception], words: str) -> None:
    (tmp_path / "few.py").write_text(ENVIRONMENT.replace("COUNT", str(count)).replace("GRADE", grade))
    with pytest.raises(error, match=words):
        asyncio.run(conduct(lab(tmp_path), Terms(2, 1, (f"env.name={tmp_path / 'few.py'}:make", *SMALL))))


@pytest.mark.usefixtures("small")
def test_stopped_it_plays_no_further(tmp_path: Path) -> None:
    stopped = lab(tmp_path)
    stopped.stop.set()
    with pytest.raises(Interrupted):
        asyncio.run(conduct(stopped, Terms(2, 1, SMALL)))
    assert not list(tmp_path.glob("runs/*"))


def test_one_environment_in_the_place_of_all() -> None:
    usual, one = groups._configs(Terms(overrides=("env.seconds=3",))), groups._configs(Terms(overrides=("env.name=count",)))
    assert [(config.env.name, config.env.seconds) for config in usual] == [("arithmetic", 3), ("sort", 3), ("arithmetic", 3)]
    assert [config.env.name for config in one] == ["count"]
    assert max(SIZES) <= HALF
