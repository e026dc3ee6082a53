"""The noise scale on gradients whose noise is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from veneer.measure.noise_scale import noise_scale


def noisy(rng: np.random.Generator, steps: int, groups: int, dims: int, signal: float, noise: float) -> list[dict[str, float]]:
    """Steps whose groups' gradients are a true one plus noise: what train/noise.py makes of them."""
    metrics = []
    for _ in range(steps):
        true = rng.standard_normal(dims)
        true *= signal / np.linalg.norm(true)
        each = true + rng.standard_normal((groups, dims)) * noise / math.sqrt(dims)
        small, big = float(np.square(each).sum(axis=1).mean()), float(np.square(each.mean(axis=0)).sum())
        metrics.append({"noise/trace": (small - big) / (1 - 1 / groups), "noise/signal": (groups * big - small) / (groups - 1)})
    return metrics


def test_the_noise_scale_is_that_of_the_gradients() -> None:
    """noise^2 / signal^2 groups; and its interval covers it in about 95 of 100 runs."""
    rng = np.random.default_rng(0)
    truth = 8 * 3.0**2 / 1.5**2
    assert noise_scale(noisy(rng, 3000, 8, 40, 1.5, 3.0), 8).episodes == pytest.approx(truth, rel=0.02)
    hits = 0
    for _ in range(400):
        found = noise_scale(noisy(rng, 12, 8, 40, 1.5, 3.0), 8)
        hits += found.low is not None and found.low <= truth <= found.high
    assert hits / 400 == pytest.approx(0.95, abs=0.03)


def test_what_cannot_be_told_is_not() -> None:
    assert noise_scale([{"step": 1}], 8) is None
    one = noise_scale([{"noise/trace": 2.0, "noise/signal": 1.0}], 8)
    assert (one.episodes, one.low, one.high, one.steps) == (16.0, None, None, 1)
    drowned = noise_scale([{"noise/trace": 2.0, "noise/signal": -1.0}] * 4, 8)
    assert (drowned.episodes, drowned.low, drowned.steps) == (None, None, 4)
