"""workflow: plans that whoever works them out carries out in time, and a validator that no other way of judging contradicts."""

from __future__ import annotations

import asyncio
import random
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from world_play import answered, called, gold, play_wild, played, recipe, said, wild

from veneer.envs import load_env
from veneer.envs.tools import ToolEnv
from veneer.envs.worlds.plan import Plan, Step
from veneer.envs.worlds.workflow import Entry, WorkflowTask, validate, workflow
from veneer.types import ConfigError, Message, Split

SIZES: list[dict[str, Any]] = [
    {},
    {"slack": 0, "failing": 0},
    {"steps": 2, "goals": 1, "extra": 0, "spares": 2, "failing": 2},
    {"steps": 8, "goals": 3, "extra": 4, "spares": 4, "failing": 5, "partial_credit": True},
    {"steps": 20, "goals": 5, "extra": 3, "spares": 3, "failing": 20},
]
SMALL = Plan(
    # c is flaky and d broken; x leads nowhere
    steps=(Step("d", 2, ("b",)), Step("c", 2, ("a",)), Step("a", 1), Step("e", 4, ("b",), replaces="d"), Step("b", 3), Step("x", 2)),
    due={"c": 6, "d": 15},
    flaky=frozenset("c"),
    broken=frozenset("d"),
)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("split", ["train", "eval"])
def test_gold_earns_one(size: dict[str, Any], split: Split) -> None:
    """A plan that cannot be carried out in time punishes good policies."""

    async def main() -> None:
        dataset = workflow(**size)
        for index in range(40):
            _, result = await gold(dataset.env(split, index))
            assert result.reward == 1.0
            assert (result.metrics["refused"], result.metrics["needless"]) == (0, 0)

    asyncio.run(main())


@pytest.mark.parametrize("size", [{"slack": 1, **size} for size in SIZES])
def test_what_is_shown_is_enough(size: dict[str, Any]) -> None:
    """The careful script reads nothing but the text; a plan whose order has to be guessed would teach guessing."""
    scripts = recipe("nano_worlds")

    async def main() -> None:
        dataset = workflow(**{**size, "slack": 1})
        for index in range(40):
            _, result = await scripts.play(dataset.env("eval", index), scripts.careful_workflow, random.Random(index))
            assert result.reward == 1.0

    asyncio.run(main())


@pytest.mark.parametrize("slack", [0, 1, 3])
@pytest.mark.parametrize("wasted", [-1, 0, 1])
def test_deadlines_leave_the_slack_and_no_more(slack: int, wasted: int) -> None:
    """``slack`` refused calls are survived, one more is not."""

    async def main() -> None:
        dataset = workflow(slack=slack)
        for index in range(20):
            env = dataset.env("train", index)
            env.max_turns = 99
            for _ in range(slack + wasted):
                await env.step(called("run", task="nonsense"))
            _, result = await gold(env)
            assert result.reward == float(wasted <= 0)

    asyncio.run(main())


def test_a_needless_task_is_too_much() -> None:
    """Otherwise running everything would be a plan."""

    async def main() -> None:
        for index in range(40):
            env = workflow().env("train", index)
            plan = env.task.plan  # pyright: ignore[reportAttributeAccessIssue]
            extra = next((s.name for s in plan.steps if not s.replaces and s.name not in plan.due_by and not s.needs), None)
            if extra is not None:
                await env.step(called("run", task=extra))
                assert (await gold(env))[1].reward == 0.0

    asyncio.run(main())


# ---------------------------------------------------------------- another judge


def judge(text: str, dialogue: list[tuple[str, str, str]]) -> float:
    """The share of required tasks that were done in time: from the words of the prompt and of the (tool, task, answer) triples
    alone, keeping its own clock."""
    goals = {name: int(due) for name, due in re.findall(r"([a-z]) by (\d+)", text.splitlines()[0])}
    takes, needs, spare = dict[str, int](), dict[str, list[str]](), dict[str, str]()
    for line in text.splitlines()[1:]:
        _, name, duration = line.split()[:3]
        takes[name] = int(duration)
        if "spare of" in line:
            spare[name] = line[-1]
        else:
            needs[name] = line.split(" after ")[1].split() if "after" in line else []
    required: dict[str, int] = {}
    for goal, due in sorted(goals.items(), key=lambda item: -item[1]):  # the earliest last: its time stands
        reached = [goal]
        for name in reached:
            reached += [need for need in needs[name] if need not in reached]
        required.update(dict.fromkeys(reached, due))
    clock, done = 0, dict[str, int]()
    for tool, task, answer in dialogue:
        if tool == "status":
            continue
        clock += 1 if answer.startswith("error") else takes[task]
        assert answer.endswith(f", time {clock}")
        if answer.startswith("done"):
            work = spare.get(task, task)
            assert all(need in done for need in needs[work]), "it let a task run before what it needs"
            done[work] = clock
    in_time = [name for name, due in required.items() if done.get(name, clock + 10**6) <= due]
    return len(in_time) / len(required)


