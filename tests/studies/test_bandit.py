"""Bits of an episode: closed forms against posteriors counted out, REINFORCE against torch, and the study from end to end."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_lab import lab, never

from veneer.measure.bits import entropy_bits
from veneer.studies import bandit
from veneer.studies.bandit import Told, _same, conduct, teach
from veneer.studies.contest import Terms
from veneer.studies.secret import GROUP, SECRET, Learners, Task, ask, expected_bits, make_task, play, remaining_bits
from veneer.train.session import Interrupted

tasks = st.integers(1, 8).flatmap(lambda n: st.builds(Task, st.just(n), st.integers(0, n)))


def secrets(task: Task) -> list[frozenset[int]]:
    return [frozenset(secret) for secret in itertools.combinations(range(task.actions), task.rewarded)]


@given(tasks, st.data())
@settings(max_examples=100, deadline=None)
def test_the_posterior_is_that_of_all_secrets_counted_out(task: Task, data: st.DataObject) -> None:
    """Whatever was tried, how often and in which order; and nothing tried again tells anything."""
    secret = data.draw(st.sampled_from(secrets(task)))
    tried = data.draw(st.lists(st.integers(0, task.actions - 1), max_size=12))
    agreeing = [other for other in secrets(task) if all((a in other) == (a in secret) for a in tried)]
    found = remaining_bits(task, len(set(tried)), len(secret & set(tried)))
    assert float(found) == pytest.approx(math.log2(len(agreeing)), abs=1e-9)


@given(tasks)
@settings(max_examples=40, deadline=None)
def test_expected_bits_are_the_mean_over_all_secrets(task: Task) -> None:
    drops = []
    for secret in secrets(task):
        left = [remaining_bits(task, t, sum(a in secret for a in range(t))) for t in range(task.actions + 1)]
        drops.append(-np.diff(left))
    assert expected_bits(task, task.actions) == pytest.approx(np.mean(drops, axis=0), abs=1e-9)


@given(st.integers(1, 300), st.data())
@settings(max_examples=60, deadline=None)
def test_no_episode_tells_more_than_the_first_and_all_of_them_tell_the_secret(actions: int, data: st.DataObject) -> None:
    task = Task(actions, data.draw(st.integers(0, actions)))
    bits = expected_bits(task, actions)
    assert bits[0] == pytest.approx(entropy_bits(task.chance), abs=1e-9)
    assert bits.sum() == pytest.approx(task.bits, abs=1e-6)
    assert (np.diff(bits) <= 1e-9).all()


@given(tasks)
@settings(max_examples=40, deadline=None)
def test_the_ideal_learner_stops_when_nothing_remains(task: Task) -> None:
    ends = []
    for secret in secrets(task):
        left = [float(remaining_bits(task, t, sum(a in secret for a in range(t)))) for t in range(task.actions + 1)]
        ends.append(next(t for t, bits in enumerate(left) if bits < 1e-9))
    assert task.ideal == pytest.approx(np.mean(ends))


@pytest.mark.parametrize("task", [Task(12, 3), Task(40, 20), Task(64, 60)])
def test_simulated_secrets_tell_the_closed_form(task: Task) -> None:
    found = ask(task, 60_000, 10, np.random.default_rng(0))
    assert found.mean() == pytest.approx(expected_bits(task, 10).mean(), rel=0.02)


@pytest.mark.parametrize("chance", bandit.CHANCES)
def test_secrets_have_this_chance_and_enough_bits(chance: Fraction) -> None:
    task = make_task(chance)
    assert Fraction(task.rewarded, task.actions) == chance
    if 0 < chance < 1:
        smaller = Task(task.actions - chance.denominator, task.rewarded - chance.numerator)
        assert task.bits >= SECRET > smaller.bits
    else:
        assert task.bits == 0


# ---------------------------------------------------------------- REINFORCE


def test_a_step_is_the_gradient_that_torch_finds() -> None:
    """Of the sum over episodes of the log-probability of the action times the reward less the group's mean; and draws follow policies."""
    task, rates = Task(20, 6), [0.3, 1.0, 2.5]
    learners, twin = Learners(task, rates, np.random.default_rng(5)), np.random.default_rng(5)
    for _ in range(30):
        logits = torch.tensor(learners.logits, requires_grad=True)
        ends = torch.softmax(logits, dim=1).detach().cumsum(dim=1)
        actions = torch.searchsorted(ends, torch.tensor(twin.random((len(rates), GROUP))), right=True)
        rewards = (actions < task.rewarded).double()
        advantages = rewards - rewards.mean(dim=1, keepdim=True)
        (torch.log_softmax(logits, dim=1).gather(1, actions) * advantages).sum().backward()
        assert logits.grad is not None
        expected = learners.logits + np.array(rates)[:, None] * logits.grad.numpy()
        learners.step()
        assert learners.logits == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("rewarded", [0, 30])
