"""``env check`` finds what is wrong with an environment, each fault by its name, and nothing where nothing is."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest

from veneer.engine import LoraEngine, load_base
from veneer.envs import load_env
from veneer.envs.dataset import Problem, draw, exact_match
from veneer.envs.digits import generate_sort
from veneer.render import load_renderer
from veneer.train import env_check
from veneer.train.env_check import Finding, Subject, check_env, passed
from veneer.train.metrics import commonest
from veneer.types import Message, Observation, Split, StepResult, Ungraded

RENDERER = load_renderer("nano")


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env_check, "DRAWN", 40)
    monkeypatch.setattr(env_check, "REPEATED", 1)


def check(dataset: Any, engine: Any = None, context: int = 2048, problems: int = 4, **more: Any) -> dict[str, Finding]:
    subject = Subject(dataset, RENDERER, context, problems, max_tokens=24, env_seconds=0.5, max_failed_share=0.5)
    findings = asyncio.run(check_env(subject, engine, **{"group_size": 4, "seed": 0, **more}))
    assert len({f.name for f in findings}) == len(findings)
    assert passed(findings) == all(f.verdict != "failed" for f in findings)
    return {f.name: f for f in findings}


@dataclass
class Episode:
    """Sorting digits, with one fault."""

    problem: Problem
    world: Faulty
    said: list[str] = field(default_factory=list)

    async def initial_observation(self) -> Observation:
        prompt = self.problem.prompt
        if self.world.fault == "another each time":
            prompt += f" {next(self.world.counter)}"
        if self.world.fault == "long":
            prompt += "x" * 5000
        if self.world.fault == "no text":
            return Observation([{"role": "user", "content": 3}])  # pyright: ignore[reportArgumentType]
        return Observation([{"role": "user", "content": prompt}])

    async def step(self, action: Message) -> StepResult:
        reward = exact_match(action, self.problem.answer)["correct"]
        if self.world.fault == "remembers":
            reward += 0.01 * next(self.world.counter)
        if self.world.fault == "generous" and not action["content"]:
            reward = 1.0
        if self.world.fault == "slow":
            await asyncio.sleep(0.15)
        if self.world.fault == "hangs":
            await asyncio.sleep(9)
        if self.world.fault == "two turns" and not self.said:
            self.said.append(action["content"])
            return StepResult(0.0, episode_done=False, next_messages=[{"role": "user", "content": "sure?"}])
        if self.world.fault == "never ends":
            return StepResult(0.0, episode_done=False, next_messages=[{"role": "user", "content": "on " * 20000}])
        if self.world.fault == "double":
            reward *= 2
        if self.world.fault == "never right":
            reward = 0.0
        return StepResult(reward, episode_done=True)


class Solvable(Episode):
    def gold(self) -> Message:
        answer = self.problem.answer
        return {"role": "assistant", "content": answer[::-1] if self.world.fault == "wrong gold" else answer}


class Counter:
    def __init__(self) -> None:
        self.value = 0

    def __next__(self) -> int:
        self.value += 1
        return self.value


@dataclass
class Faulty:
    fault: str = ""
    solvable: bool = True
    name: str = "faulty"
    counter: Counter = field(default_factory=Counter)
    closed: int = 0

    def env(self, split: Split, index: int) -> Episode:
        split = "train" if self.fault == "one split" else split
        return (Solvable if self.solvable else Episode)(draw(generate_sort, split, index, "x"), self)

    async def close(self) -> None:
        self.closed += 1


class Graded(Faulty):
    async def compute_group_rewards(self, split: Split, index: int, trajectories_G: Any) -> list[Any]:
        if self.fault == "ungraded":
            return [Ungraded("no judge today")] * len(trajectories_G)
        return [(0.0, {"graded": 1.0})] * len(trajectories_G)


def test_a_good_environment_passes() -> None:
    """And is closed behind the check."""
    good = Faulty()
    found = check(good)
    assert {f.verdict for f in found.values()} == {"ok"}
    assert good.closed == 1
    assert found["gold"].numbers["problems"] == 8
    assert found["disjoint"].numbers["shared"] == 0
    assert {f.verdict for f in check(Graded()).values()} == {"ok"}
    assert {f.verdict for f in check(Faulty("two turns")).values()} == {"ok"}
    assert {f.verdict for f in check(load_env("calculator")).values()} == {"ok"}


@pytest.mark.parametrize(
    ("dataset", "name", "verdict", "words"),
    [
        (Faulty("wrong gold"), "gold", "failed", "8 of 8 solutions do not earn 1: problem 0 of the train split: reward 0"),
        (Faulty("double"), "gold", "warning", "more than 1"),
        (Faulty("hangs"), "gold", "failed", "step took longer than 0.5 s"),
        (Faulty("never ends"), "gold", "failed", "it has no end"),
        (Graded("ungraded"), "gold", "failed", "no judge today"),
        (Faulty("remembers"), "pure", "failed", "were graded otherwise the second time"),
        (
            Faulty("hangs", solvable=False),
            "pure",
            "failed",
            "is not graded: step took longer than 0.5 s",
        ),
        (Faulty("slow"), "quick", "warning", "over 100 ms"),
        (Faulty("another each time"), "repeatable", "failed", "8 problems are others when asked for again: train 0"),
        (Faulty("one split"), "disjoint", "failed", "40 shared by 40 problems of train"),
        (Faulty("long"), "prompt length", "failed", "context 2048"),
        (Faulty("generous"), "empty answer", "warning", "problem 0 of the train split"),
        (Faulty("no text"), "problems", "failed", "problem 0 of the train split"),
        (Faulty(solvable=False), "gold", "unknown", "the environment knows no solution"),
    ],
    ids=lambda value: value.fault if isinstance(value, Faulty) else None,
)
def test_each_fault_is_found(dataset: Faulty, name: str, verdict: str, words: str) -> None:
    found = check(dataset, problems=1 if dataset.fault in ("slow", "hangs", "never ends") else 4)
    assert found[name].verdict == verdict, found[name]
    assert words in found[name].detail


def test_a_prompt_that_leaves_no_room_for_an_answer() -> None:
    """16 or 18 tokens of 24 leave fewer than the 24 of a turn."""
    assert check(Faulty(), context=30)["prompt length"].verdict == "warning"
    assert check(Faulty(), context=16)["prompt length"].verdict == "failed"


def test_difficulty_is_counted_out() -> None:
    """The numbers are those of the rewards that the base earned."""
    engine = LoraEngine(load_base("nano"))
    found = check(load_env("sort"), engine, problems=12)
    numbers = found["difficulty"].numbers
    assert (numbers["problems"], numbers["tries"], numbers["group_size"]) == (12, 8, 4)
    assert 0 < numbers["pass@1"]["value"] < numbers["pass@8"]["value"] <= 1
    assert numbers["pass@1"]["value"] == pytest.approx(numbers["mean_reward"])  # rewards are 0 and 1
    assert found["failed rollouts"].detail == "0 of 96"
    again = check(load_env("sort"), engine, problems=12)["difficulty"]
    assert again == found["difficulty"]
    assert check(load_env("sort"), engine, problems=12, seed=1)["difficulty"] != again


def test_what_cannot_be_learned_is_said() -> None:
    """Nothing solved, nothing to learn; and failures with their causes."""
    engine = LoraEngine(load_base("nano"))
    hopeless = check(Faulty("never right", solvable=False), engine, problems=2)["difficulty"]
    assert (hopeless.verdict, hopeless.numbers["useful_groups"]["value"]) == ("warning", 0.0)
    assert "use easier problems, or SFT first" in hopeless.detail
    hanging = check(Faulty("hangs", solvable=False), engine, problems=1)
    assert (hanging["failed rollouts"].verdict, hanging["difficulty"].verdict) == ("failed", "unknown")
    assert hanging["failed rollouts"].detail == "8 of 8; 8 times: step took longer than 0.5 s"


def test_the_commonest_causes_are_told_apart_by_words_not_by_numbers() -> None:
    errors = ["line 3 gave nan", "timeout", "line 7 gave nan", "gone", "gone", "line 9 gave nan", "x"]
    assert commonest(errors) == [(3, "line 3 gave nan"), (2, "gone"), (1, "timeout")]