def wander(rng: random.Random, env: ToolEnv, care: float) -> Message:
    """Gold's next action with probability ``care``, else any call."""
    if rng.random() < care:
        return env.gold()
    task: Any = env.task
    return called(*rng.choice((("run",), ("run",), ("retry",))), task=rng.choice([step.name for step in task.plan.steps]))


@pytest.mark.parametrize("size", SIZES)
def test_another_judge_agrees(size: dict[str, Any]) -> None:
    """The validator and the environment's clock against a reading of the transcript that shares no code with them."""

    async def main() -> None:
        rng, rewards = random.Random(1), list[float]()
        for index in range(150):
            env = workflow(**{"slack": 2, **size}).env("train", index)
            text = env.task.messages[-1]["content"]
            dialogue: list[tuple[str, str, str]] = []
            care = rng.choice((0.3, 0.9, 1.0))
            while True:
                action = wander(rng, env, care)
                before: Any = list(action.get("tool_calls", ()))
                result = await env.step(action)
                if result.episode_done:
                    share = judge(text, dialogue) if not before else None
                    break
                dialogue.append((before[0]["name"], before[0]["arguments"].get("task", ""), result.next_messages[0]["content"]))
            if share is None:  # the last call's answer is not sent: its outcome is read from the environment's log
                task: Any = env.task
                entry = task.log[-1] if task.log else None
                name, arguments = before[0]["name"], before[0]["arguments"]
                ran = entry is not None and entry.task == arguments["task"] and entry.end == task.time
                last = f"{entry.outcome if ran and entry else 'error: refused'}, time {task.time}"
                share = judge(text, [*dialogue, (name, arguments["task"], last)])
            assert result.metrics["required_done"] == pytest.approx(share)
            assert result.metrics["correct"] == float(share == 1.0)
            assert result.reward == pytest.approx(share if size.get("partial_credit") else float(share == 1.0))
            rewards.append(result.reward)
        assert 0.1 < sum(r == 1.0 for r in rewards) / len(rewards) < 0.9, "both outcomes are judged"

    asyncio.run(main())


@pytest.mark.parametrize(
    ("log", "in_time"),
    [
        ([("a", 0, 1), ("c", 1, 3), ("b", 3, 6), ("e", 6, 10)], {"a", "b", "c", "d"}),  # d by its spare
        ([("c", 0, 2), ("a", 2, 3), ("b", 3, 6), ("d", 6, 8)], {"a", "b", "d"}),  # c before what it needs
        ([("a", 0, 1), ("c", 0, 2), ("b", 3, 6), ("d", 6, 8)], {"a", "b", "d"}),  # c while a still runs
        ([("b", 0, 3), ("a", 3, 4), ("c", 5, 7), ("d", 7, 9)], {"a", "b", "d"}),  # c too late
        ([("a", 0, 7), ("c", 7, 9), ("b", 9, 12), ("d", 12, 16)], {"b"}),  # a too late for c, d too late
        ([("x", 0, 2)], set()),
        ([], set()),
    ],
)
def test_validator(log: list[tuple[str, int, int]], in_time: set[str]) -> None:
    """It reads the log, and trusts nobody to have kept the order."""
    verdict = validate(SMALL, [Entry(*entry, "done") for entry in log])
    assert {name for name, good in verdict.items() if good} == in_time
    assert set(verdict) == set("abcd")
    assert not any(validate(SMALL, [Entry(*entry, "failed") for entry in log]).values())


def test_every_answer_of_the_tools() -> None:
    """What happens is told: what failed, what is broken, what is missing, and what it cost."""

    async def main() -> None:
        env = ToolEnv(WorkflowTask(SMALL, partial_credit=True), 99)
        assert env.task.messages[-1]["content"].splitlines() == [
            *("goal c by 6, d by 15", "- d 2 after b", "- c 2 after a", "- a 1", "- e 4 spare of d", "- b 3", "- x 2"),
        ]
        assert await answered(env, "status") == "time 0"
        assert await answered(env, "run", task="c") == "error: needs a, time 1"
        assert await answered(env, "run", task="a") == "done, time 2"
        assert await answered(env, "run", task="c") == "failed, time 4"
        assert await answered(env, "run", task="c") == "error: it failed, retry it, time 5"
        assert await answered(env, "retry", task="c") == "done, time 7"
        assert await answered(env, "run", task="b") == "done, time 10"
        assert await answered(env, "run", task="d") == "broken, time 12"
        assert await answered(env, "status") == "time 12, done a c b, broken d"
        result = await env.step(called("retry", task="d"))
        assert result.next_messages[0]["content"] == "error: it did not fail, time 13"
        last = await env.step(called("run", task="e"))
        assert last.episode_done, "d cannot be in time any more"
        assert (last.reward, last.metrics["refused"]) == (0.5, 3)  # a and b; c and d are too late

    asyncio.run(main())