def test_certain_and_impossible_rewards_teach_nothing(rewarded: int) -> None:
    learners = Learners(Task(30, rewarded), [10.0] * 4, np.random.default_rng(0))
    for _ in range(10):
        learners.step()
    assert not learners.logits.any()
    assert not learners.received.any()
    assert not learners.printed.any()
    assert learners.narrowed == pytest.approx(0, abs=1e-9)


def test_told_is_what_somebody_who_watches_knows() -> None:
    """It never falls, never passes the secret, and is all of it before the secret can be read off a policy."""
    task = Task(24, 8)
    learners = Learners(task, [0.2] * 32, np.random.default_rng(1))
    before = learners.received
    for _ in range(200):
        learners.step()
        assert (learners.received >= before - 1e-9).all()
        before = learners.received
        assert before[learners.solved] == pytest.approx(task.bits)
    assert before.max() <= task.bits + 1e-9
    assert learners.solved.any()


def test_who_does_not_solve_it_stays_in() -> None:
    """A learning rate beyond all bounds settles on the first few rewarded actions and never tries the others."""
    task = Task(40, 20)
    ends = play(task, [0.3] * 8 + [50.0] * 8, np.random.default_rng(0))
    assert np.isfinite(ends.solved[:8]).sum() >= 6
    assert np.isinf(ends.solved[8:]).all()
    assert (ends.told <= ends.solved).all()
    assert (ends.received[8:] < task.bits).all()
    assert (ends.received > 0).all()
    assert (ends.narrowed[8:] > 2).all()


def test_rates_are_chosen_on_other_secrets() -> None:
    """More seeds do not change the choice, nor what the first seeds came to."""
    task = Task(20, 10)
    few, more = teach(task, Terms(2, 1)), teach(task, Terms(3, 1))
    assert list(teach(task, Terms(2, 1, coarse=True)).tried) == list(few.tried)[::2]
    assert few.rate == more.rate == max(few.tried, key=few.tried.__getitem__)
    assert few.tried == more.tried
    assert list(few.shares("solved")) == list(more.shares("solved")[:2])
    assert 0 < few.shares("solved").mean() <= few.shares("told").mean() <= 1


# ---------------------------------------------------------------- the study


def test_the_whole_study_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut to five chances, few secrets and two group sizes: every finding, every number in the tables, one picture."""
    chances = tuple(map(Fraction, ("0", "1/10", "1/2", "9/10", "1")))
    for name, few in (("CHANCES", chances), ("LEARNED", chances[1:4]), ("COURSES", 4000), ("LEARNERS", 4), ("GROUPS", 50_000)):
        monkeypatch.setattr(f"veneer.studies.bandit.{name}", few)
    monkeypatch.setattr("veneer.studies.bandit.SIZES", (8, 64))
    result = asyncio.run(conduct(lab(tmp_path, never), Terms(2, 1)))
    verdicts = [finding.verdict for finding in result.findings]
    assert verdicts[1:3] == ["holds", "0.5"]
    assert verdicts[4] == "holds"
    assert "lower" in verdicts[8]  # groups of 8
    document = json.loads(json.dumps(result.document))
    assert [one["chance"] for one in document["ideal"]] == [0.0, 0.1, 0.5, 0.9, 1.0]
    assert document["ideal"][0]["bits"] == document["ideal"][-1]["bits"] == [0.0, 0.0]
    assert [len(one["solved_share"]) for one in document["reinforce"]] == [2, 2, 2]
    assert result.tables.count("\n| 0.1 |") == 2 + 2
    result.draw(tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().count("<svg") == 1


def test_it_can_be_stopped(tmp_path: Path) -> None:
    stopped = lab(tmp_path, never)
    stopped.stop.set()
    with pytest.raises(Interrupted):
        asyncio.run(conduct(stopped, Terms()))


def test_a_bound_that_is_broken_is_called_so() -> None:
    """Somebody who is told more than the closed form says, by 5%."""
    honest = {p: Told(make_task(p), expected_bits(make_task(p), 8) * np.ones((3, 1))) for p in map(Fraction, ("0", "1/4", "1/2", "1"))}
    liar = {p: Told(one.task, one.bits * 1.05) for p, one in honest.items()}
    whisper = {p: Told(one.task, one.bits + 1e-3) for p, one in honest.items()}
    first = [bandit._of_the_ideal(told)[:3] for told in (honest, liar, whisper)]
    assert [[finding.verdict for finding in three] for three in first] == [
        ["equal", "holds", "0.5"],
        ["differs", "holds", "0.5"],
        ["equal", "broken", "0.5"],
    ]


@pytest.mark.parametrize(("spread", "verdict"), [(0.001, "equal"), (0.05, "undecided")])
def test_one_ratio_that_is_not_known_keeps_all_undecided(spread: float, verdict: str) -> None:
    ratios = {0.1: np.ones(3), 0.2: np.array([1 - spread, 1.0, 1 + spread])}
    assert _same(ratios, 0.02)[0] == verdict
    assert "p = 0.2" in _same(ratios, 0.02)[1]
