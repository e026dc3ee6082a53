"""Every choice of the loop, taken: it runs, it does what its name says, and a wrong one is refused before anything is sampled."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_helpers import config_of, engine_of, open_session, run_session

from veneer.train.config import make_config
from veneer.types import ConfigError, RequestError, SamplingParams

CHOICES: list[dict[str, Any]] = [
    *(
        {"advantage": name}
        for name in ("grpo", "rloo", "rloo_length", "reinforce", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "turn")
    ),
    {"advantage": "pass_at_k", "advantage_config": {"k": 2}},
    *({"normalise": name} for name in ("sequence_mean", "token_mean", "max_tokens")),
    *({"correction": name, "correction_level": level} for name in ("truncated", "masked") for level in ("token", "sequence")),
    *({"kl_coef": 0.1, "kl_in": place, "kl_estimator": k} for place in ("reward", "loss") for k in (1, 2, 3)),
    {"entropy_coef": 0.01},
    {"mask_truncated": True},
    {"soft_overlong": 6},
    {"refill": 1.5},
    {"epochs": 2, "minibatches": 3, "loss": "ppo", "loss_config": {"clip_high_threshold": 1.28}},
    {"max_lag": 1},
    {"max_lag": 2, "correction": "truncated", "loss": "cispo"},
]


def run(tmp_path: Path, **rl: Any) -> list[dict[str, Any]]:
    session = open_session(config_of(tmp_path, rl={"learning_rate": 2e-3} | rl), tmp_path / "run")
    run_session(session)
    return session.run.metrics()


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: " ".join(f"{k}={v}" for k, v in choice.items()))
def test_every_choice_trains(tmp_path: Path, choice: dict[str, Any]) -> None:
    """Two steps, finite numbers, and an adapter that changes."""
    metrics = run(tmp_path, **choice)
    assert [m["step"] for m in metrics] == [0, 1, 2]
    assert all(math.isfinite(v) for m in metrics for v in m.values() if isinstance(v, float))
    steps = choice.get("epochs", 1) * choice.get("minibatches", 1)
    assert [m["adapter/version"] for m in metrics[1:]] == [steps, 2 * steps]
    assert len({m["adapter/digest"] for m in metrics}) == 3
    if choice.get("correction", "none") != "none" and not choice.get("max_lag"):
        for m in metrics[1:]:
            assert m["optim/correction_weight"] == pytest.approx(1, abs=1e-3)
            assert m["optim/kl_sample_train_v2"] < 1e-6
    if choice.get("kl_in") == "reward":
        assert metrics[1]["optim/kl_policy_base"] == pytest.approx(0, abs=1e-6)
        assert abs(metrics[2]["optim/kl_policy_base"]) > 1e-6


def test_defaults_are_what_they_were(tmp_path: Path) -> None:
    """A choice that is not taken costs nothing and changes nothing: the same adapter as with every default spelled out."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    plain = run(tmp_path / "a", steps=2)[-1]["adapter/digest"]
    spelled = {"advantage": "group_mean", "normalise": "episodes", "epochs": 1, "minibatches": 1, "kl_coef": 0.0, "entropy_coef": 0.0}
    assert run(tmp_path / "b", steps=2, **spelled)[-1]["adapter/digest"] == plain


@pytest.mark.parametrize("place", ["reward", "loss"])
def test_the_kl_term_holds_the_adapter_to_the_base(tmp_path: Path, place: str) -> None:
    """With the same steps, the trained policy is nearer to the base with a KL term than without, measured on its own samples."""

    def distance(folder: Path, **rl: Any) -> float:
        folder.mkdir()
        settings = {"steps": 8, "groups_per_batch": 4, "group_size": 8, "learning_rate": 4e-3, **rl}
        session = open_session(config_of(folder, rl=settings, eval={"problems": 32}), folder / "run")
        run_session(session)
        engine, found = engine_of(session), []
        prompt = session.renderer.build_generation_prompt([{"role": "user", "content": "say 1"}])
        for sample in engine.sample(prompt, session.adapter, SamplingParams(max_tokens=12), n=64).result():
            row = np.concatenate([prompt, sample.tokens])
            (base,) = engine.sample(row, None, SamplingParams(max_tokens=0), prompt_logprobs=True).result()
            assert base.prompt_logprobs is not None
            found.append(float(sample.logprobs.sum() - base.prompt_logprobs[len(prompt) :].sum()))
        return float(np.mean(found))

    assert distance(tmp_path / "held", kl_coef=1.0, kl_in=place) < 0.6 * distance(tmp_path / "free")


