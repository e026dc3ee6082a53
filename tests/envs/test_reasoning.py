"""reasoning-gym: every task by name, the same problems again and again, splits that never mix, the library's own scores."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Generator
from typing import Any

import pytest

from veneer.engine import LoraEngine, load_base
from veneer.envs import gym_tasks, load_env
from veneer.envs.apart import Apart
from veneer.envs.framing import Framing
from veneer.envs.reasoning import GymDataset, GymEnv, SolvableGymEnv, tagged
from veneer.render import load_renderer
from veneer.train import env_check
from veneer.types import ConfigError, Message, Solvable

PROBLEMS = int(os.environ.get("VENEER_GYM", "0"))
"""make gym: this many problems of each task, and the base tries them."""
NEEDS_ARGUMENTS = {"composite": {"datasets": [{"name": "gcd", "weight": 1.0, "config": {}}, {"name": "lcm", "weight": 2.0, "config": {}}]}}
NO_SOLUTION = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
"""Tasks whose problems come without one."""
SLOW = {"knight_swap", "puzzle24", "zebra_puzzles", "futoshiki", "sudoku", "intermediate_integration", "polynomial_equations"}
"""A problem takes a tenth of a second or more, and one of eval eight times that."""
TASKS = sorted(gym_tasks.DATASETS)


class Kept(Apart):
    """Starting the library takes seconds; all tasks share one."""

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def library() -> Generator[Apart, None, None]:
    kept = Kept("veneer.envs.gym_tasks", processes=1)
    yield kept
    Apart.close(kept)


def dataset(library: Apart, task: str) -> GymDataset:
    args = json.dumps({"seed": 0, **NEEDS_ARGUMENTS.get(task, {})})
    known = library.ask_now(120, op="open", task=task, args=args)
    return GymDataset(f"reasoning_gym:{task}", task, args, Framing(), library, known["solvable"])


def said(content: str) -> Message:
    return {"role": "assistant", "content": content}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_can_be_played(library: Apart, task: str) -> None:
    """A task that cannot be drawn, repeated or graded is found here, not in the middle of a run."""
    tried = dataset(library, task)

    async def played() -> None:
        for split in ("train",) if task in SLOW else ("train", "eval"):
            env, again = tried.env(split, 0), tried.env(split, 0)
            shown = (await env.initial_observation()).messages[0]["content"]
            assert shown == (await again.initial_observation()).messages[0]["content"] != ""
            assert gym_tasks.held_out(shown) == (split == "eval")
            assert isinstance(env, Solvable) == (task not in NO_SOLUTION)
            if isinstance(env, Solvable):
                result = await env.step(env.gold())
                assert (result.reward, result.episode_done, dict(result.metrics)) == (1.0, True, {"correct": 1.0})
            else:
                assert not isinstance(env, SolvableGymEnv)
            wrong = await again.step(said("no idea"))
            assert 0.0 <= wrong.reward <= 1.0
            assert wrong == await tried.env(split, 0).step(said("no idea"))

    asyncio.run(played())


def test_the_names_are_the_librarys(library: Apart) -> None:
    assert library.ask_now(60, op="names") == TASKS
    assert len(TASKS) >= 100


def test_a_fresh_process_draws_the_same() -> None:
    """A run that goes on tomorrow must meet the problems that it would have met today; this task draws from a global generator."""
    questions = []
    for _ in range(2):
        apart = Apart("veneer.envs.gym_tasks", processes=1)
        drawn = [apart.ask_now(60, op="draw", task="list_functions", args='{"seed": 3}', split="train", index=i) for i in (5, 2**39)]
        questions.append(drawn)
        apart.close()
    assert questions[0] == questions[1]
    assert questions[0][0] != questions[0][1]


def test_a_task_that_repeats_itself_keeps_its_splits_apart() -> None:
    """Forty-five different problems in a thousand draws: a split by number would hold out what was trained on."""
    args = json.dumps({"seed": 0, "min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 9})
    train, held_out = ({gym_tasks.draw("gcd", args, split, i)["question"] for i in range(500)} for split in ("train", "eval"))
    assert len(train) < 100
    assert held_out
    assert not train & held_out
    other = {gym_tasks.draw("gcd", args.replace('"seed": 0', '"seed": 5'), "train", i)["question"] for i in range(500)}
    assert not other & held_out


def test_too_few_problems_are_told() -> None:
    """An eval split that cannot be filled must not be searched for ever."""
    for low in range(1, 50):
        few = {"seed": 0, "min_numbers": 2, "max_numbers": 2, "min_value": low, "max_value": low + 1}
        task = gym_tasks.create_dataset("gcd", **few)
        if not any(gym_tasks.held_out(task[i]["question"]) for i in range(100)):
            break
    with pytest.raises(ValueError, match="too few are different"):
        gym_tasks.draw("gcd", json.dumps(few), "eval", 0)


@pytest.mark.parametrize(
    ("task", "args", "words"),
    [
        ("gdc", {}, "did you mean 'gcd'"),
        ("zzzzzz", {}, "there are ab, acre"),
        ("gcd", {"min_number": 3}, "it has min_numbers, max_numbers"),
        ("gcd", {"min_numbers": 9, "max_numbers": 2}, "max_numbers must be >= min_numbers"),
    ],
)
def test_mistakes_are_told(task: str, args: dict[str, Any], words: str) -> None:
    assert words in gym_tasks.opened(task, json.dumps(args))["problem"]


@pytest.mark.parametrize(("name", "words"), [("reasoning_gym:gdc", "did you mean 'gcd'"), ("reasoning_jim:gcd", "'reasoning_gym:ID'")])
def test_a_wrong_name_is_one_line(name: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_env(name)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_the_answer_is_what_stands_in_the_last_tags(library: Apart) -> None:
    """A model that thinks aloud is graded by its answer alone, and partial scores stay what the library says."""
    assert tagged("so <answer>4</answer> no, <answer> 5 </answer>.") == "5"
    assert tagged("5") == "5"
    assert tagged("<answer>5") == "<answer>5"
    tried = dataset(library, "gcd")
    gold = tried.env("train", 0)
    assert isinstance(gold, Solvable)
    right = gold.gold()["content"]

    async def rewards(*contents: str) -> list[float]:
        return [(await tried.env("train", 0).step(said(c))).reward for c in contents]

    assert asyncio.run(rewards(f"I say <answer>{right}</answer>", right, f"it is {right}")) == [
        1.0,
        1.0,
        len(right) / len(f"it is {right}"),
    ]


def test_a_grader_that_falls_over_an_answer_calls_it_wrong(library: Apart) -> None:
    """The library's own grader of this task raises on text; a step in which the base talks must not fail for it."""
    env = dataset(library, "prime_factorization").env("train", 0)
    assert isinstance(env, GymEnv)
    result = asyncio.run(env.step(said("no idea")))
    assert (result.reward, dict(result.metrics)) == (0.0, {"correct": 0.0, "ungraded": 1.0})


