"""How arms are compared: each with a learning rate that was swept for it, on fresh seeds, seed by seed, beside a measured noise floor.

A learning rate that suits one arm says nothing of another (science of low rank: the best rates of LoRA and of full fine-tuning are ten
times apart), so every arm tries its own grid on seeds of their own, and the rate that scored best there runs again on the seeds that are
compared: choosing the luckiest of ten runs flatters no arm. The noise floor is the reference arm once more, on other seeds.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_args

import numpy as np

from veneer.measure.verdict import Comparison, compare_seeds
from veneer.train.config import RunConfig, make_config, override_in
from veneer.types import ConfigError

LOOPS: Sequence[str] = get_args(RunConfig.model_fields["kind"].annotation)
"""The kinds of runs, each with a table of settings of its own."""
BOOTSTRAP = 2000
CHOICE, AGAIN = 1000, 2000
"""The first seed of those on which learning rates are chosen, and of those of the noise floor; compared are 0, 1, 2 and so on."""


class Scored(Protocol):
    """What a run came to, as far as it is compared: ``lab.Outcome`` says what each of these is."""

    @property
    def config(self) -> RunConfig: ...
    @property
    def score(self) -> float: ...
    @property
    def score_before(self) -> float: ...
    @property
    def diverged(self) -> str | None: ...


class Maker(Protocol):
    """Makes runs, as ``lab.Lab`` does."""

    async def run(self, configs: Sequence[RunConfig]) -> Sequence[Scored]:
        """Raises:
        Interrupted, VeneerError: as ``Lab.run``.
        """
        ...


@dataclass(frozen=True)
class Arm:
    """One way to do it."""

    name: str
    settings: Mapping[str, Any]
    """Keys of a run's configuration, in nested tables, over those that all arms share."""
    rates: Sequence[float]
    """Learning rates to try, rising by a constant factor."""


@dataclass(frozen=True)
class Terms:
    """What is up to whoever asks."""

    seeds: int = 5
    choice_seeds: int = 2
    """On which every learning rate is tried, where one is chosen."""
    overrides: tuple[str, ...] = ()
    """KEY=VALUE of what all runs share, such as rl.steps=20; what an arm is about stays the arm's."""
    coarse: bool = False
    """Of every grid of learning rates each second one, and of several batch sizes the outermost."""


@dataclass(frozen=True)
class Sweep:
    """An arm at every learning rate."""

    tried: Mapping[float, Sequence[Scored]]
    """By learning rate, rising: a run for each choice seed."""
    edge: Literal["lowest", "highest"] | None
    """The best rate is the last of the grid on this side, though the grid was widened there: a better one may lie beyond."""
    widened: bool

    @property
    def means(self) -> dict[float, float]:
        return {rate: statistics.fmean(o.score for o in outcomes) for rate, outcomes in self.tried.items()}

    @property
    def best(self) -> float:
        return _best(self.means)

    def plateau(self, margin: float) -> float:
        """How many times larger the largest rate within ``margin`` of the best mean is than the smallest."""
        means = self.means
        good = [rate for rate, mean in means.items() if mean >= means[self.best] - margin]
        return max(good) / min(good)

    def choice_error(self, deviation: float) -> float:
        """How far what the arm is compared with may be off because another rate looked best: the standard deviation over choices that
        runs with this one of their own would have made (a parametric bootstrap; Efron and Tibshirani 1993, chapter 6)."""
        means = np.array(list(self.means.values()))
        runs = len(next(iter(self.tried.values())))
        drawn = means + np.random.default_rng(0).normal(0.0, deviation / math.sqrt(runs), (BOOTSTRAP, len(means)))
        return float(means[drawn.argmax(axis=1)].std())


@dataclass(frozen=True)
class Entrant:
    """An arm on the seeds that are compared."""

    arm: Arm
    sweep: Sweep
    outcomes: Sequence[Scored]
    comparison: Comparison | None
    """With the reference; None: it is the reference."""

    @property
    def scores(self) -> list[float]:
        return [outcome.score for outcome in self.outcomes]


