"""An environment of verifiers in a process of its own: played, broken, and gone. Every test runs with a stand-in of the package, and
with the package itself where ``make bridges`` has installed it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from playing import HERE, REAL, alive, below, episodes, gone, interpreter, outcome, play, say

from veneer.engine import LoraEngine, load_base
from veneer.envs import bridges, load_env
from veneer.envs.bridges.player.veneer_marks import marked
from veneer.envs.bridges.verifiers import VerifiersDataset, place
from veneer.envs.dataset import held_out
from veneer.render import load_renderer
from veneer.train.rollouts import Policy, closing, do_rollouts
from veneer.types import ConfigError, Observation, SamplingParams, TrajectoryGroup

ODD, EVEN, HALF = say("135"), say("24"), say("12")


@pytest.fixture(params=["standin", pytest.param("verifiers-v0", marks=REAL)])
def python(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return interpreter(request.param, monkeypatch)


def indices(dataset: VerifiersDataset, answer: int) -> list[int]:
    """Problems to train on whose answer is ``answer``, by what the environment says."""

    async def ask(index: int) -> str:
        env = dataset.env("train", index)
        text = (await env.initial_observation()).messages[0]["content"]
        await env.close()
        return text

    async def look() -> list[int]:
        texts = await asyncio.gather(*(ask(i) for i in range(dataset.facts["train"])))
        return [i for i, text in enumerate(texts) if text.startswith(f"say {answer},")]

    return asyncio.run(look())


def test_a_rollout_of_two_turns_earns_what_the_rubric_says(python: str) -> None:
    """Questions, answers, reward and metrics arrive; the reward is at the end, and closing twice is no harm."""

    async def playing() -> None:
        async with closing(dataset):
            env = dataset.env("train", 0)
            first = await env.initial_observation()
            assert isinstance(first, Observation)
            assert [m["role"] for m in first.messages] == ["user"]
            assert first.messages[0]["content"].startswith("say ")
            middle = await env.step(HALF)
            assert (middle.reward, middle.episode_done) == (0.0, False)
            assert middle.next_messages == [{"role": "user", "content": "once more"}]
            last = await env.step(ODD)
            assert last.episode_done
            assert last.reward == pytest.approx(4 / 5)  # odd digits of 12 and 135
            assert last.metrics == pytest.approx({"odd_digits": 4 / 5, "num_turns": 2.0})
            await env.close()
            await env.close()

    dataset = episodes(python)
    assert dataset.name == "verifiers:episodes"
    asyncio.run(playing())


def test_tools_are_shown_and_their_calls_answered(python: str) -> None:
    """The environment's tools reach the chat template, the policy's calls the environment, by ids."""

    async def playing() -> None:
        async with closing(dataset):
            env = dataset.env("train", 0)
            first = await env.initial_observation()
            assert [tool["function"]["name"] for tool in first.tools] == ["add"]
            assert first.tools[0]["function"]["parameters"]["required"] == ["a", "b"]
            second = await env.step(say("", ("add", {"a": 1, "b": 2}), ("add", {"a": 3, "b": 4})))
            assert second.next_messages == [{"role": "tool", "content": "3"}, {"role": "tool", "content": "7"}]
            third = await env.step(say("", ("add", {"a": 5, "b": 6})))
            assert third.next_messages == [{"role": "tool", "content": "11"}]
            assert (await env.step(ODD)).reward == 1.0
            await env.close()

    dataset = episodes(python, turns=3, tools=True)
    asyncio.run(playing())


def test_an_answer_of_nothing_is_scored_and_does_not_fail(python: str) -> None:
    """A policy must not escape its reward by saying nothing."""

    async def playing() -> float:
        async with closing(dataset):
            return (await play(dataset.env("train", 0), [say("")]))[-1].reward

    dataset = episodes(python, turns=1)
    assert asyncio.run(playing()) == 0.0


def test_held_out_problems_are_never_trained_on(python: str) -> None:
    """Neither where the environment holds problems out, some of which it trains on too, nor where it holds out none."""

    async def texts(dataset: VerifiersDataset) -> dict[str, list[str]]:
        async def ask(split: str, index: int) -> str:
            env = dataset.env(split, index)  # type: ignore[arg-type]
            text = (await env.initial_observation()).messages[0]["content"]
            await env.close()
            return text

        async with closing(dataset):
            return {s: await asyncio.gather(*(ask(s, i) for i in range(dataset.facts[s]))) for s in ("train", "eval")}

    own = asyncio.run(texts(episodes(python, problems=20, held=6)))  # of its 6 held-out problems 2 are in its training data
    assert (len(own["train"]), len(own["eval"])) == (18, 6)
    hashed = asyncio.run(texts(episodes(python, problems=40)))
    assert len(hashed["train"]) + len(hashed["eval"]) == 40
    for found in (own, hashed):
        assert len(set(found["train"]) | set(found["eval"])) == len(found["train"]) + len(found["eval"])


def test_the_players_rule_of_holding_out_is_veneers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs, one rule; and a set that is too small for it still has one problem held out."""
    monkeypatch.syspath_prepend(str(Path(bridges.__file__).parent / "player"))
    import veneer_loading

    texts = [f"problem {i}" for i in range(200)]
    assert [veneer_loading.held_out(text) for text in texts] == [held_out(text) for text in texts]
    places = veneer_loading.split(["a", "b", "c"], None)
    assert (len(places["train"]), len(places["eval"])) == (2, 1)


