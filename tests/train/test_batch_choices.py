"""Normalisation, KL in the reward, corrections and lengths: by hand, against the cookbook's formula, and on a real engine."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_advantages import episode

from veneer.engine import LocalEngine, LoraEngine, load_base
from veneer.train.corrections import CORRECTIONS, LEVELS, correct, resolve_correction
from veneer.train.kl import ESTIMATORS, kl_penalty
from veneer.train.lengths import punish_overlong, soft_overlong
from veneer.train.normalise import NORMALISATIONS, normalise
from veneer.types import AdamParams, DataError, Datum, Floats, LoraConfig, LossName, RequestError, SamplingParams, TrajectoryGroup


def row(mask: Sequence[float], logprobs: Sequence[float] | None = None, advantages: Sequence[float] | None = None) -> Datum:
    n = len(mask)
    arrays = [np.array(x if x is not None else [0.0] * n, np.float32) for x in (logprobs, advantages, mask)]
    return Datum(np.arange(n), np.arange(n) + 1, *arrays)


def floats(*values: float) -> Floats:
    return np.array(values, np.float32)


def logs(*values: float) -> Floats:
    return np.log(np.array(values)).astype(np.float32)


# ---------------------------------------------------------------- normalisation


DATA_ED = [[row([0, 1, 1]), row([1])], [row([0, 1])], []]
"""An episode of 3 tokens in two rows, one of 1, and one that is masked."""


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("episodes", 1 / 8, 1 / 8),
        ("sequence_mean", 1 / (8 * 3), 1 / 8),
        ("token_mean", 1 / 4, 1 / 4),
        ("max_tokens", 1 / (8 * 10), 1 / (8 * 10)),
    ],
)
def test_normalisations_by_hand(name: str, first: float, second: float) -> None:
    """A batch of 8 episodes of at most 10 tokens, of which two train, with 3 tokens and 1."""
    found = normalise(DATA_ED, name, episodes=8, max_tokens=10)
    assert [[d.mask.tolist() for d in data_D] for data_D in found] == [
        [pytest.approx([0, first, first]), pytest.approx([first])],
        [pytest.approx([0, second])],
        [],
    ]
    assert found[0][0].mask.dtype == np.float32
    assert DATA_ED[0][0].mask.tolist() == [0, 1, 1], "what was given stays as it is"


def test_token_mean_of_a_whole_batch() -> None:
    """Those of groups that were dropped count if they are told, as TRL counts them."""
    (first, *_) = normalise(DATA_ED, "token_mean", episodes=8, max_tokens=10, tokens=20)
    assert first[0].mask.tolist() == pytest.approx([0, 0.05, 0.05])


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8))
def test_weights_add_up_to_what_they_say(lengths: list[int]) -> None:
    """Mean over tokens and mean over sequences have weights of 1 in all; the others the mean length, in tokens or in limits."""
    data_ED = [[row([0, 0] + [1] * n)] for n in lengths]
    for name, wanted in {"sequence_mean": 1, "token_mean": 1, "episodes": np.mean(lengths), "max_tokens": np.mean(lengths) / 30}.items():
        found = normalise(data_ED, name, episodes=len(lengths), max_tokens=30)
        assert sum(float(d.mask.sum(dtype=float)) for data_D in found for d in data_D) == pytest.approx(wanted, rel=1e-5)


def test_unknown_normalisations_are_named() -> None:
    with pytest.raises(RequestError, match="unknown normalisation 'tokens'; there are episodes, sequence_mean, token_mean, max_tokens"):
        normalise([], "tokens", episodes=1, max_tokens=1)
    assert normalise([[]], "token_mean", episodes=1, max_tokens=1) == [[]]
    assert set(NORMALISATIONS) == {"episodes", "sequence_mean", "token_mean", "max_tokens"}


# ---------------------------------------------------------------- KL in the reward


@pytest.mark.parametrize(
    ("estimator", "first", "second"),
    [(1, math.log(2), -math.log(2)), (2, math.log(2) ** 2 / 2, math.log(2) ** 2 / 2), (3, 0.5 - 1 + math.log(2), 2 - 1 - math.log(2))],
)
def test_the_estimators_by_hand(estimator: int, first: float, second: float) -> None:
    """Probabilities 1/2 against the reference's 1/4, and 1/4 against 1/2: log ratios ln 2 and -ln 2, r = 1/2 and 2."""
    found = ESTIMATORS[estimator](np.log([0.5, 0.25]), np.log([0.25, 0.5]))
    assert found.tolist() == pytest.approx([first, second])