@dataclass(frozen=True)
class Contest:
    """All arms, the reference first."""

    entrants: Sequence[Entrant]
    noise: Comparison
    """The reference on other seeds, compared with itself."""
    margin: float

    @property
    def reference(self) -> Entrant:
        return self.entrants[0]


async def hold_contest(lab: Maker, shared: Mapping[str, Any], arms: Sequence[Arm], margin: float, terms: Terms) -> Contest:
    """Compare arms with the first of them. ``shared``: what all runs have in common, as nested tables of a run's configuration.

    Raises:
        ConfigError: a setting that there is not.
        Interrupted, VeneerError: as ``Lab.run``.
    """
    shared, arms = overridden(shared, arms, terms), thinned(arms, terms)
    sweeps = await sweep_all(lab, shared, arms, terms.choice_seeds)
    seeds = range(terms.seeds)
    plan = {arm.name: [config_of(shared, arm, sweep.best, seed) for seed in seeds] for arm, sweep in zip(arms, sweeps, strict=True)}
    again = [config_of(shared, arms[0], sweeps[0].best, AGAIN + seed) for seed in seeds]
    outcomes = iter(await lab.run([*(config for configs in plan.values() for config in configs), *again]))
    runs = {name: [next(outcomes) for _ in configs] for name, configs in plan.items()}
    reference = [outcome.score for outcome in runs[arms[0].name]]
    noise = compare_seeds([outcome.score for outcome in outcomes], reference, margin)
    entrants = []
    for arm, sweep in zip(arms, sweeps, strict=True):
        own = runs[arm.name]
        scores = [outcome.score for outcome in own]
        comparison = None if arm is arms[0] else compare_arms(scores, sweep, reference, sweeps[0], margin)
        entrants.append(Entrant(arm, sweep, own, comparison))
    return Contest(entrants, noise, margin)


def compare_arms(scores: Sequence[float], sweep: Sweep, others: Sequence[float], swept: Sweep, margin: float) -> Comparison:
    """Of two arms at their chosen rates, with the error of having chosen those on few runs. Without it two equal arms, on five seeds and
    with rates that were chosen on one, are called different in 10 contests of 100 (``tests/studies/test_contest_odds.py``)."""
    own = compare_seeds(scores, others, margin).deviation / math.sqrt(2)  # of one run, without what its seed has in common
    return compare_seeds(scores, others, margin, math.hypot(sweep.choice_error(own), swept.choice_error(own)))


def thinned(arms: Sequence[Arm], terms: Terms) -> Sequence[Arm]:
    """With the grids that were asked for."""
    return [replace(arm, rates=arm.rates[::2]) for arm in arms] if terms.coarse else arms


def overridden(shared: Mapping[str, Any], arms: Sequence[Arm], terms: Terms) -> dict[str, Any]:
    """What all runs share, as whoever asks wants it. ``arms``: none, if the study compares none.

    Raises:
        ConfigError: an override cannot be applied, or is of what the study itself decides.
    """
    tree = copy.deepcopy(dict(shared))
    decided = {"kind", "seed", "name", "folder", "device", "weights", "init", *(key for arm in arms for key in _keys(arm.settings))}
    kinds = sorted({_kind({**tree, **arm.settings}) for arm in arms} or {_kind(tree)})
    decided |= {f"{_kind({**tree, **arm.settings})}.learning_rate" for arm in arms if arm.rates}
    for override in terms.overrides:
        key = override.partition("=")[0].strip()
        loop = key.partition(".")[0]
        if loop in LOOPS and loop not in kinds:
            raise ConfigError(f"--set {override}: runs of this study are of kind {' and '.join(kinds)}, and read none of {loop}.")
        if key in decided:
            raise ConfigError(f"--set {override}: the study itself decides {key}; leave it out")
        override_in(tree, override)
    for settings in [arm.settings for arm in arms] or [{}]:  # what is wrong is said before anything runs
        config = make_config(_merged(tree, settings))
        if config.kind == "sft" and not config.sft.held_out and dict(shared).get("sft", {}).get("held_out"):
            raise ConfigError("--set sft.held_out=0: this study compares losses of held-out rows; leave some")
    return tree