def test_every_problem_comes_once_before_any_comes_again() -> None:
    """Training goes through all problems, in an order of its seed; held-out ones are always the same first ones."""
    passes = [[place(10, "train", start + i, 0) for i in range(10)] for start in (0, 10, 10 * 2**40)]
    assert all(sorted(p) == list(range(10)) for p in passes)
    assert passes[0] != passes[1]
    assert [place(10, "train", i, 1) for i in range(10)] != passes[0]
    assert [place(10, "eval", i, 0) for i in range(12)] == [*range(10), 0, 1]


# ---------------------------------------------------------------- what cannot be loaded


@pytest.mark.parametrize(
    ("identity", "args", "words"),
    [
        ("episods", {}, "did you mean 'episodes'?"),
        ("broken-import", {}, "raised ModuleNotFoundError: No module named 'a_module_that_is_not_there'"),
        ("dying-import", {}, "ended with exit code 7; its last line: licence expired"),
        ("episodes", {"args": {"fault": "group"}}, "scores the rollouts of a group together"),
        ("episodes", {"args": {"color": "red"}}, "color"),
        ("episodes", {"config": {"agent": {}}}, "env.args.config is for tasksets of verifiers v1"),
    ],
)
def test_an_environment_that_cannot_be_loaded_is_told_in_one_line(python: str, identity: str, args: dict[str, object], words: str) -> None:
    """Before anything is sampled, with exit code 2."""
    before = set(below(os.getpid()))
    with pytest.raises(ConfigError) as told:
        load_env(f"verifiers:{identity}", {"python": python, "folder": str(HERE / "modules"), **args})
    assert words in str(told.value)
    assert "\n" not in str(told.value)
    assert set(below(os.getpid())) <= before


def test_what_is_missing_is_named_with_the_command_that_installs_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no package verifiers; run: .* -m pip install verifiers, or set env.args.python"):
        load_env("verifiers:reverse-text")
    with pytest.raises(ConfigError, match=r"env.args.python: .*/nowhere cannot be run \(No such file"):
        load_env("verifiers:reverse-text", {"python": str(tmp_path / "nowhere")})


