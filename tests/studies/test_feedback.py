"""What a token, a line and an end are told, what that adds up to, and a course of learning by each."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_lab import lab, never

from veneer.measure.bits import corrected_bits
from veneer.measure.noise_scale import noise_parts
from veneer.studies import feedback
from veneer.studies.contest import Terms
from veneer.studies.courses import Course, Courses, School, lesson, school
from veneer.studies.credit import Case, Feedback, Judged, bits_of, centred_by_place, judge, lines_of
from veneer.studies.feedback import KINDS, SHARED, bits_to, conduct, episodes_to
from veneer.train.advantages import compute_advantages
from veneer.train.config import RunConfig, make_config
from veneer.train.datums import groups_to_data
from veneer.train.normalise import normalise
from veneer.types import ConfigError, TrajectoryGroup

TINY: dict[str, Any] = {**SHARED, "rl": {"steps": 2, "groups_per_batch": 2, "group_size": 4}, "eval": {"problems": 4, "every": 1}}
BREAK, END = 9, 99


def case(sampled: list[int], reference: list[int], right: bool = False, ended: bool = True) -> Case:
    return Case(np.array(sampled), ended, np.array(reference), right)


def told(one: Case, feedback: Feedback) -> list[float]:
    return list(judge(one, feedback, {BREAK}).rewards_T)


def test_lines() -> None:
    assert [line.tolist() for line in lines_of(np.array([1, BREAK, 2, 3]), {BREAK})] == [[1, BREAK], [2, 3]]
    assert [line.tolist() for line in lines_of(np.array([1, BREAK]), {BREAK})] == [[1, BREAK]]
    assert [line.tolist() for line in lines_of(np.array([], np.int64), {BREAK})] == [[]]


def test_a_wrong_line_costs_itself_alone() -> None:
    """Lines 12, 34 and the answer 5; the second has one wrong digit, and the answer is right all the same."""
    one = case([1, 2, BREAK, 3, 7, BREAK, 5, END], [1, 2, BREAK, 3, 4, BREAK, 5, END], right=True)
    assert told(one, "end") == [1] * 8
    assert told(one, "steps") == [1, 1, 1, 0, 0, 0, 1, 1]
    assert told(one, "tokens") == [1, 1, 1, 1, 0, 1, 1, 1]


def test_an_answer_is_compared_with_the_answer_however_many_lines_came_before() -> None:
    short = case([1, 2, BREAK, 5, END], [1, 2, BREAK, 3, 4, BREAK, 5, END], right=True)
    assert told(short, "steps") == told(short, "tokens") == [1] * 5
    long = case([1, 2, BREAK, 3, 4, BREAK, 8, BREAK, 5, END], [1, 2, BREAK, 3, 4, BREAK, 5, END], right=True)
    assert told(long, "steps") == [1] * 6 + [0, 0] + [1, 1]
    cut = case([1, 2, BREAK, 5, 7], [1, 2, BREAK, 5, END], ended=False)
    assert told(cut, "steps") == [1, 1, 1, 0, 0], "what was cut off is no answer"


def test_members_are_compared_at_the_same_place() -> None:
    """Of three members two come to the second place: what the third does not say is no mistake of its."""
    group = [Judged([(0, 0), (0, 1)], [1.0, 0.0]), Judged([(0, 0), (0, 1)], [0.0, 1.0]), Judged([(0, 0)], [1.0])]
    a, b, c = (list(found) for found in centred_by_place(group))
    assert a == pytest.approx([1 / 3, -0.5])
    assert b == pytest.approx([-2 / 3, 0.5])
    assert c == pytest.approx([1 / 3])
    assert bits_of(group) == pytest.approx(corrected_bits([1.0, 0.0, 1.0]) + corrected_bits([0.0, 1.0]))


def test_one_word_for_all_is_the_usual_advantage() -> None:
    group = [judge(case([1, 2, END], [1, 3, END], right), "end", {BREAK}) for right in (True, False, False, True)]
    assert [set(found.tolist()) for found in centred_by_place(group)] == [{0.5}, {-0.5}, {-0.5}, {0.5}]
    assert bits_of(group) == pytest.approx(corrected_bits([1.0, 0.0, 0.0, 1.0]))


def test_finer_feedback_tells_no_less() -> None:
    """Of random completions: that of all tokens tells a group at least as much as that of its lines, in the mean over many."""
    rng = np.random.default_rng(0)
    sums = dict.fromkeys(KINDS, 0.0)
    for _ in range(200):
        reference = [1, 2, BREAK, 3, 4, BREAK, 5, END]
        flips = rng.random((8, 8)) < 0.1
        members = [[7 if flip and t not in (BREAK, END) else t for t, flip in zip(reference, row, strict=True)] for row in flips]
        for kind in KINDS:
            sums[kind] += bits_of([judge(case(m, reference, m[6] == 5), kind, {BREAK}) for m in members])
    assert sums["end"] < sums["steps"] < sums["tokens"]


# ---------------------------------------------------------------- courses


def config(kind: str, **more: Any) -> RunConfig:
    return make_config({**TINY, "name": kind, **more})


async def played(folder: Path, settings: RunConfig, groups: int) -> tuple[School, list[TrajectoryGroup]]:
    async with school(lab(folder).place(settings), settings) as lessons:
        return lessons, await lessons.play(1, groups)


def test_the_end_alone_is_the_gradient_of_a_run(tmp_path: Path) -> None:
    """A lesson by the end alone is what reinforcement learning's own datums are: tokens, advantages and weights."""
    lessons, groups = asyncio.run(played(tmp_path, config("end"), 16))
    advantages = compute_advantages(groups, "group_mean", {})
    theirs = normalise(groups_to_data(groups, advantages), "episodes", episodes=64, max_tokens=72)
    mine = [datum for group in groups for datum in lesson(group, lessons.judged(group, "end"), len(groups))]
    assert len(mine) == len(theirs) > 0
    for own, (other,) in zip(mine, theirs, strict=True):
        np.testing.assert_array_equal(own.tokens, other.tokens)
        np.testing.assert_allclose(own.advantages * own.mask, other.advantages * other.mask, rtol=1e-6)


