"""Environments: the reward is all that a run learns from, so it has to be right."""

from __future__ import annotations

import asyncio
import math
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.envs import ENVIRONMENTS, load_env
from veneer.envs.calculator import MAX_CALLS, calculate
from veneer.types import ConfigError, Message, Observation, Split, StepResult

NAMES = tuple(name for name in ENVIRONMENTS if name not in ("jsonl", "math"))
"""Those that make their own problems."""


def play(env: Any, *actions: Message) -> tuple[Observation, list[StepResult]]:
    """Show and answer one episode."""

    async def episode() -> tuple[Observation, list[StepResult]]:
        first = await env.initial_observation()
        return first, [await env.step(action) for action in actions]

    return asyncio.run(episode())


def question(name: str, split: Split, index: int, **args: Any) -> str:
    env: Any = load_env(name, args).env(split, index)
    return env.problem.prompt


def solve(prompt: str) -> str:
    """The answer, worked out from the question alone."""
    if prompt.endswith("=?"):
        total = 0
        for product in prompt.removesuffix("=?").split("+"):
            value = 1
            for factor in product.split("*"):
                value *= int(factor)
            total += value
        return str(total)
    verb, *words = prompt.split()
    if verb == "sort":
        return "".join(sorted(words[0]))
    if verb == "reverse":
        return "".join(reversed(words[0]))
    assert verb == "count"
    return str(words[2].count(words[0]))


def said(content: str, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize("name", NAMES)
def test_gold_scores_one_and_wrong_scores_zero(name: str, split: Split) -> None:
    """A grader that refuses the right answer, or takes a wrong one, poisons every run."""
    dataset = load_env(name)
    for index in range(20):
        gold = solve(question(name, split, index))
        shown, (result,) = play(dataset.env(split, index), said(gold))
        assert shown.messages[-1] == {"role": "user", "content": question(name, split, index)}
        assert (result.reward, result.episode_done) == (1.0, True)
        for wrong in (gold + "1", "", "no idea", gold + " " + gold):
            assert play(dataset.env(split, index), said(wrong))[1][0].reward == 0.0
        assert play(dataset.env(split, index), said("", reasoning_content=gold))[1][0].reward == 0.0
        assert play(dataset.env(split, index), said(f"\n{gold} ", reasoning_content="hm"))[1][0].reward == 1.0


@pytest.mark.parametrize("name", NAMES)
def test_problems_repeat_and_splits_are_disjoint(name: str) -> None:
    """A held-out score over problems that were trained on is no score."""
    train = [question(name, "train", i) for i in range(2000)]
    held_out = [question(name, "eval", i) for i in range(2000)]
    assert train[:50] == [question(name, "train", i) for i in range(50)]
    assert not set(train) & set(held_out)
    assert not set(held_out) & {question(name, "train", i, seed=7) for i in range(2000)}
    assert len(set(train)) > 1000
    assert [question(name, "train", i, seed=1) for i in range(50)] != train[:50]


@pytest.mark.parametrize("name", NAMES)
def test_grading_is_pure_and_quick(name: str) -> None:
    """A grader that remembers or dawdles makes reruns differ and steps slow."""
    dataset = load_env(name)
    clock = time.perf_counter()
    for content in ("1", solve(question(name, "train", 0)), "x" * 10_000):
        action = said(content, reasoning_content="1+1=2 no, 3")
        copy = dict(action)
        first, second = (play(dataset.env("train", 0), action)[1][0] for _ in range(2))
        assert first == second
        assert action == copy
    assert time.perf_counter() - clock < 1.0


def test_calculator_turns() -> None:
    """The tool's answer has to reach the model, and an answer behind it counts."""
    dataset = load_env("calculator")
    prompt = question("calculator", "train", 3)
    call = said("", tool_calls=[{"name": "calculator", "arguments": {"expression": prompt.removesuffix("=?")}}])
    shown, (called, answered) = play(dataset.env("train", 3), call, said(solve(prompt)))
    assert shown.tools[0]["function"]["name"] == "calculator"
    assert (called.reward, called.episode_done) == (0.0, False)
    assert list(called.next_messages) == [{"role": "tool", "content": solve(prompt)}]
    assert (answered.reward, answered.episode_done, dict(answered.metrics)) == (1.0, True, {"correct": 1.0, "called": 1.0})


def test_calculator_ends() -> None:
    """A policy that only calls tools must not play for ever."""
    call = said("", tool_calls=[{"name": "calculator", "arguments": {}}])
    results = play(load_env("calculator").env("train", 0), *[call] * (MAX_CALLS + 1))[1]
    assert [r.episode_done for r in results] == [False] * MAX_CALLS + [True]
    assert [m["content"] for r in results[:-1] for m in r.next_messages] == ["error"] * MAX_CALLS
    assert results[-1].reward == 0.0


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.text(), st.text("0123456789+* ().-_einfx"), st.none(), st.integers(), st.lists(st.text()), st.dictionaries(st.text(), st.text())
    )
)
def test_calculate_never_evaluates(expression: object) -> None:
    """The model writes this text; whatever it is, no code runs and the answer is digits or a word."""
    answer = calculate(expression)
    assert answer == "error" or (answer.isascii() and answer.isdigit())