def test_kl_penalty_by_hand() -> None:
    """Log ratios 1 and -1 in one row, 3 in another: mean 1. With coef 0.1 the advantages change by 0.1 (1 - kl) = 0, 0.2 and -0.2; a
    token without weight is not touched, whatever its numbers."""
    data = [row([0, 1, 1], [9, -1, -2], [0, 0.5, 0.5]), row([1], [-1], [-1])]
    found, metrics = kl_penalty(data, [floats(np.nan, -2, -1), floats(-4)], 0.1)
    assert metrics == {"kl_policy_base": pytest.approx(1.0)}
    assert found[0].advantages.tolist() == pytest.approx([0, 0.5, 0.7])
    assert found[1].advantages.tolist() == pytest.approx([-1.2])
    assert np.array_equal(found[0].mask, data[0].mask)


def test_kl_penalty_of_what_follows_by_hand() -> None:
    """Log ratios 1, nothing, 3 and 2: mean 2, terms 1, 0, -1 and 0. Discount 1/2 over positions: 1 - 1/4, -, -1, 0."""
    (found,), _ = kl_penalty([row([1, 0, 1, 1])], [floats(-1, -7, -3, -2)], 1.0, discount=0.5)
    assert found.advantages.tolist() == pytest.approx([0.75, 0, -1, 0])


def cookbook(data: Sequence[Datum], references: Sequence[Floats], coef: float, gamma: float) -> list[Floats]:
    """tinker_cookbook/rl/metrics.py, incorporate_kl_penalty, as it says it: written anew."""
    gaps = [(d.logprobs - r) * d.mask for d, r in zip(data, references, strict=True)]
    mean = sum(g.sum() for g in gaps) / sum(d.mask.sum() for d in data)
    found = []
    for d, gap in zip(data, gaps, strict=True):
        added = coef * d.mask * (mean - gap)
        if gamma > 0:
            added = np.array([sum(gamma ** (j - i) * added[j] for j in range(i, len(added))) for i in range(len(added))])
        found.append(d.advantages + added)
    return found


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), gamma=st.sampled_from([0.0, 0.5, 1.0]))
def test_the_penalty_is_the_cookbooks(seed: int, gamma: float) -> None:
    """Where a token trains; what the cookbook writes onto others nobody reads."""
    rng = np.random.default_rng(seed)
    data = [
        row((rng.uniform(size=n) < 0.7).astype(float), rng.normal(-2, 1, n), rng.normal(0, 1, n))
        for n in rng.integers(1, 9, rng.integers(1, 4))
    ]
    data[0].mask[0] = 1
    references = [(d.logprobs + rng.normal(0, 0.5, len(d.mask))).astype(np.float32) for d in data]
    found, _ = kl_penalty(data, references, 0.3, discount=gamma)
    for ours, theirs, d in zip(found, cookbook(data, references, 0.3, gamma), data, strict=True):
        np.testing.assert_allclose(ours.advantages[d.mask != 0], theirs[d.mask != 0], atol=1e-5)
        assert np.array_equal(ours.advantages[d.mask == 0], d.advantages[d.mask == 0])


def test_a_penalty_does_not_depend_on_weights() -> None:
    """So that it may come before or behind the normalisation."""
    data, references = [row([1, 1], [-1, -2]), row([0, 1], [0, -1])], [floats(-2, -1), floats(0, -3)]
    scaled = [dataclasses.replace(d, mask=d.mask / 64) for d in data]
    one, other = (kl_penalty(given, references, 0.5)[0] for given in (data, scaled))
    assert all(np.array_equal(a.advantages, b.advantages) for a, b in zip(one, other, strict=True))


def test_wrong_penalties_are_told() -> None:
    data = [row([1, 1], [-1, -2])]
    with pytest.raises(DataError, match="datum 0 has no finite reference"):
        kl_penalty(data, [floats(-1, np.nan)], 0.1)
    with pytest.raises(DataError, match="datum 0 has no finite reference"):
        kl_penalty(data, [floats(-1)], 0.1)
    with pytest.raises(RequestError, match="estimator must be 1, 2 or 3"):
        kl_penalty(data, [floats(-1, -1)], 0.1, estimator=0)
    assert kl_penalty([], [], 0.1) == ([], {"kl_policy_base": 0.0})


# ---------------------------------------------------------------- corrections


