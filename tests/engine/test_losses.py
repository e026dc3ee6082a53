"""Every loss against the formula in its paper, by hand and in numpy."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from engine_tools import add_random_adapter, datum, gradients, lora_engine, relative_error

from veneer.engine.losses import LOSSES, LossInputs, drift, resolve_loss
from veneer.types import LoraConfig, RequestError

NAMES = tuple(LOSSES)
RATIO_LOSSES = ("importance_sampling", "ppo", "cispo", "gspo")


def inputs(lp, q, advantages, weights=None, rows=None) -> LossInputs:
    n = len(lp)
    tensors = [torch.tensor(x, dtype=torch.float64) for x in (lp, q, advantages, weights or [1.0] * n)]
    tensors[0].requires_grad_()
    return LossInputs(*tensors, torch.tensor(rows or [0] * n))


def evaluate(name: str, x: LossInputs, **config: float) -> tuple[float, list[float], list[bool]]:
    """Loss, gradient with respect to lp, clipped tokens."""
    function, full = resolve_loss(name, config)
    value, clipped = function(x, full)
    (gradient,) = torch.autograd.grad(value, x.lp)
    return float(value.detach()), gradient.tolist(), clipped.tolist()


def independent(name: str, lp, q, advantages, weights, rows, config) -> tuple[float, np.ndarray]:
    """Loss and gradient token by token, derived by hand from the papers: plain Python, no autograd."""
    total, gradient = 0.0, np.zeros(len(lp))
    for i in range(len(lp)):
        r, a, w = math.exp(lp[i] - q[i]), advantages[i], weights[i]
        if name == "gspo":
            same = [j for j in range(len(lp)) if rows[j] == rows[i] and weights[j] != 0]
            r = math.exp(sum(lp[j] - q[j] for j in same) / len(same))
        if name == "cross_entropy":
            total, gradient[i] = total - w * lp[i], -w
        elif name == "importance_sampling":
            total, gradient[i] = total - w * r * a, -w * r * a
        elif name in ("ppo", "gspo"):
            low, high = config["clip_low_threshold"], config["clip_high_threshold"]
            bounded = min(max(r, low), high)
            total -= w * min(r * a, bounded * a)
            dead = (a > 0 and r > high) or (a < 0 and r < low)
            gradient[i] = 0.0 if dead else -w * r * a  # d s_t / d lp_t = s_t, for GSPO too in its token form
        elif name == "cispo":
            c = min(max(r, config["clip_low_threshold"]), config["clip_high_threshold"])
            total, gradient[i] = total - w * c * a * lp[i], -w * c * a
        elif name == "dro":
            gap = lp[i] - q[i]
            total -= w * (a * lp[i] - config["beta"] / 2 * gap**2)
            gradient[i] = -w * (a - config["beta"] * gap)
    return total, gradient


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(4))
def test_loss_and_gradient_equal_the_independent_formula(name: str, seed: int) -> None:
    """Random ratios on both sides of the thresholds, both signs of advantage, weights, several rows."""
    rng = np.random.default_rng(seed)
    n = 40
    q = rng.normal(-2, 0.5, n)
    lp, advantages, weights = q + rng.normal(0, 0.4, n), rng.normal(0, 1, n), rng.uniform(0.2, 2, n)
    rows = np.sort(rng.integers(0, 5, n))
    lp += 0.4 * rows - 0.8  # whole rows on either side, for gspo
    config = {**LOSSES[name][1], **({"clip_high_threshold": 1.5} if name == "cispo" else {})}
    found, gradient, clipped = evaluate(name, inputs(*(v.tolist() for v in (lp, q, advantages, weights, rows))), **config)
    wanted, wanted_gradient = independent(name, lp, q, advantages, weights, rows, config)
    assert found == pytest.approx(wanted, rel=1e-12)
    np.testing.assert_allclose(gradient, wanted_gradient, rtol=1e-12, atol=1e-14)
    if name in ("ppo", "gspo"):
        assert clipped == [g == 0 for g in wanted_gradient]
        assert 0 < sum(clipped) < n
    elif name == "cispo":
        assert clipped == [math.exp(gap) > 1.5 for gap in lp - q]
        assert 0 < sum(clipped) < n
    else:
        assert not any(clipped)


# Two tokens sampled at probability 0.5 and now at 0.75 and 0.25: ratios 1.5 and 0.5.
LP, Q = [math.log(0.75), math.log(0.25)], [math.log(0.5), math.log(0.5)]


def test_cross_entropy_by_hand() -> None:
    """-(ln 0.75 + 2 ln 0.25); advantages play no part."""
    value, gradient, _ = evaluate("cross_entropy", inputs(LP, Q, [9.0, 9.0], [1.0, 2.0]))
    assert value == pytest.approx(0.2876820724 + 2 * 1.3862943611)
    assert gradient == [-1.0, -2.0]


def test_importance_sampling_by_hand() -> None:
    """-(1.5 * 2 + 0.5 * -4) = -1."""
    value, gradient, _ = evaluate("importance_sampling", inputs(LP, Q, [2.0, -4.0]))
    assert value == pytest.approx(-1.0)
    assert gradient == pytest.approx([-3.0, 2.0])


@pytest.mark.parametrize(
    ("advantages", "value", "gradient", "clipped"),
    [
        ([2.0, -4.0], -(2.4 - 3.2), [0.0, 0.0], [True, True]),  # went the right way too far: stopped at 1.2 and 0.8
        ([-2.0, 4.0], -(-3.0 + 2.0), [3.0, -2.0], [False, False]),  # went the wrong way: the whole gradient pulls back
    ],
)
def test_ppo_by_hand(advantages, value, gradient, clipped) -> None:
    """Clipping is one-sided: it must never stop a correction."""
    found = evaluate("ppo", inputs(LP, Q, advantages))
    assert found[0] == pytest.approx(value)
    assert found[1] == pytest.approx(gradient)
    assert found[2] == clipped


def test_cispo_by_hand() -> None:
    """A clipped token keeps a gradient of the threshold times its advantage."""
    value, gradient, clipped = evaluate("cispo", inputs(LP, Q, [2.0, -4.0]), clip_low_threshold=0.8, clip_high_threshold=1.2)
    assert gradient == pytest.approx([-1.2 * 2, 0.8 * 4])
    assert value == pytest.approx(-(1.2 * 2 * LP[0] + 0.8 * -4 * LP[1]))
    assert clipped == [True, True]


def test_dro_by_hand() -> None:
    """With beta 2 the penalty is the squared log ratio."""
    value, gradient, _ = evaluate("dro", inputs(LP, Q, [1.0, 0.0]), beta=2.0)
    assert value == pytest.approx(-(LP[0] - math.log(1.5) ** 2 - math.log(0.5) ** 2))
    assert gradient == pytest.approx([-(1 - 2 * math.log(1.5)), 2 * math.log(0.5)])


def test_gspo_by_hand() -> None:
    """Row 0 has ratios 1.5 and 0.5: s = sqrt(0.75) = 0.866, inside the thresholds, and every token's gradient is -s A, whatever its
    own ratio. Row 1 has s = 1.5: above the threshold, so a positive advantage stops it."""
    value, gradient, clipped = evaluate("gspo", inputs([*LP, LP[0]], [*Q, Q[0]], [1.0, 1.0, 1.0], rows=[0, 0, 1]))
    s = math.sqrt(0.75)
    assert value == pytest.approx(-(2 * s + 1.2))
    assert gradient == pytest.approx([-s, -s, 0.0])
    assert clipped == [False, False, True]


@pytest.mark.parametrize("name", NAMES)
def test_descent_raises_rewarded_and_lowers_punished_tokens(name: str) -> None:
    """A flipped sign trains the opposite behaviour without any error."""
    _, gradient, _ = evaluate(name, inputs([-1.0, -1.0], [-1.0, -1.0], [1.0, -1.0], rows=[0, 1]))
    assert gradient[0] < 0
    assert (gradient[1] < 0) if name == "cross_entropy" else (gradient[1] > 0)


@pytest.mark.parametrize("name", ["ppo", "gspo"])
@pytest.mark.parametrize(
    ("ratio", "advantage", "alive"), [(1.19, 1, 1), (1.21, 1, 0), (0.81, -1, 1), (0.79, -1, 0), (5, -1, 1), (0.1, 1, 1)]
)
def test_default_thresholds_are_on_the_ratio_itself(name: str, ratio: float, advantage: float, alive: int) -> None:
    """0.8 and 1.2 as ratios, not as 1 - eps and 1 + eps."""
    _, gradient, clipped = evaluate(name, inputs([math.log(ratio) - 1], [-1.0], [float(advantage)]))
    assert gradient[0] == pytest.approx(-ratio * advantage * alive)
    assert clipped == [not alive]


@pytest.mark.parametrize("name", NAMES)
def test_weights_scale_the_loss(name: str) -> None:
    """The mask is a weight: half of it is half the loss and half the gradient, and a zero is out."""
    lp, q, advantages = [-1.0, -2.0, -3.0], [-1.1, -2.1, -2.9], [1.0, -1.0, 0.5]
    one = evaluate(name, inputs(lp, q, advantages))
    half = evaluate(name, inputs(lp, q, advantages, [0.5] * 3))
    assert half[0] == pytest.approx(0.5 * one[0])
    assert half[1] == pytest.approx([0.5 * g for g in one[1]])
    masked = evaluate(name, inputs(lp, q, advantages, [1.0, 1.0, 0.0]))
    short = evaluate(name, inputs(lp[:2], q[:2], advantages[:2]))
    assert masked[0] == pytest.approx(short[0])
    assert masked[1] == pytest.approx([*short[1], 0.0])


@pytest.mark.parametrize("name", NAMES)
def test_mask_weights_scale_the_engine_gradient(name: str) -> None:
    """From datum to gradient: doubled masks double A's and B's gradients."""
    engine = lora_engine()
    add_random_adapter(engine, "x", LoraConfig(rank=2, alpha=4), seed=1)
    found = []
    for factor in (1, 2):
        row = datum(12)
        row.mask[:] *= factor
        engine.forward_backward("x", [row], name).result()
        found.append(gradients(engine, "x"))
        engine.zero_grad("x").result()
    for key, gradient in found[0].items():
        assert relative_error(found[1][key], 2 * gradient) < 1e-6, key


@pytest.mark.parametrize("name", RATIO_LOSSES)
def test_all_ratio_losses_agree_on_policy(name: str) -> None:
    """At ratio 1 each of them is the plain policy gradient, so that a user may switch between them."""
    engine = lora_engine()
    add_random_adapter(engine, "x", LoraConfig(rank=2, alpha=4), seed=1)
    row = datum(12)
    on_policy = dataclasses.replace(row, logprobs=engine.forward("x", [row], "cross_entropy").result().logprobs_D[0])
    metrics = engine.forward_backward("x", [on_policy], name).result().metrics
    found = gradients(engine, "x")
    engine.zero_grad("x").result()
    engine.forward_backward("x", [dataclasses.replace(row, mask=row.mask * row.advantages)], "cross_entropy").result()
    for key, gradient in gradients(engine, "x").items():
        assert relative_error(found[key], gradient) < 1e-5, key
    assert metrics["ratio:mean"] == pytest.approx(1, abs=1e-5)
    assert metrics["clip_fraction:mean"] == 0


def test_drift_by_hand() -> None:
    """Ratios 1.5 and 0.5 and one token without weight."""
    sums = drift(inputs([*LP, -9.0], [*Q, -1.0], [0.0] * 3, [1.0, 2.0, 0.0]))
    gaps = [-math.log(1.5), math.log(2)]
    assert float(sums["kl_sample_train_v1"]) == pytest.approx(sum(gaps))
    assert float(sums["kl_sample_train_v2"]) == pytest.approx(0.5 * sum(g * g for g in gaps))
    assert float(sums["ratio"]) == pytest.approx(2.0)


def test_clip_fraction_counts_clipped_tokens() -> None:
    """Users read the clip fraction to see whether a run is off policy."""
    engine = lora_engine()
    add_random_adapter(engine, "x", LoraConfig(rank=2, alpha=4), seed=1)
    row = datum(12)
    lp = engine.forward("x", [row], "cross_entropy").result().logprobs_D[0]
    gap = np.where(np.arange(12) % 2 == 0, 0.5, 0.0).astype(np.float32)
    row = dataclasses.replace(row, logprobs=lp - gap, advantages=np.ones(12, np.float32))
    metrics = engine.forward("x", [row], "ppo").result().metrics
    assert metrics["tokens:sum"] == 8
    assert metrics["clip_fraction:mean"] == pytest.approx(0.5)
    assert metrics["ratio:mean"] == pytest.approx((math.exp(0.5) + 1) / 2, rel=1e-5)
    assert metrics["kl_sample_train_v1:mean"] == pytest.approx(-0.25, rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "config", "named"),
    [
        ("reinforce", None, "reinforce"),
        ("ppo", {"clip_hihg_threshold": 1.3}, "clip_hihg_threshold"),
        ("cross_entropy", {"beta": 1.0}, "beta"),
        ("dro", {"clip_low_threshold": 1.0}, "clip_low_threshold"),
    ],
)
def test_unknown_names_are_refused_by_name(loss: str, config: dict | None, named: str) -> None:
    """A mistyped setting that is silently ignored costs a day."""
    engine = lora_engine()
    engine.create_adapter("x", LoraConfig(rank=2))
    for call in (engine.forward, engine.forward_backward):
        with pytest.raises(RequestError, match=named):
            call("x", [datum(5)], loss, config)
    assert engine.step() == 0, "a refused request must not be queued"


def test_settings_reach_the_loss() -> None:
    """An override that is accepted must also act."""
    engine = lora_engine()
    add_random_adapter(engine, "x", LoraConfig(rank=2, alpha=4), seed=1)
    row = datum(12)
    losses = [engine.forward("x", [row], "dro", config).result().metrics["loss:sum"] for config in (None, {"beta": 0.05}, {"beta": 1.0})]
    assert losses[0] == losses[1]
    lp = engine.forward("x", [row], "dro").result().logprobs_D[0]
    assert losses[2] - losses[1] == pytest.approx(float(np.nansum(0.475 * row.mask * (lp - row.logprobs) ** 2)), rel=1e-4)
    assert np.array_equal(np.isnan(lp), row.mask == 0)