def test_the_base_agrees_with_its_own_manner(tmp_path: Path) -> None:
    """The worked solution is what the base says of itself where it thinks: lines of it come out right, and more tokens than lines do."""
    lessons, groups = asyncio.run(played(tmp_path, config("tokens", env={"name": "arithmetic"}), 32))
    shares = {kind: np.mean([np.mean(j.rewards_T) for group in groups for j in lessons.judged(group, kind)]) for kind in KINDS}
    assert 0.05 < shares["end"] < shares["steps"] < shares["tokens"] < 1


@pytest.mark.parametrize("kind", ["end", "steps", "tokens", "demonstrations"])
def test_a_course_is_made_once_and_the_same_again(tmp_path: Path, kind: str) -> None:
    """Also beside others."""
    others = [config(other) for other in ("end", "steps", "tokens", "demonstrations") if other != kind]
    first, *_ = asyncio.run(Courses(lab(tmp_path / "a")).run([config(kind), *others, config(kind, seed=1)]))
    (again,) = asyncio.run(Courses(lab(tmp_path / "a", never)).run([config(kind)]))
    (other,) = asyncio.run(Courses(lab(tmp_path / "b")).run([config(kind)]))
    assert first == again
    assert (first.accuracy, first.bits) == (other.accuracy, other.bits)
    assert [step for step, _ in first.accuracy] == [0, 1, 2]
    assert len(first.bits) == 2


def test_demonstrations_teach(tmp_path: Path) -> None:
    """A few worked solutions are enough to be surprised less by others."""
    rl = {"steps": 12, "groups_per_batch": 4, "group_size": 4, "learning_rate": 3e-3}
    (course,) = asyncio.run(Courses(lab(tmp_path)).run([config("demonstrations", rl=rl, eval={"problems": 4, "every": 100})]))
    assert course.bits[-1] < 0.8 * course.bits[0]