@pytest.mark.parametrize(
    ("calls", "answer"),
    [
        ([("run", "z")], "error: no such task, time 1"),
        ([("retry", "a")], "error: it did not fail, time 1"),
        ([("run", "a"), ("run", "a")], "error: done before, time 2"),
        ([("run", "b"), ("run", "d"), ("run", "d")], "error: it is broken, time 6"),
        ([("run", "b"), ("run", "e"), ("run", "d")], "error: done before, time 8"),
        ([("run", "e")], "error: needs b, time 1"),
        ([("run", "a"), ("run", "c"), ("retry", "c"), ("retry", "c")], "error: it did not fail, time 6"),
        ([("run", "x"), ("run", "x")], "error: done before, time 3"),
    ],
)
def test_wrong_calls_are_refused_in_words(calls: list[tuple[str, str]], answer: str) -> None:
    async def main() -> None:
        unhurried = replace(SMALL, due={"c": 60, "d": 90})
        env = ToolEnv(WorkflowTask(unhurried, partial_credit=False), 99)
        for tool, task in calls:
            last = await answered(env, tool, task=task)
        assert last == answer

    asyncio.run(main())


def test_saying_done_does_not_make_it_so() -> None:
    result = asyncio.run(workflow().env("train", 0).step(said("done")))
    assert (result.episode_done, result.reward, result.metrics["gave_up"]) == (True, 0.0, 1.0)


def test_many_calls_in_one_turn_run_one_behind_the_other() -> None:
    """A model may plan ahead and call everything at once."""

    async def main() -> None:
        env = workflow(failing=0).env("train", 3)
        task: Any = env.task
        calls: Any = [{"name": "run", "arguments": {"task": name}} for name in task.plan.order]
        result = await played(env, [{"role": "assistant", "content": "", "tool_calls": calls}])
        assert (result.episode_done, result.reward) == (True, 1.0)

    asyncio.run(main())


def test_problems_repeat_and_splits_are_disjoint() -> None:
    """A held-out score over plans that were trained on is no score; two plans that look alike count as one."""

    def shown(split: Split, seed: int = 0) -> list[str]:
        return [workflow(seed=seed).env(split, index).task.messages[-1]["content"] for index in range(400)]

    train = shown("train")
    assert train == shown("train")
    assert len(set(train)) > 390
    assert not set(train) & set(shown("eval"))
    assert not set(train) & set(shown("eval", seed=1))
    assert shown("train", seed=1) != train


def test_the_order_of_the_text_says_nothing() -> None:
    """If tasks were listed in an order that works, copying it would do."""
    works = 0
    for index in range(200):
        task: Any = workflow(extra=0, failing=0, spares=0).env("train", index).task
        listed = [step.name for step in task.plan.steps]
        works += all(listed.index(need) < listed.index(step.name) for step in task.plan.steps for need in step.needs)
    assert works < 60


CALLS = st.one_of(
    st.fixed_dictionaries(
        {
            "name": st.sampled_from(["run", "run", "retry"]),
            "arguments": st.fixed_dictionaries({"task": st.sampled_from("abcdefghijklmnopqrstuvwxyz") | st.text()}),
        }
    ),
    st.just({"name": "status", "arguments": {}}),
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(actions=wild(CALLS), index=st.integers(0, 10**12), size=st.sampled_from(SIZES))
def test_anything_may_be_said(actions: list[Any], index: int, size: dict[str, Any]) -> None:
    play_wild(workflow(**size).env("train", index), actions)


@pytest.mark.parametrize(
    ("args", "match"),
    [
        ({"steps": 1}, r"env\.args\.steps: 1 must be a whole number from 2 to 20"),
        ({"goals": 3}, r"env\.args\.goals: 3 must be a whole number from 1 to 2"),
        ({"spares": 4}, r"env\.args\.spares: 4 must be a whole number from 0 to 3"),
        ({"extra": 23}, r"env\.args\.extra: 23 must be a whole number from 0 to 22"),
        ({"failing": 1.0}, r"env\.args\.failing: 1\.0 must be"),
        ({"slack": -1}, r"env\.args\.slack: -1 must be"),
        ({"partial_credit": 1}, r"env\.args\.partial_credit: 1 must be true or false"),
    ],
)
def test_a_users_mistake_is_one_line(args: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        load_env("workflow", args)


def test_careful_succeeds_and_careless_mostly_does_not() -> None:
    """Demonstrations of a careful way that fails, or of a careless way that works, would teach the base the wrong thing."""
    scripts = recipe("worlds_docs")

    async def main() -> None:
        careful = await scripts.measure(workflow(), scripts.CAREFUL["workflow"], 150)
        careless = await scripts.measure(workflow(), scripts.CARELESS["workflow"], 150)
        assert sum(careful["reward"]) == 150
        assert max(careful["refused"]) == 1, "slips are among them"
        assert sum(careless["reward"]) <= 15

    asyncio.run(main())