def test_loading_is_time_boxed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An environment that downloads for ever does not hold the run for ever."""
    python = interpreter("standin", monkeypatch)
    (tmp_path / "endless.py").write_text("import time\ntime.sleep(1000)\n")
    before = set(below(os.getpid()))
    with pytest.raises(ConfigError, match=r"loading took longer than env.args.start_seconds = 2"):
        load_env("verifiers:endless", {"python": python, "folder": str(tmp_path), "start_seconds": 2})
    assert asyncio.run(gone(list(set(below(os.getpid())) - before), 5))


# ---------------------------------------------------------------- what goes wrong in a rollout


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("raise", "the environment failed: OSError: no such"),
        ("rewrite", "does not go on from the one before it: message 1 of 2"),
        ("hot", "the environment asks for temperature = 0.7; what is trained is the policy as it is"),
        ("parallel", "agent"),  # which of two lines depends on whether the policy answers before the second asks
    ],
)
def test_a_rollout_that_goes_wrong_costs_no_other(python: str, fault: str, words: str) -> None:
    """It fails with one line, beside others of the same process that end as they should."""

    async def playing() -> tuple[float | str, ...]:
        async with closing(dataset):
            return await asyncio.gather(*(outcome(dataset.env("train", i), [ODD, HALF]) for i in (bad, good)))

    dataset = episodes(python, fault=fault)
    bad, good = indices(dataset, 3)[0], indices(dataset, 2)[0]
    failed, earned = asyncio.run(playing())
    assert isinstance(failed, str)
    assert words in failed
    assert "\n" not in failed
    assert earned == pytest.approx(4 / 5)


def test_a_reward_that_is_no_number_reaches_the_check_that_names_it(python: str) -> None:
    """NaN crosses the pipe as it is, and the rollout fails where all rewards are checked; the other members stand."""
    groups = roll_out(episodes(python, fault="nan", turns=1), range(16), 1)
    errors = {t.error for group in groups for t in group.trajectories_G}
    assert errors == {None, "step's metric 'odd_digits' nan must be a finite number"}


def test_a_reward_that_cannot_be_written_down_fails_its_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verifiers itself makes 0 of such a reward; an environment with scoring of its own may let it through."""

    async def playing() -> float | str:
        async with closing(dataset):
            return await outcome(dataset.env("train", 0), [ODD, HALF])

    dataset = episodes(interpreter("standin", monkeypatch), fault="object", everywhere=True)
    assert "its reward or a metric is no number" in str(asyncio.run(playing()))


def test_garbage_on_stdout_is_not_taken_for_an_answer(python: str) -> None:
    """The environment prints what looks like a message of ours, and a line without end."""

    async def playing() -> float | str:
        async with closing(dataset):
            return await outcome(dataset.env("train", 0), [ODD, HALF])

    dataset = episodes(python, fault="garbage", everywhere=True)
    assert asyncio.run(playing()) == pytest.approx(4 / 5)


def test_a_process_that_dies_is_started_anew_for_the_next_rollout(python: str) -> None:
    """Its open rollouts fail with its last line, what it had started goes with it, and later ones are played."""

    async def playing() -> tuple[float | str, float | str]:
        async with closing(dataset):
            assert dataset._process is not None
            mark = dataset._process._mark
            died = await outcome(dataset.env("train", bad), [ODD, HALF])
            assert marked(mark) == []
            return died, await outcome(dataset.env("train", good), [ODD, HALF])

    dataset = episodes(python, fault="die")
    bad, good = indices(dataset, 3)[0], indices(dataset, 2)[0]
    died, earned = asyncio.run(playing())
    assert died == "the environment's process ended with exit code 3; its last line: out of paper"
    assert earned == pytest.approx(4 / 5)