def test_truncated_episodes_are_not_trained_but_count(tmp_path: Path) -> None:
    """An answer that was cut off says nothing about how it would have ended; with every answer cut off, nothing is trained."""
    metrics = run(tmp_path, mask_truncated=True, max_tokens=1)
    assert all(m["truncated"] == m["episodes"] for m in metrics[1:])
    assert all("optim/grad_norm" not in m for m in metrics[1:])


def test_soft_overlong_costs_reward_where_advantages_are_made(tmp_path: Path) -> None:
    """All rewards are the same, lengths are not: only the punishment can tell the members apart, and the reward told is the true one."""
    session = open_session(config_of(tmp_path, "constant", every=1, rl={"soft_overlong": 11, "steps": 1}), tmp_path / "run")
    run_session(session)
    metrics = session.run.metrics()[1]
    assert metrics["reward/total"] == 0.25
    assert metrics["groups/dropped"] < 2
    assert "optim/grad_norm" in metrics


def test_refilled_problems_are_counted_and_never_played_twice(tmp_path: Path) -> None:
    session = open_session(config_of(tmp_path, "constant", every=1, rl={"refill": 1.0, "steps": 3}), tmp_path / "run")
    run_session(session)
    problems = []
    for step, metrics in enumerate(session.run.metrics()[1:], 1):
        assert (metrics["groups"], metrics["groups/dropped"]) == (4, 4)
        lines = (tmp_path / "run" / "rollouts" / f"step-{step:06d}.jsonl").read_text().splitlines()
        problems += [json.loads(line)["problem"] for line in lines]
    assert len(set(problems)) == 12


def test_reward_rises_while_sampling_goes_on(tmp_path: Path) -> None:
    """The asynchronous loop learns too, from samples of at most two steps ago, with its lag told."""
    settings = {"steps": 14, "groups_per_batch": 4, "group_size": 8, "learning_rate": 3e-3, "max_lag": 2}
    metrics = run(tmp_path, **settings)
    rewards = [m["reward/total"] for m in metrics[1:]]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.12
    assert all(m["lag/max"] <= 2 for m in metrics[1:])
    assert any(m["lag/mean"] > 0 for m in metrics[1:])


@pytest.mark.parametrize(
    ("rl", "words"),
    [
        ({"advantage": "grop"}, "unknown advantage 'grop'"),
        ({"advantage": "pass_at_k", "advantage_config": {"k": 0}}, "setting 'k' must be a whole number"),
        ({"advantage_config": {"k": 1}}, "has no setting 'k'"),
        ({"correction": "masked", "correction_config": {"low": 2}}, "low must be from 0 to 1"),
        ({"loss_config": {"clip": 1}}, "has no setting 'clip'"),
    ],
)
def test_wrong_choices_are_refused_before_anything_is_sampled(tmp_path: Path, rl: dict[str, Any], words: str) -> None:
    session = open_session(config_of(tmp_path, rl=rl), tmp_path / "run")
    with pytest.raises(RequestError, match=words):
        run_session(session)
    assert session.run.metrics() == []


@pytest.mark.parametrize(
    ("rl", "words"),
    [
        ({"refill": 1, "max_lag": 1}, "refill and max_lag exclude each other"),
        ({"soft_overlong": 72}, "soft_overlong must be smaller than max_tokens = 72"),
        ({"minibatches": 65}, "more minibatches than episodes"),
        ({"kl_estimator": 4}, "kl_estimator"),
    ],
)
def test_choices_that_exclude_each_other(rl: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_config({"rl": rl})