def test_a_course_that_diverges_is_kept(tmp_path: Path) -> None:
    rl = {**TINY["rl"], "learning_rate": 1e30}
    (course,) = asyncio.run(Courses(lab(tmp_path)).run([config("demonstrations", rl=rl)]))
    assert course.diverged
    assert course.score == 0.0


# ---------------------------------------------------------------- what it says


def made(accuracy: list[float], bits: list[float]) -> Course:
    return Course(make_config({"rl": {"groups_per_batch": 2, "group_size": 5}}), list(enumerate(accuracy)), bits, None)


def test_until_the_target() -> None:
    course = made([0.1, 0.2, 0.6, 0.3], [10.0, 20.0, 40.0])
    assert course.steps_to(0.4) == pytest.approx(1.5)
    assert episodes_to(course) == pytest.approx(15)
    assert bits_to(course) == pytest.approx(10 + 0.5 * 20)
    assert episodes_to(made([0.1, 0.2], [1.0])) is None
    assert bits_to(made([0.1, 0.2], [1.0])) is None


@pytest.mark.parametrize(
    ("end", "tokens", "word"), [([4, 4.1, 3.9], [2, 2.1, 1.9], "more"), ([2, 2.1], [4, 4.2], "fewer"), ([2, 4], [4, 2], "undecided")]
)
def test_words_for_episodes(end: list[float], tokens: list[float], word: str) -> None:
    def at(step: float) -> Any:
        return SimpleNamespace(steps_to=lambda target: step, episodes_a_step=64)

    (finding,) = feedback._episodes({"end": [at(s) for s in end], "tokens": [at(s) for s in tokens]})
    assert finding.verdict == word
    never_there = SimpleNamespace(steps_to=lambda target: None, episodes_a_step=64)
    missed: dict[str, Any] = {"end": [at(2.0), never_there], "tokens": [at(1.0), at(1.0)]}
    (finding,) = feedback._episodes(missed)
    assert finding.verdict == "undecided"
    assert "1 of 2 seeds" in finding.numbers


def test_noise_of_known_gradients() -> None:
    """G_i = s + n_i of 3 + 0.5 e_i in one dimension: the means of many batches are the variance and the square of the mean."""
    rng = np.random.default_rng(0)
    parts = []
    for _ in range(4000):
        gradients = 3 + 0.5 * rng.normal(size=16)
        added = gradients / 16
        parts.append(noise_parts(list(added**2), float(added.sum() ** 2), 16))
    assert np.mean([p["noise/trace"] for p in parts]) == pytest.approx(0.25, rel=0.05)
    assert np.mean([p["noise/signal"] for p in parts]) == pytest.approx(9, rel=0.01)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rl.loss=ppo", "do not read it"),
        ("env.name=sort", "do not read it"),
        ("rl.learning_rate=1", "the study itself decides"),
        ("sft.steps=2", "read none of"),
    ],
)
def test_what_courses_do_not_read_is_refused(tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        asyncio.run(conduct(lab(tmp_path, never), Terms(2, 1, (override,))))


def test_the_whole_study_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut to two rates, two seeds and a few episodes."""
    for name, few in (("LORA_RATES", (1e-3, 2e-3)), ("BATCHES", 2), ("WIDE", 4)):
        monkeypatch.setattr(feedback, name, few)
    sets = ("rl.steps=2", "rl.groups_per_batch=2", "rl.group_size=4", "rl.max_tokens=24", "eval.problems=4", "eval.every=1")
    result = asyncio.run(conduct(lab(tmp_path), Terms(2, 1, sets)))
    asked = [finding.question for finding in result.findings]
    assert sum("beside end" in question for question in asked) == 3
    assert sum(question.startswith("bits an episode") for question in asked) == 4
    assert {kind: len(found) for kind, found in result.document["noise"].items()} == dict.fromkeys(KINDS, 4)
    assert all(math.isfinite(batch["noise/trace"]) for found in result.document["noise"].values() for batch in found)
    result.draw(tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().count("<svg") == 1