def test_a_process_that_hangs_is_killed_and_started_anew(python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rollout that is given up must be given up there too; if nobody answers, nobody is there."""
    monkeypatch.setattr("veneer.envs.bridges.verifiers.PATIENCE", 1.0)

    async def playing() -> tuple[float | str, float | str]:
        async with closing(dataset):
            hanging = dataset.env("train", bad)
            await hanging.initial_observation()
            step = asyncio.ensure_future(hanging.step(ODD))
            await asyncio.sleep(0.5)  # as a time box does it
            step.cancel()
            beside = dataset.env("train", good)
            waiting = asyncio.ensure_future(outcome(beside, [ODD, HALF]))
            await hanging.close()
            return await waiting, await outcome(dataset.env("train", good), [ODD, HALF])

    dataset = episodes(python, fault="hang")
    bad, good = indices(dataset, 3)[0], indices(dataset, 2)[0]
    beside, later = asyncio.run(playing())
    assert isinstance(beside, str)
    assert beside.startswith("the environment's process answered no more and was killed")
    assert later == pytest.approx(4 / 5)


def test_a_slow_environment_fails_its_rollout_and_its_process_goes_on(python: str) -> None:
    """The time box of the loop cuts it off; the process takes note, so it is not held to hang."""
    dataset = episodes(python, fault="slow")
    groups = roll_out(dataset, range(10), 1, env_seconds=4.0)
    errors = [t.error for group in groups for t in group.trajectories_G]
    assert 0 < sum(error == "step took longer than 4 s" for error in errors) < 10
    assert set(errors) == {None, "step took longer than 4 s"}


# ---------------------------------------------------------------- under the training loop


def roll_out(
    dataset: VerifiersDataset, problems: range, size: int, env_seconds: float = 20.0, max_tokens: int = 6
) -> list[TrajectoryGroup]:
    """With the bundled base, as a run does it."""
    policy = Policy(LoraEngine(load_base("nano")), load_renderer("nano"), None, SamplingParams(max_tokens=max_tokens), env_seconds)

    async def playing() -> list[TrajectoryGroup]:
        async with closing(dataset):
            return await do_rollouts(policy, dataset, "train", problems, size, seed=0)

    return asyncio.run(playing())


def test_what_is_trained_is_what_was_sampled_and_comes_out_again(python: str) -> None:
    """Rollouts interleave in one process; each second prompt is the first one, the sampled tokens, and what is new; and the same seeds
    draw the same tokens, whoever was played beside whom."""
    first, again = (roll_out(episodes(python), range(4), 4, max_tokens=32) for _ in range(2))
    both = [[t for group in groups for t in group.trajectories_G] for groups in (first, again)]
    assert len(both[0]) == 16
    for one, other in zip(*both, strict=True):
        assert one.error is None
        assert one.reward == other.reward
        for turn, turn_again in zip(one.transitions, other.transitions, strict=True):
            assert turn.sample.tokens.tolist() == turn_again.sample.tokens.tolist()
        if len(one.transitions) == 2:
            seen = [*one.transitions[0].prompt, *one.transitions[0].sample.tokens]
            assert one.transitions[1].prompt.tolist()[: len(seen)] == seen
    assert any(len(t.transitions) == 2 for t in both[0])


# ---------------------------------------------------------------- nothing left behind


def port_of(dataset: VerifiersDataset) -> int:
    return int(dataset._endpoint.url.split(":")[2].split("/")[0])


def process_of(dataset: VerifiersDataset) -> int:
    assert dataset._process is not None
    return dataset._process.pid


def test_closed_it_leaves_no_process_and_no_port(python: str) -> None:
    """Not even processes that the environment started and forgot, in sessions of their own."""

    async def playing() -> None:
        async with closing(dataset):
            env = dataset.env("train", 0)
            await env.initial_observation()
            await env.step(ODD)
            pids.extend([process_of(dataset), *below(process_of(dataset))])

    pids: list[int] = []
    dataset = episodes(python, fault="grandchild", everywhere=True)
    port = port_of(dataset)
    socket.create_connection(("127.0.0.1", port)).close()
    asyncio.run(playing())
    assert len(pids) >= 2
    assert not any(map(alive, pids))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port)).close()


PARENT = """
import asyncio, sys, time
sys.path.insert(0, {here!r})
from playing import below, episodes, say
dataset = episodes({python!r}, fault={fault!r}, everywhere=True)

async def main():
    env = dataset.env("train", 0)
    await env.initial_observation()
    step = asyncio.ensure_future(env.step(say("1")))
    await asyncio.sleep(1.0)
    print(dataset._process.pid, *below(dataset._process.pid), flush=True)
    await asyncio.sleep(1000)

asyncio.run(main())
"""


@pytest.mark.parametrize("fault", ["grandchild", "hang"])
def test_it_ends_when_its_parent_is_killed(python: str, fault: str) -> None:
    """kill -9 of a run leaves nothing, not even of an environment that holds its thread."""
    code = PARENT.format(here=str(HERE), python=python, fault=fault)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) >= (2 if fault == "grandchild" else 1)
        assert all(map(alive, pids))
        parent.send_signal(signal.SIGKILL)
    assert asyncio.run(gone(pids, 12))


def test_the_key_is_nowhere_to_be_read(python: str) -> None:
    """Arguments and environment of a process can be read by its user's other processes, and end up in logs."""
    dataset = episodes(python)
    key = dataset._endpoint.key.encode()
    try:
        for name in ("cmdline", "environ"):
            assert key not in Path(f"/proc/{process_of(dataset)}/{name}").read_bytes()
        assert key.decode() not in repr(dataset) + str(vars(dataset).get("facts"))
    finally:
        asyncio.run(dataset.close())


def test_a_dataset_outlives_the_loop_it_was_played_in(python: str) -> None:
    """A script evaluates twice, each time with asyncio.run."""
    dataset = episodes(python)
    for _ in range(2):
        assert asyncio.run(outcome(dataset.env("train", 0), [ODD, HALF])) == pytest.approx(4 / 5)
    port, started = port_of(dataset), time.monotonic()
    asyncio.run(dataset.close())
    assert time.monotonic() - started < 8
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port)).close()