def test_scores_out_of_range_are_kept_and_reported(library: Apart, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reward is what the library says; that it is strange is a metric."""
    tried = dataset(library, "gcd")

    async def two(*args: Any, **request: Any) -> float:
        return 2.0

    monkeypatch.setattr(library, "ask", two)
    result = asyncio.run(tried.env("train", 0).step(said("1")))
    assert (result.reward, dict(result.metrics)) == (2.0, {"correct": 1.0, "out_of_range": 1.0})


@pytest.mark.skipif(not PROBLEMS, reason="make gym: every task through env check, the base sampled; minutes")
@pytest.mark.parametrize("task", TASKS)
def test_every_task_goes_through_env_check(library: Apart, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No crash and no wrong solution; a prompt may be too long for the small base."""
    monkeypatch.setattr(env_check, "DRAWN", PROBLEMS)
    engine = LoraEngine(load_base("nano"))
    subject = env_check.Subject(dataset(library, task), load_renderer("nano"), engine.context_length, PROBLEMS, 32, 240.0, 0.5)
    findings = asyncio.run(env_check.check_env(subject, engine, 8, 0))
    wrong = {f.name: f.detail for f in findings if f.verdict == "failed"}
    difficulty = next((f.detail for f in findings if f.name == "difficulty"), "")
    print(f"{task:<28} {wrong or 'ok'}  {difficulty}")
    assert set(wrong) <= {"prompt length", "failed rollouts"}
