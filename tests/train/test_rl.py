"""Reinforcement learning: it learns, it counts what fails, and it stops when the weights are not what they should be."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from training_helpers import config_of, open_session, run_session

from veneer.types import RequestError, RunError

STEP_KEYS = {
    *("step", "episodes", "failed", "truncated", "reward/total", "by_group/frac_mixed", "by_group/frac_all_good", "by_group/frac_all_bad"),
    *("groups/dropped", "bits", "optim/entropy", "tokens/mean", "optim/lr", "adapter/version", "adapter/digest", "env/all/length"),
}
TRAINED_KEYS = {"optim/kl_sample_train_v1", "optim/kl_sample_train_v2", "optim/grad_norm", "optim/loss", "optim/ratio"}
EVAL_KEYS = {"eval/solved", "eval/solved_low", "eval/solved_high", "eval/problems", "eval/reward", "eval/tokens", "eval/failed"}


def rollouts(folder: Path, step: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rollouts" / f"step-{step:06d}.jsonl").read_text().splitlines()]


def test_reward_rises(tmp_path: Path) -> None:
    """The point of it all: rank 1, a reward that anything can learn, a clear rise; and what it writes down."""
    settings = {"steps": 12, "groups_per_batch": 4, "group_size": 8, "learning_rate": 1.5e-3}
    session = open_session(config_of(tmp_path, rl=settings, eval={"problems": 16}), tmp_path / "run")
    result = run_session(session)
    metrics = session.run.metrics()
    rewards = [m["reward/total"] for m in metrics[1:]]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.15
    assert metrics[-1]["eval/reward"] > metrics[0]["eval/reward"] + 0.15

    assert [m["step"] for m in metrics] == list(range(13))
    assert (result.steps, result.episodes, result.stopped) == (12, 12 * 32, None)
    assert result.bits == pytest.approx(sum(m["bits"] for m in metrics[1:]))
    assert set(metrics[0]) >= EVAL_KEYS
    assert set(metrics[-1]) >= EVAL_KEYS
    for m in metrics[1:]:
        assert set(m) >= STEP_KEYS | TRAINED_KEYS
        assert all(math.isfinite(v) for v in m.values() if isinstance(v, float))
        assert m["optim/kl_sample_train_v2"] < 1e-6
        assert m["optim/ratio"] == pytest.approx(1, abs=1e-4)
    assert [m["adapter/version"] for m in metrics[1:]] == list(range(1, 13))
    assert len({m["adapter/digest"] for m in metrics}) == 13

    for step in (1, 12):
        records = rollouts(tmp_path / "run", step)
        assert len(records) == 32
        sampled_from = metrics[step - 1]["adapter/digest"]
        for record in records:
            (turn,) = record["turns"]
            assert turn["digest"] == sampled_from
            assert len(turn["tokens"]) == len(turn["logprobs"]) <= 12
            assert all(p <= 0 for p in turn["logprobs"])
        for problem in {r["problem"] for r in records}:
            group = [r for r in records if r["problem"] == problem]
            mean = sum(r["reward"] for r in group) / 8
            if len({r["reward"] for r in group}) > 1:
                assert [r["turns"][0]["advantage"] for r in group] == pytest.approx([r["reward"] - mean for r in group])


@pytest.mark.parametrize("loss", ["ppo", "cispo", "dro", "gspo"])
def test_every_loss_takes_a_step(tmp_path: Path, loss: str) -> None:
    """A loss in the configuration that the loop cannot run is a trap."""
    session = open_session(config_of(tmp_path, rl={"steps": 1, "loss": loss}), tmp_path / "run")
    run_session(session)
    assert session.run.metrics()[1]["optim/grad_norm"] > 0


def test_wrong_loss_setting_is_named(tmp_path: Path) -> None:
    """A misspelt threshold must not be ignored."""
    session = open_session(config_of(tmp_path, rl={"loss": "ppo", "loss_config": {"clip_hi": 1.0}}), tmp_path / "run")
    with pytest.raises(RequestError, match="clip_hi"):
        run_session(session)


@pytest.mark.parametrize(
    ("fault", "words"), [("constant", "no group of the last 2 steps"), ("solved", "every group of the last 2 steps was solved")]
)
def test_constant_groups_are_dropped_and_the_run_stops(tmp_path: Path, fault: str, words: str) -> None:
    """Hours of steps without one bit of reward look like training and are none."""
    config = config_of(tmp_path, fault, every=1, rl={"steps": 50, "max_useless_steps": 2})
    session = open_session(config, tmp_path / "run")
    result = run_session(session)
    assert result.stopped is not None
    assert words in result.stopped
    metrics = session.run.metrics()
    assert len(metrics) == 3
    for m in metrics[1:]:
        assert (m["groups/dropped"], m["bits"], m["by_group/frac_mixed"], m["adapter/version"]) == (2, 0, 0, 0)
        assert "optim/grad_norm" not in m
    assert "eval/solved" in metrics[-1]
    assert all(not any(t["advantage"] for t in r["turns"]) for r in rollouts(tmp_path / "run", 1))


FAULTS = [
    ("raise", "step raised KeyError"),
    ("nan", "finite number"),
    ("inf", "finite number"),
    ("none", "reward None"),
    ("spin", "step took longer than 0.3 s"),
    ("sleep", "step took longer than 0.3 s"),
    ("first_raise", "initial_observation raised OSError"),
    ("first_none", "initial_observation"),
    ("no_result", "step"),
    ("bad_metrics", "step"),
    ("sync_raise", "ValueError"),
    ("no_env", "no problem today"),
]


@pytest.mark.parametrize(("fault", "words"), FAULTS)
def test_a_failing_minority_is_recorded_and_counted(tmp_path: Path, fault: str, words: str) -> None:
    """One bad episode in four must not end a night's run, nor be trained on, nor vanish."""
    session = open_session(config_of(tmp_path, fault, rl={"steps": 1}), tmp_path / "run")
    run_session(session)
    metrics = session.run.metrics()
    assert metrics[0]["eval/failed"] == 1
    assert (metrics[1]["failed"], metrics[1]["episodes"]) == (2, 8)
    records = rollouts(tmp_path / "run", 1)
    failed = [r for r in records if r["error"] is not None]
    assert len(failed) == 2
    assert all(words in r["error"] and not any(t["advantage"] for t in r["turns"]) for r in failed)
    finished = [r["reward"] for r in records if r["error"] is None]
    assert metrics[1]["reward/total"] == pytest.approx(sum(finished) / 6)


@pytest.mark.parametrize("fault", ["raise", "none"])
def test_a_failing_majority_ends_the_run(tmp_path: Path, fault: str) -> None:
    """A broken grader must not burn a night."""
    session = open_session(config_of(tmp_path, fault, every=1), tmp_path / "run")
    with pytest.raises(RunError, match=r"4 of 4 rollouts failed, more than env.max_failed_share = 0.5; 4 times: step") as caught:
        run_session(session)
    assert "\n" not in str(caught.value)


def test_a_failing_share_is_judged_at_each_step(tmp_path: Path) -> None:
    """A limit of a quarter bears a quarter and not more."""
    run_session(open_session(config_of(tmp_path, "raise", rl={"steps": 1}, env={"max_failed_share": 0.25}), tmp_path / "bears"))
    with pytest.raises(RunError, match="rollouts failed"):
        run_session(open_session(config_of(tmp_path, "raise", rl={"steps": 1}, env={"max_failed_share": 0.2}), tmp_path / "ends"))
