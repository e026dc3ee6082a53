"""Is reward bought with entropy? The law R = b - a exp(H) along a run, and whether its first half foretells the end.

Cui et al. find that the reward of a policy trained by reinforcement learning follows the entropy H of its tokens by this law, whatever the
algorithm, and that a fit of a run's beginning predicts its end (https://arxiv.org/abs/2505.22617). Here R and H are means of a training
batch, each over five steps; runs are those of the study of the crossover.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from veneer.measure.verdict import compare_seeds, t_interval
from veneer.studies.contest import Terms, overridden
from veneer.studies.drawing import picture
from veneer.studies.lab import Lab
from veneer.studies.result import Finding, Result
from veneer.studies.sharpening import SHARED, trained
from veneer.train.config import make_config
from veneer.types import ConfigError, RunError

QUESTION = "Does the reward of a run follow the entropy of its policy, and does its first half foretell the end?"
CLAIMS = (19,)
OVER = 5
"""Steps over which reward and entropy are averaged: a batch of 64 episodes has a standard error of 0.06 by itself."""
SHORTEST = 2 * OVER + 2
"""Steps of a run whose half still has three points."""
WANTED = 0.9
"""R^2 that is claimed."""
MARGIN = 0.03
"""Of the reward at the end."""


@dataclass(frozen=True)
class Law:
    """R = b - a exp(H), by least squares."""

    a: float
    b: float
    r2: float
    """Share of the reward's variance that it explains."""

    def __call__(self, entropy: NDArray[np.float64]) -> NDArray[np.float64]:
        return self.b - self.a * np.exp(entropy)


def fit(entropy: NDArray[np.float64], reward: NDArray[np.float64]) -> Law:
    """Raises:
    ValueError: fewer than three points, or an entropy that never changes.
    """
    if len(entropy) < 3 or np.ptp(entropy) == 0:
        raise ValueError(f"{len(entropy)} points with entropies over {np.ptp(entropy) if len(entropy) else 0:g} nats; a law needs three")
    slope, b = np.polyfit(np.exp(entropy), reward, 1)
    law = Law(float(-slope), float(b), 0.0)
    left, whole = float(np.square(reward - law(entropy)).sum()), float(np.square(reward - reward.mean()).sum())
    return Law(law.a, law.b, 1 - left / whole if whole > 0 else 0.0)


def smooth(values: Sequence[float]) -> NDArray[np.float64]:
    """Means over OVER steps, one for each step that ends such a stretch."""
    return np.convolve(np.asarray(values, np.float64), np.full(OVER, 1 / OVER), mode="valid")


@dataclass(frozen=True)
class Curve:
    """Of one run."""

    entropy: NDArray[np.float64]
    reward: NDArray[np.float64]
    whole: Law
    half: Law
    """Of the first half alone."""

    @property
    def foretold(self) -> float:
        """What the first half's law says of the end, knowing the entropy there."""
        return float(self.half(self.entropy[-1:])[0])

    @property
    def end(self) -> float:
        return float(self.reward[-1])


def curve_of(metrics: Sequence[Mapping[str, Any]]) -> Curve:
    """Of a run of SHORTEST steps or more."""
    steps = [m for m in metrics if m["step"] > 0]
    entropy, reward = smooth([m["optim/entropy"] for m in steps]), smooth([m["reward/total"] for m in steps])
    half = len(entropy) // 2
    return Curve(entropy, reward, fit(entropy, reward), fit(entropy[:half], reward[:half]))


