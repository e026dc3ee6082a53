"""Rejection sampling: what is kept, that it is learned, and that an interrupted round goes on with the episodes it had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_helpers import config_of, final_weights, open_session, run_session

from veneer.train.config import RunConfig, make_config
from veneer.train.rejection import choose, kept_rows
from veneer.train.session import Interrupted
from veneer.types import AttestationError, RunError, Sample, Trajectory, TrajectoryGroup, Transition

SETTINGS = {"rounds": 2, "problems": 4, "group_size": 4, "max_tokens": 40, "bar": 0.2, "steps": 3, "batch_size": 4}


def config_for(tmp_path: Path, fault: str = "", **rejection: Any) -> RunConfig:
    return config_of(tmp_path, fault, kind="rejection", rejection={**SETTINGS, **rejection}, checkpoint_every=100)


def episode(reward: float, tokens: list[int], **more: Any) -> Trajectory:
    sample = Sample(np.array(tokens), np.zeros(len(tokens), np.float32), "stop", "base", None)
    return Trajectory([Transition(np.array([1]), sample, {"role": "assistant", "content": ""}, reward)], reward, **more)


def test_what_is_kept() -> None:
    """The first of each problem that reach the bar, differ, were not cut off and did not fail."""
    members = [
        episode(0.9, [1]),
        episode(1.0, [2]),
        episode(0.0, [3], error="it failed"),
        episode(2.0, [2]),
        episode(1.0, [4], truncated=True),
        episode(1.5, [5]),
        episode(1.0, [6]),
    ]
    assert choose(TrajectoryGroup(0, members), 1.0, 2) == [0, 1, 0, 0, 1, 0]
    assert choose(TrajectoryGroup(0, members), 1.0, 9) == [0, 1, 0, 0, 1, 1]
    assert choose(TrajectoryGroup(0, members), 5.0, 2) == [0] * 6


def test_it_learns_what_it_kept(tmp_path: Path) -> None:
    """Reward of held-out problems rises, and each round samples from what the last has trained."""
    rejection = {"rounds": 2, "problems": 32, "group_size": 4, "steps": 8, "batch_size": 8, "learning_rate": 2e-3}
    config = make_config({"kind": "rejection", "name": "x", "env": {"name": "sort"}, "rejection": rejection, "eval": {"problems": 48}})
    session = open_session(config, tmp_path / "run")
    result = run_session(session)
    metrics = session.run.metrics()
    assert [m["step"] for m in metrics] == list(range(17))
    assert [m["step"] for m in metrics if "kept" in m] == [1, 9]
    assert [m["step"] for m in metrics if "eval/solved" in m] == [0, 8, 16]
    assert metrics[9]["reward/total"] > metrics[1]["reward/total"] + 0.1
    assert metrics[16]["eval/solved_low"] > metrics[0]["eval/solved_high"]
    assert (result.steps, result.episodes) == (16, 256)
    records = session.run.rollouts(9)
    assert {turn["digest"] for r in records for turn in r["turns"]} == {metrics[8]["adapter/digest"]}
    kept = [r for r in records if r["turns"] and r["turns"][0]["advantage"] == 1.0]
    assert len(kept) == metrics[9]["kept"]
    assert all(r["reward"] == 1.0 for r in kept)
    trained = {session.renderer.decode(d.targets[d.mask == 1]) for row in kept_rows(session, 9) for d in row}
    assert trained == {session.renderer.decode(np.array(r["turns"][0]["tokens"])) for r in kept}


def test_all_turns_of_a_kept_episode_are_trained(tmp_path: Path) -> None:
    """An agent that imitates only its answers forgets to call its tools."""
    rejection = {"rounds": 1, "problems": 24, "group_size": 8, "steps": 1}
    config = make_config({"kind": "rejection", "name": "x", "env": {"name": "calculator"}, "rejection": rejection, "eval": {"problems": 2}})
    session = open_session(config, tmp_path / "run")
    run_session(session)
    kept = [r for r in session.run.rollouts(1) if r["turns"] and r["turns"][0]["advantage"] == 1.0]
    called = [i for i, r in enumerate(kept) if len(r["turns"]) > 1]
    assert called
    rows = kept_rows(session, 1)
    for i in called:
        (datum,) = rows[i]
        text = session.renderer.decode(datum.targets[datum.mask == 1])
        assert text.count("<tool_call>") == len(kept[i]["turns"]) - 1
        assert "<tool_response>" not in text
        assert text == "".join(session.renderer.decode(np.array(turn["tokens"])) for turn in kept[i]["turns"])


@pytest.mark.parametrize("stop_after", [0, 2, 3, 4])
def test_resume_gives_the_same_bytes(tmp_path: Path, stop_after: int) -> None:
    """In the middle of a round, whose episodes were drawn from weights that are gone, and between rounds."""
    whole = open_session(config_for(tmp_path), tmp_path / "whole")
    run_session(whole)
    first = open_session(config_for(tmp_path), tmp_path / "cut")
    first.on_step = lambda metrics: first.stop.set() if metrics["step"] == stop_after else None
    with pytest.raises(Interrupted, match="the state is saved"):
        run_session(first)
    second = open_session(config_for(tmp_path), tmp_path / "cut")
    run_session(second)
    for name in ("metrics.jsonl", "rollouts/step-000001.jsonl", "rollouts/step-000004.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert final_weights(second) == final_weights(whole)


def test_nothing_to_imitate_ends_the_run(tmp_path: Path) -> None:
    """A bar that nothing reaches must not be an hour of sampling in silence."""
    with pytest.raises(RunError, match=r"round 1: none of 16 episodes reached .* the best reward is \d\S*; lower the bar"):
        run_session(open_session(config_for(tmp_path, bar=2.0), tmp_path / "run"))


def test_a_later_round_without_anything_to_imitate_ends_the_run_with_what_it_has(tmp_path: Path) -> None:
    """What the rounds before have trained is not lost, and the same command says the same."""
    session = open_session(config_for(tmp_path, learning_rate=0.3), tmp_path / "run")
    result = run_session(session)
    assert result.steps == SETTINGS["steps"]
    assert result.stopped is not None
    assert result.stopped.startswith("round 2: none of 16 episodes reached rejection.bar = 0.2;")
    assert session.run.metrics()[-1]["step"] == SETTINGS["steps"]
    assert "eval/reward" in session.run.metrics()[-1]
    again = open_session(config_for(tmp_path, learning_rate=0.3), tmp_path / "run")
    assert run_session(again) == result
    assert again.run.metrics() == session.run.metrics()


def test_learning_rate_zero_is_caught(tmp_path: Path) -> None:
    """A run that trains nothing fails at once."""
    with pytest.raises(AttestationError, match="learning rate is 0"):
        run_session(open_session(config_for(tmp_path, learning_rate=0.0), tmp_path / "run"))


def test_a_failing_majority_ends_the_run(tmp_path: Path) -> None:
    """As in RL."""
    config = config_for(tmp_path, "raise")
    config = config.model_copy(update={"env": config.env.model_copy(update={"args": {"fault": "raise", "every": 1}})})
    with pytest.raises(RunError, match=r"rollouts failed, more than env\.max_failed_share"):
        run_session(open_session(config, tmp_path / "run"))