@pytest.mark.parametrize("expression", ["__import__('os').getcwd()", "9**9**9", "1e9", "1+", "+1", "", "1 + 1", "1\n", "9" * 7])
def test_calculate_refuses(expression: str) -> None:
    """Each of these does something, or takes for ever, when it is evaluated."""
    assert calculate(expression) == "error"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 999999), min_size=1, max_size=2), min_size=1, max_size=4))
def test_calculate_is_right(terms: list[list[int]]) -> None:
    """A tool that is wrong punishes its use."""
    text = "+".join("*".join(map(str, factors)) for factors in terms)
    assert calculate(text) == str(sum(math.prod(factors) for factors in terms))


# ---------------------------------------------------------------- by name or from a file

FILE = """
from veneer.envs.dataset import Problem, ProblemDataset

def mine(word: str = "hi", seed: int = 0):
    return ProblemDataset("mine", lambda rng: Problem(f"{word} {rng.random()}", "x"), seed=seed)

value = 3
"""


def test_unknown_name_says_the_nearest() -> None:
    """A typing mistake is answered with the name that was meant."""
    with pytest.raises(ConfigError, match="arithmetic"):
        load_env("arithmetik")
    with pytest.raises(ConfigError, match="calculator"):
        load_env("zzz")


@pytest.mark.parametrize("args", [{"terms": 3}, {"min_terms": 2, "sed": 1}])
def test_unknown_argument_is_an_error(args: dict[str, int]) -> None:
    """An ignored argument would be an experiment that did not happen."""
    with pytest.raises(ConfigError, match=r"env\.args.*min_terms"):
        load_env("arithmetic", args)


def test_arguments_arrive() -> None:
    """Harder or easier problems are asked for by argument."""
    prompts = [question("arithmetic", "train", i, min_terms=2, max_terms=2) for i in range(20)]
    assert {p.count("+") for p in prompts} == {1}


def test_a_users_file(tmp_path: Path) -> None:
    """An environment of one's own is one file and no installation."""
    path = tmp_path / "my_env.py"
    path.write_text(FILE)
    assert play(load_env(f"{path}:mine", {"word": "yo"}).env("train", 0))[0].messages[0]["content"].startswith("yo ")


@pytest.mark.parametrize(
    ("source", "suffix", "match"),
    [
        (None, ":mine", "there is no file"),
        (FILE, ":yours", "no function 'yours'"),
        (FILE, ":value", "no function 'value'"),
        (FILE, ":", "no function ''"),
        ("import nothing_of_this_name", ":mine", "cannot be imported"),
        ("def mine(:", ":mine", "cannot be imported"),
        ("raise ValueError('two\\nlines')", ":mine", "cannot be imported"),
    ],
)
def test_a_users_mistake_is_one_line(tmp_path: Path, source: str | None, suffix: str, match: str) -> None:
    """Files and functions of the user's that are not there or do not run."""
    path = tmp_path / "my_env.py"
    if source is not None:
        path.write_text(source)
    with pytest.raises(ConfigError, match=match):
        load_env(f"{path}{suffix}")