async def conduct(lab: Lab, terms: Terms) -> Result:
    """Raises:
    ConfigError: an override that cannot be applied, or a run that is too short for a law.
    RunError: fewer than two runs were long enough, as the others had nothing left to learn.
    Interrupted, VeneerError: as ``Lab.run``.
    """
    steps = make_config(overridden(SHARED, (), terms)).rl.steps
    if steps < SHORTEST:
        raise ConfigError(f"rl.steps = {steps}: two laws over means of {OVER} steps take {SHORTEST} steps or more")
    outcomes = await trained(lab, terms)
    short = {outcome.config.seed: outcome.metrics[-1]["step"] for outcome in outcomes if outcome.metrics[-1]["step"] < SHORTEST}
    curves = {outcome.config.seed: curve_of(outcome.metrics) for outcome in outcomes if outcome.config.seed not in short}
    ended = [f"the run of seed {seed} ended after {steps} steps" for seed, steps in short.items()]
    if len(curves) < 2:
        raise RunError(f"{'; '.join(ended)}, and a law takes {SHORTEST}: nothing was left to be learned; give it other problems")
    return entropy_result(curves, ended)


def entropy_result(by_seed: Mapping[int, Curve], ended: Sequence[str]) -> Result:
    """``ended``: of runs that were too short for a law, in words."""
    curves = list(by_seed.values())
    shares = t_interval([curve.whole.r2 for curve in curves])
    verdict = "yes" if shares.low >= WANTED else "no" if shares.high < WANTED else "undecided"
    foretold = compare_seeds([curve.foretold for curve in curves], [curve.end for curve in curves], MARGIN)
    findings = [
        Finding(f"the law explains {WANTED:.0%} of the reward's variance along a run", verdict, f"R^2 {shares}"),
        Finding("what the first half's law says of the end, beside what came", foretold.said("too high", "too low"), foretold.numbers),
    ]
    kept = [{"entropy": list(c.entropy), "reward": list(c.reward), "a": c.whole.a, "b": c.whole.b, "r2": c.whole.r2} for c in curves]
    return Result(findings, _tables(by_seed, ended), {"runs": kept, "ended": list(ended)}, lambda path: _draw(curves, path))


def _tables(curves: Mapping[int, Curve], ended: Sequence[str]) -> str:
    lines = ["| seed | R^2 | a | b | H, first to last | R at the end | foretold by the first half |", "|---|---|---|---|---|---|---|"]
    for seed, curve in curves.items():
        law, ends = curve.whole, f"{curve.entropy[0]:.3f} to {curve.entropy[-1]:.3f}"
        lines.append(f"| {seed} | {law.r2:.3f} | {law.a:.2f} | {law.b:.2f} | {ends} | {curve.end:.3f} | {curve.foretold:.3f} |")
    spent = t_interval([_spent(curve) for curve in curves.values()])
    lines += ["", f"Of the entropy that a run spends, its first half spends {spent.value:.0%} [{spent.low:.0%}, {spent.high:.0%}]."]
    lines += ["", *(f"- without a law: {one}" for one in ended)] if ended else []
    return "\n".join(lines) + "\n"


def _spent(curve: Curve) -> float:
    """The first half's share of the fall in entropy."""
    fall = curve.entropy[0] - curve.entropy[-1]
    return float((curve.entropy[0] - curve.entropy[len(curve.entropy) // 2]) / fall) if fall else 0.0


def _draw(curves: Sequence[Curve], path: Path) -> None:
    with picture(path, 8.4, 3.2) as figure:
        left, right = figure.subplots(1, 2)
        for seed, curve in enumerate(curves):
            shade = str(0.7 * seed / len(curves))
            left.plot(curve.entropy, curve.reward, color=shade, linewidth=0, marker=".", markersize=4)
            line = np.linspace(curve.entropy.min(), curve.entropy.max(), 50)
            left.plot(line, curve.whole(line), color="#cc5500", linewidth=0.8)
            right.plot(range(OVER, OVER + len(curve.reward)), curve.reward, color=shade, linewidth=1)
            half = len(curve.entropy) // 2
            right.plot(range(OVER + half, OVER + len(curve.reward)), curve.half(curve.entropy[half:]), color="#cc5500", linewidth=0.8)
        left.invert_xaxis()  # a run goes from left to right
        left.set(xlabel="entropy, nats a token", ylabel="reward")
        right.set(xlabel="step", ylabel="reward, and what the first half foretells")
