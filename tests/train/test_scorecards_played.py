"""The scorecard as it is played: a policy beside itself, divergences against sums over the whole vocabulary, failures."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_helpers import ENV

from veneer.engine import LoraEngine, load_base
from veneer.envs import load_env
from veneer.render import load_renderer
from veneer.train import scorecard
from veneer.train.config import ScorecardSettings
from veneer.train.rollouts import Policy
from veneer.train.scorecard import Measured, Played, measure_scorecard
from veneer.types import AdamParams, ConfigError, Datum, EnvDataset, LoraConfig, RunError, SamplingParams

SMALL = ScorecardSettings(problems=6, tries=16)


@pytest.fixture(scope="module")
def base() -> Policy:
    engine = LoraEngine(load_base("nano", "cpu"))
    return Policy(engine, load_renderer("nano"), None, SamplingParams(max_tokens=24))


@pytest.fixture(scope="module")
def moved(base: Policy) -> Policy:
    """An adapter that some gradients have moved a little way from the base."""
    engine, rng = base.engine, np.random.default_rng(0)
    engine.create_adapter("moved", LoraConfig(rank=4, seed=1))
    tokens = rng.integers(0, 300, 40)
    zeros = np.zeros(39, np.float32)
    for _ in range(4):
        engine.forward_backward("moved", [Datum(tokens[:-1], tokens[1:], zeros, zeros, zeros + 1)], "cross_entropy").result()
        engine.optim_step("moved", AdamParams(6e-3)).result()
    engine.publish("moved").result()
    return replace(base, adapter="moved")


def measured(
    start: Policy,
    end: Policy,
    settings: ScorecardSettings = SMALL,
    env: EnvDataset | None = None,
    limit: float = 0.5,
    base: Policy | None = None,
) -> Measured:
    return asyncio.run(measure_scorecard(start, end, env or load_env("sort", {}), settings, limit, seed=0, base=base))


@pytest.fixture
def odd(tmp_path: Path) -> Callable[..., EnvDataset]:
    """An environment whose prompts the base has never seen, so that it does not know what to say first; with faults."""
    path = tmp_path / "odd_env.py"
    path.write_text(ENV)
    return lambda **args: load_env(f"{path}:odd", args)


def test_a_policy_beside_itself_has_not_moved(base: Policy) -> None:
    found = measured(base, base, ScorecardSettings(problems=6, tries=16, envs=("count",), elsewhere=12))
    card = found.card
    assert {c.difference.value for c in (card.reward, card.tokens, *card.pass_at_k.values())} == {0.0}
    assert card.reward.start.value > 0
    for side in (found.divergence.forward, found.divergence.reverse):
        assert abs(side["value"]) < 1e-6
        assert side["episodes"] == 6 * 8
    (elsewhere,) = found.elsewhere
    assert (elsewhere.env, elsewhere.reward.difference.value, elsewhere.reward.problems) == ("count", 0.0, 12)
    assert found.episodes == 2 * (6 * 16 + 12)


def test_it_is_the_same_again_and_turned_around(base: Policy, moved: Policy) -> None:
    there, again, back = measured(base, moved), measured(base, moved), measured(moved, base)
    assert replace(there, seconds=0.0) == replace(again, seconds=0.0)
    assert there.card.reward.difference.value == pytest.approx(-back.card.reward.difference.value)
    assert there.divergence.forward == back.divergence.reverse
    assert (list(there.card.gained), list(there.card.lost)) == (list(back.card.lost), list(back.card.gained))
    assert there.divergence.forward["value"] > 0


def test_a_start_that_is_known_is_not_played_again(base: Policy, moved: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """And everything that is said of it is the same; a scorecard on other draws plays it."""
    played: list[str | None] = []
    play = scorecard.do_rollouts

    def counted(policy: Policy, *rest: Any) -> Any:
        played.append(policy.adapter)
        return play(policy, *rest)

    monkeypatch.setattr(scorecard, "do_rollouts", counted)
    settings, known = ScorecardSettings(problems=4, tries=4, envs=("count",), elsewhere=6), {}

    def once(seed: int, known: Played | None) -> Measured:
        dataset = load_env("sort", {})
        return asyncio.run(measure_scorecard(base, moved, dataset, settings, 0.5, seed, known=known))

    plain, first, again = once(0, None), once(0, known), once(0, known)
    assert replace(plain, seconds=0.0) == replace(first, seconds=0.0) == replace(again, seconds=0.0)
    assert played == [None, "moved"] * 4 + ["moved"] * 2
    once(1, known)
    assert played[10:] == [None, "moved"] * 2


def test_one_that_began_from_an_adapter_is_measured_from_the_base_too(base: Policy, moved: Policy) -> None:
    """By the same draws, so to the last bit what it is beside the base."""
    beside_base, beside_itself = measured(base, moved), measured(moved, moved, base=base)
    assert beside_base.from_base is None
    assert abs(beside_itself.divergence.forward["value"]) < 1e-6
    assert beside_itself.from_base == beside_base.divergence
    assert beside_itself.episodes == beside_base.episodes + SMALL.problems * min(8, SMALL.tries)


def test_divergences_are_those_of_the_whole_vocabulary(base: Policy, moved: Policy, odd: Callable[..., EnvDataset]) -> None:
    """Of episodes of one token, the sum over all tokens is at hand."""
    params = SamplingParams(max_tokens=1)
    start, end = replace(base, params=params), replace(moved, params=params)
    dataset = odd()
    found = measured(start, end, ScorecardSettings(problems=60, tries=8), dataset)
    exact = {"forward": [], "reverse": []}
    for index in range(5):  # there are no others
        first = asyncio.run(dataset.env("eval", index).initial_observation())
        prompt = base.renderer.build_generation_prompt(first.messages)
        whole = [
            base.engine.sample(prompt, policy.adapter, SamplingParams(max_tokens=1), top_logprobs=base.engine.base.vocab_size).result()[0]
            for policy in (start, end)
        ]
        p, q = (by_token(sample.top_logprobs.tokens[0], sample.top_logprobs.logprobs[0]) for sample in whole)
        exact["forward"].append(float((np.exp(p) * (p - q)).sum()))
        exact["reverse"].append(float((np.exp(q) * (q - p)).sum()))
    for side, values in exact.items():
        estimate = getattr(found.divergence, side)
        assert estimate["low"] <= np.mean(values) <= estimate["high"]
        assert estimate["value"] == pytest.approx(np.mean(values), rel=0.3)
        assert np.mean(values) > 0.01
        assert estimate["per_token"] == pytest.approx(estimate["value"])


def by_token(tokens: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
    found = np.empty(len(tokens))
    found[tokens] = logprobs
    return found


def test_a_name_that_there_is_not_costs_no_episode(base: Policy) -> None:
    with pytest.raises(ConfigError, match="sorrt"):
        measured(base, base, ScorecardSettings(problems=6, tries=16, envs=("sorrt",)))


def test_too_many_failures_are_no_scorecard(base: Policy, odd: Callable[..., EnvDataset]) -> None:
    few = ScorecardSettings(problems=4, tries=2)
    with pytest.raises(RunError, match=r"2 of 8 rollouts failed.*grader"):
        measured(base, base, few, odd(fault="raise", every=4), limit=0.2)
    assert measured(base, base, few, odd(fault="raise", every=4), limit=0.5).card.tries == 2