def terms_for(terms: Terms, kind: Literal["rl", "sft"]) -> Terms:
    """For the runs of one kind in a study that trains in both: without overrides of the other's table, such as sft.steps where ``kind``
    is rl."""
    other = "sft." if kind == "rl" else "rl."
    return replace(terms, overrides=tuple(override for override in terms.overrides if not override.startswith(other)))


def _kind(tree: Mapping[str, Any]) -> str:
    return tree.get("kind", "rl")


def _keys(tree: Mapping[str, Any]) -> set[str]:
    """Dotted names of all values."""
    nested = {f"{key}.{inner}" for key, value in tree.items() if isinstance(value, Mapping) for inner in _keys(value)}
    return nested | {key for key, value in tree.items() if not isinstance(value, Mapping)}


async def sweep_all(lab: Maker, shared: Mapping[str, Any], arms: Sequence[Arm], choice_seeds: int) -> list[Sweep]:
    """All arms' grids at once; those whose best rate is the last on a side are widened there by two, once.

    Raises:
        ConfigError, Interrupted, VeneerError: as ``hold_contest``.
    """
    tried = [dict[float, Sequence[Scored]]() for _ in arms]

    async def add(rates: Sequence[Sequence[float]]) -> None:
        wanted = [(i, rate) for i, more in enumerate(rates) for rate in more]
        configs = [config_of(shared, arms[i], rate, CHOICE + seed) for i, rate in wanted for seed in range(choice_seeds)]
        outcomes = iter(await lab.run(configs))
        for i, rate in wanted:
            tried[i][rate] = [next(outcomes) for _ in range(choice_seeds)]

    await add([arm.rates for arm in arms])
    first = [Sweep(_rising(found), None, False) for found in tried]
    more = [_beyond(arm.rates, sweep.best) for arm, sweep in zip(arms, first, strict=True)]
    await add(more)
    sweeps = []
    for found, beyond in zip(tried, more, strict=True):
        rising = _rising(found)
        best = _best(Sweep(rising, None, False).means)
        edge = "lowest" if best == min(rising) else "highest" if best == max(rising) else None
        sweeps.append(Sweep(rising, edge, bool(beyond)))
    return sweeps


def _rising(found: Mapping[float, Sequence[Scored]]) -> dict[float, Sequence[Scored]]:
    return {rate: found[rate] for rate in sorted(found)}


def _best(means: Mapping[float, float]) -> float:
    """The rate of the best mean; of equal ones the smallest."""
    return max(means, key=lambda rate: (means[rate], -rate))


def peak(rates: Sequence[float], scores: Sequence[float]) -> float:
    """Between the points of a grid of rates a constant factor apart: where the parabola through the best point and its two neighbours, in
    the rate's logarithm, is highest. At the grid's edge it is the edge."""
    best = max(range(len(scores)), key=lambda i: scores[i])
    if best in (0, len(rates) - 1):
        return rates[best]
    below, top, above = scores[best - 1 : best + 2]
    bend = below - 2 * top + above
    shift = 0.5 * (below - above) / bend if bend else 0.0
    return rates[best] * (rates[1] / rates[0]) ** shift


def _beyond(rates: Sequence[float], best: float) -> list[float]:
    """Two more rates on the side on which the best is the last."""
    factor = rates[1] / rates[0]
    if best == rates[0]:
        return [best / factor**2, best / factor]
    return [best * factor, best * factor**2] if best == rates[-1] else []


def config_of(shared: Mapping[str, Any], arm: Arm, rate: float, seed: int) -> RunConfig:
    """Of one run."""
    tree = _merged(shared, arm.settings)
    kind = _kind(tree)
    return make_config(_merged(tree, {"seed": seed, kind: {"learning_rate": float(f"{rate:.6g}")}}))


def _merged(tree: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    both = {key: _merged(tree[key], value) if isinstance(value, Mapping) and key in tree else value for key, value in over.items()}
    return {**tree, **both}