def corrected(name: str, level: str, low: float, high: float) -> tuple[list[list[float]], dict[str, float]]:
    """Sampled at probabilities 1/2, 1/2, 1/2 and 1/10; the trainer gives them 1/4, 3/4, 1/2 and 1/2. Token ratios 1/2, 3/2, 1 and 5; rows
    3/4 and 5. Weights before: 1, 2, 1 and 1, and a token without."""
    data = [row([1, 0, 2, 1], [*logs(0.5), 0, *logs(0.5, 0.5)]), row([1], logs(0.1))]
    old = [np.array([*logs(0.25), np.nan, *logs(0.75, 0.5)], np.float32), logs(0.5)]
    found, metrics = correct(data, old, name, level, {"low": low, "high": high})
    assert [d.logprobs.tolist() for d in found] == [pytest.approx([*logs(0.25), 0, *logs(0.75, 0.5)]), pytest.approx(logs(0.5).tolist())]
    return [d.mask.tolist() for d in found], metrics


@pytest.mark.parametrize(
    ("name", "level", "bounds", "masks", "weight", "share"),
    [
        ("truncated", "token", (0.0, 1.2), [[0.5, 0, 2.4, 1], [1.2]], (0.5 + 1.2 + 1 + 1.2) / 4, 2 / 4),
        ("truncated", "token", (0.8, 1.2), [[0.8, 0, 2.4, 1], [1.2]], (0.8 + 1.2 + 1 + 1.2) / 4, 3 / 4),
        ("masked", "token", (0.6, 2.0), [[0, 0, 3, 1], [0]], (0 + 1.5 + 1 + 0) / 4, 2 / 4),
        ("truncated", "sequence", (0.0, 2.0), [[0.75, 0, 1.5, 0.75], [2]], (3 * 0.75 + 2) / 4, 1 / 2),
        ("masked", "sequence", (0.5, 2.0), [[0.75, 0, 1.5, 0.75], [0]], 3 * 0.75 / 4, 1 / 2),
    ],
)
def test_corrections_by_hand(name: str, level: str, bounds: tuple[float, float], masks: list, weight: float, share: float) -> None:
    """Each bound from either side."""
    found, metrics = corrected(name, level, *bounds)
    assert found == [pytest.approx(m, abs=1e-6) for m in masks]
    assert metrics["correction_weight"] == pytest.approx(weight, rel=1e-6)
    assert metrics["correction_share"] == pytest.approx(share)


def test_the_drift_that_is_corrected_by_hand() -> None:
    """q - p: ln 2, -ln 1.5, 0 and -ln 5; w: 1/2, 3/2, 1 and 5."""
    _, metrics = corrected("truncated", "token", 0.0, 2.0)
    gaps = [math.log(2), -math.log(1.5), 0.0, -math.log(5)]
    assert metrics["kl_sample_train_v1"] == pytest.approx(sum(gaps) / 4, rel=1e-6)
    assert metrics["kl_sample_train_v2"] == pytest.approx(sum(g * g for g in gaps) / 8, rel=1e-6)
    assert metrics["kl_sample_train_v3"] == pytest.approx(sum(math.exp(-g) - 1 + g for g in gaps) / 4, rel=1e-6)


@pytest.mark.parametrize("name", CORRECTIONS)
@pytest.mark.parametrize("level", LEVELS)
@settings(deadline=None)
@given(seed=st.integers(0, 10**6))
def test_equal_log_probabilities_need_no_correction(name: str, level: str, seed: int) -> None:
    """To the last bit: a run whose sampler is right trains the same numbers with it and without."""
    rng = np.random.default_rng(seed)
    data = [row(rng.uniform(size=n) < 0.8, rng.normal(-2, 1, n), rng.normal(0, 1, n)) for n in rng.integers(1, 9, 3)]
    data = [dataclasses.replace(d, logprobs=np.where(d.mask != 0, d.logprobs, np.float32(0))) for d in data]
    found, metrics = correct(data, [d.logprobs for d in data], name, level)
    for ours, d in zip(found, data, strict=True):
        assert all(np.array_equal(getattr(ours, f), getattr(d, f)) for f in ("mask", "logprobs", "advantages"))
    if metrics:
        assert metrics == {"correction_weight": 1, "correction_share": 0, **{f"kl_sample_train_v{k}": 0 for k in (1, 2, 3)}}


@settings(deadline=None)
@given(seed=st.integers(0, 10**6))
def test_without_bounds_it_is_importance_sampling(seed: int) -> None:
    """Both kinds, at both levels: the mean of w f over the sampler is the mean of f over the trainer; and order does not matter."""
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet(np.ones(5)), rng.dirichlet(np.ones(5))
    f = rng.normal(0, 1, 5)
    data = [row([1], [math.log(x)]) for x in q]
    old = [floats(math.log(x)) for x in p]
    for name in CORRECTIONS:
        for level in LEVELS:
            found, _ = correct(data, old, name, level, {"low": 0.0, "high": 1e9})
            assert sum(q[i] * float(d.mask[0]) * f[i] for i, d in enumerate(found)) == pytest.approx(float(p @ f), abs=1e-5)
            back, _ = correct(data[::-1], old[::-1], name, level, {"low": 0.0, "high": 1e9})
            assert [d.mask.tolist() for d in back[::-1]] == [d.mask.tolist() for d in found]


