"""The noise of a batch's gradient as it is measured in training: by norms that the optimizer reports, and without moving anything."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

import pytest
from training_helpers import config_of, final_weights, open_session, run_session

from veneer.envs import load_env
from veneer.train.advantages import compute_advantages
from veneer.train.datums import groups_to_data
from veneer.train.noise import noise_metrics
from veneer.train.rollouts import Policy, do_rollouts
from veneer.types import AdamParams, SamplingParams


def test_it_is_made_of_the_norms_of_each_group(tmp_path: Path) -> None:
    """A group is stepped on alone, by a rate of nothing, and so are all of them."""
    session = open_session(config_of(tmp_path), tmp_path / "run")
    engine, name = session.engine, session.adapter
    engine.create_adapter(name, session.config.lora_config())
    engine.publish(name).result()
    policy = Policy(engine, session.renderer, name, SamplingParams(max_tokens=12))
    dataset = load_env(session.config.env.name, session.config.env.args)
    groups = asyncio.run(do_rollouts(policy, dataset, "train", range(6), 4, 1))
    advantages = compute_advantages(groups, "group_mean", {})
    data_ED = groups_to_data(groups, advantages)
    ends = list(itertools.accumulate((len(a) for a in advantages if a is not None), initial=0))
    data_GD = [[d for data_D in data_ED[a:b] for d in data_D] for a, b in itertools.pairwise(ends)]
    found = asyncio.run(noise_metrics(session, data_GD, 8, "importance_sampling", {}))  # two more that had no signal

    def norm(data: list) -> float:
        engine.forward_backward(name, data, "importance_sampling").result()
        return engine.optim_step(name, AdamParams(0.0)).result()["grad_norm"]

    small = 8 * sum(norm(data) ** 2 for data in data_GD)
    big = norm([d for data in data_GD for d in data]) ** 2
    assert len(data_GD) > 2
    assert small > big > 0
    assert found["noise/trace"] == pytest.approx((small - big) * 8 / 7, rel=1e-4)
    assert found["noise/signal"] == pytest.approx((8 * big - small) / 7, rel=1e-4, abs=1e-4 * small)


def test_measuring_moves_nothing(tmp_path: Path) -> None:
    """A run that measures at every step ends with the bytes of one that never does."""
    ends = []
    for every in (1, 100):
        folder = tmp_path / str(every)
        folder.mkdir()
        session = open_session(config_of(folder, eval={"problems": 4, "every": every}, rl={"steps": 3}), folder / "run")
        run_session(session)
        ends.append(final_weights(session))
        measured = [m["step"] for m in session.run.metrics() if "noise/trace" in m]
        assert measured == ([1, 2, 3] if every == 1 else [])
    assert ends[0] == ends[1]