def test_a_ratio_beyond_all_numbers_is_out_of_bounds() -> None:
    """A row of 2,000 tokens at another distribution must not make inf or NaN of the weights."""
    data, old = [row([1] * 2000, [-2.0] * 2000)], [np.full(2000, -1.0, np.float32)]
    (masked,), metrics = correct(data, old, "masked", "sequence")
    assert not masked.mask.any()
    assert metrics["correction_share"] == 1
    (truncated,), _ = correct(data, old, "truncated", "sequence")
    assert set(truncated.mask.tolist()) == {2.0}


@pytest.mark.parametrize(
    ("name", "level", "config", "words"),
    [
        ("clipped", "token", None, "unknown correction 'clipped'; there are truncated, masked"),
        ("masked", "row", None, "unknown level 'row' of a correction; there are token, sequence"),
        ("masked", "token", {"hihg": 2.0}, "has no setting 'hihg'; it has low, high"),
        ("masked", "token", {"low": 1.5}, "low must be from 0 to 1 and high at least 1; got 1.5 and 5"),
        ("truncated", "token", {"high": math.inf}, "must be a finite number, and is inf"),
    ],
)
def test_wrong_corrections_are_told(name: str, level: str, config: dict | None, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        resolve_correction(name, level, config)


def test_missing_log_probabilities_are_told() -> None:
    with pytest.raises(DataError, match="datum 1 has no finite log-probability"):
        correct([row([1]), row([1, 0])], [floats(-1), floats(np.nan, -1)], "masked")
    assert correct([], [], "masked") == ([], {})


# ---------------------------------------------------------------- lengths


@pytest.mark.parametrize(("length", "wanted"), [(0, 0), (80, 0), (85, -0.25), (90, -0.5), (100, -1), (130, -1)])
def test_soft_overlong_by_hand(length: int, wanted: float) -> None:
    """At most 100 tokens with a cache of 20: (80 - length) / 20 from 80 on."""
    assert soft_overlong(length, 100, 20) == wanted


def test_punishment_is_added_to_the_reward() -> None:
    """By the longest turn, which is what max_tokens limits; a failed episode has no reward to add to."""
    members = [episode([0.0, 1.0], tokens=95), episode([1.0], tokens=10), episode([0.0], tokens=100, error="no")]
    (found,) = punish_overlong([TrajectoryGroup(3, members)], 100, 20)
    assert [t.reward for t in found.trajectories_G] == [0.25, 1.0, 0.0]
    assert found.index == 3
    assert [t.reward for t in found.trajectories_G[0].transitions] == [0.0, 1.0], "what the environment said stays"


@pytest.mark.parametrize("cache", [0, -1, 101])
def test_wrong_caches_are_told(cache: int) -> None:
    with pytest.raises(RequestError, match="its cache must be from 1 to max_tokens = 100 tokens"):
        soft_overlong(3, 100, cache)


# ---------------------------------------------------------------- on a real engine


@pytest.fixture(scope="module")
def engine() -> LocalEngine:
    engine = LoraEngine(load_base("nano"))
    engine.create_adapter("sampler", LoraConfig(rank=2))
    engine.publish("sampler").result()
    return engine


def sampled(engine: LocalEngine) -> list[Datum]:
    """Rows of different lengths from the base's own distribution, with advantages of both signs."""
    rng, data = np.random.default_rng(0), []
    for i, n in enumerate((5, 9, 12, 3)):
        prompt = rng.integers(3, 60, 4)
        (sample,) = engine.sample(prompt, "sampler", SamplingParams(max_tokens=n, stop_token_ids=(), seed=i)).result()
        whole = np.concatenate([prompt, sample.tokens])
        zeros = np.zeros(3, np.float32)
        q, mask = np.concatenate([zeros, sample.logprobs]), np.concatenate([zeros, np.ones(n, np.float32)])
        data.append(Datum(whole[:-1], whole[1:], q, mask * np.float32(rng.normal()), mask))
    return data


def trained(engine: LocalEngine, data: Sequence[Datum], loss: LossName, steps: int) -> dict[str, Floats]:
    """Weights and moments of a fresh adapter after some steps on the same rows, all but the first of them off policy."""
    engine.create_adapter("x", LoraConfig(rank=2))
    for _ in range(steps):
        engine.forward_backward("x", data, loss).result()
        engine.optim_step("x", AdamParams(learning_rate=0.02)).result()
    state = engine.save_state("x").result()
    engine.remove_adapter("x")
    return {**state.weights, **{name: array for name, array in state.optimizer.items() if name != "step"}}


def divided(engine: LocalEngine, episodes: int) -> tuple[list[Datum], list[Datum]]:
    """Rows with divided advantages, and with divided weights."""
    data = sampled(engine)
    (normal,) = normalise([data], "episodes", episodes=episodes, max_tokens=12)
    return [dataclasses.replace(d, advantages=d.advantages / np.float32(episodes)) for d in data], normal


RATIO_LOSSES = ("importance_sampling", "ppo", "cispo", "gspo")


@pytest.mark.parametrize("loss", RATIO_LOSSES)
def test_dividing_weights_by_a_power_of_two_changes_no_bit(engine: LocalEngine, loss: LossName) -> None:
    """Recorded runs, whose advantages were divided, stay what they were."""
    before, after = (trained(engine, data, loss, steps=3) for data in divided(engine, 64))
    for name, array in before.items():
        assert np.array_equal(array, after[name]), name


@pytest.mark.parametrize("loss", RATIO_LOSSES)
def test_dividing_weights_by_another_number_changes_the_rounding(engine: LocalEngine, loss: LossName) -> None:
    """Of the gradient, which is ten times the first moment of the first step."""
    before, after = (trained(engine, data, loss, steps=1) for data in divided(engine, 60))
    for name, array in before.items():
        if name.startswith("m."):
            assert np.linalg.norm(after[name] - array) <= 1e-6 * np.linalg.norm(array), name


def test_dros_penalty_is_divided_with_the_rest(engine: LocalEngine) -> None:
    """It was not, when the advantage alone was divided: the more episodes, the less they counted beside it."""
    data = [dataclasses.replace(d, logprobs=d.logprobs - d.mask) for d in sampled(engine)]
    (normal,) = normalise([data], "episodes", episodes=64, max_tokens=12)
    whole, parts = (engine.forward("sampler", rows, "dro").result().metrics for rows in (data, normal))
    assert parts["loss:sum"] == pytest.approx(whole["loss:sum"] / 64, rel=1e-6)


def test_fresh_samples_need_no_correction_and_a_fresh_adapter_no_penalty(engine: LocalEngine) -> None:
    """The engine's two passes, as the loop takes them: the weights before the step, and the base with the adapter off."""
    data = sampled(engine)
    old = engine.forward("sampler", data, "importance_sampling").result().logprobs_D
    base = engine.forward(None, data, "importance_sampling").result().logprobs_D
    for level in LEVELS:
        found, metrics = correct(data, old, "masked", level)
        assert metrics["correction_share"] == 0
        assert metrics["correction_weight"] == pytest.approx(1, abs=1e-4)
        assert all(np.allclose(a.mask, b.mask, atol=1e-4) for a, b in zip(found, data, strict=True))
    penalised, metrics = kl_penalty(data, base, 0.5)
    assert metrics["kl_policy_base"] == pytest.approx(0, abs=1e-5)
    assert all(np.allclose(a.advantages, b.advantages, atol=1e-4) for a, b in zip(penalised, data, strict=True))


def test_a_wrong_sampler_is_corrected_towards_the_trainer(engine: LocalEngine) -> None:
    """Log-probabilities that are off by noise, as other kernels make them: the loss's ratio is 1 again, and the weights carry the rest."""
    rng = np.random.default_rng(1)
    data = [
        dataclasses.replace(d, logprobs=(d.logprobs + d.mask * rng.normal(0, 0.3, len(d.mask))).astype(np.float32)) for d in sampled(engine)
    ]
    old = engine.forward("sampler", data, "importance_sampling").result().logprobs_D
    found, told = correct(data, old, "truncated", "token", {"high": 1.3})
    metrics = engine.forward("sampler", found, "ppo").result().metrics
    assert told["kl_sample_train_v2"] > 0.01
    assert 0 < told["correction_share"] < 1
    assert metrics["kl_sample_train_v2:mean"] < 1e-8
    assert metrics["ratio:mean"] == pytest.approx(1, abs=1e-5)
    weights = [float(w) for d in found for w in d.mask if w]
    wanted = [min(math.exp(p - q), 1.3) for d, o in zip(data, old, strict=True) for m, p, q in zip(d.mask, o, d.logprobs, strict=True) if m]
    assert weights == pytest.approx(wanted, rel=1e-5)
