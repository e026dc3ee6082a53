"""How many groups of episodes teach something? Groups in which all were rewarded alike have no advantage, and nothing is learned of them.

Of a problem that is solved with chance p, a group of G has two different rewards with chance 1 - p^G - (1 - p)^G. The base tries each
problem many times. Half of the tries say what p is, problem by problem; the groups are made of the other half, and then the other way
round, so that the luck of either half cancels. A plan mostly knows the mean of p alone, and puts it into the same law: that is right
if all problems are as hard as each other, and too high if they are not, since the law is curved. A third law knows the spread of p
between problems too, and takes p to have the beta distribution with that mean and spread.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from veneer.envs import load_env
from veneer.measure.intervals import Mean
from veneer.measure.pass_at_k import mean_share, useful_share
from veneer.measure.verdict import Comparison, Verdict, compare_seeds, seeds_wanted
from veneer.studies.contest import Terms
from veneer.studies.drawing import picture
from veneer.studies.lab import Lab
from veneer.studies.result import Finding, Result
from veneer.train.config import RunConfig, make_config
from veneer.train.metrics import check_failures
from veneer.train.rollouts import Policy, closing, derive_seed, do_rollouts
from veneer.types import ConfigError, Finite, SamplingParams, TrajectoryGroup

if TYPE_CHECKING:
    from matplotlib.axes import Axes

QUESTION = "Does 1 - p^G - (1 - p)^G say how many groups teach something?"
CLAIMS = (15,)
ENVIRONMENTS: Sequence[Mapping[str, Any]] = (
    {"name": "arithmetic"},
    {"name": "sort"},
    {"name": "arithmetic", "args": {"min_terms": 2, "max_terms": 7}},
)
"""Each for itself: problems that are nearly as hard as each other, and those that are not. Another puts itself in their place."""
SETTABLE = ("base=", "env.", "rl.max_tokens=")
SIZES: Sequence[int] = (2, 4, 8, 16, 32)
PROBLEMS, HALF = 32, 64
"""Problems a seed; half of the tries of each."""
TOGETHER = 8
"""Problems that are played at once."""
MARGIN = 0.03
"""Of a share of groups."""
WANTED = 0.6
"""The share of useful groups for which the laws are asked for a group size."""


async def conduct(lab: Lab, terms: Terms) -> Result:
    """Raises:
    ConfigError: an override of what nothing here depends on, an environment that gives more than pass or fail or has too few problems.
    RunError: an episode failed.
    Interrupted: ``lab.stop`` was set; what was played is kept.
    """
    found = []
    for config in _configs(terms):
        played = []
        for seed in range(terms.seeds):
            what = f"groups: {PROBLEMS} problems, {2 * HALF} tries, seed {seed}"
            played.append(await lab.measured(what, config, partial(_play, lab, seed)))
        args = ", ".join(f"{key} = {value}" for key, value in config.env.args.items())
        found.append(judge(config.env.name + (f" ({args})" if args else ""), np.array(played)))
    return groups_result(found)


def _configs(terms: Terms) -> list[RunConfig]:
    for override in terms.overrides:
        if not override.startswith(SETTABLE):
            raise ConfigError(
                f"--set {override}: this study only plays the base; what can be set is base, env.name and the like, rl.max_tokens"
            )
    another = any(override.startswith(("env.name", "env.args")) for override in terms.overrides)
    return [make_config({"env": env}, terms.overrides) for env in ([{}] if another else ENVIRONMENTS)]


# ---------------------------------------------------------------- playing


async def _play(lab: Lab, seed: int, config: RunConfig) -> list[list[int]]:
    """Which tries of the seed's own problems were rewarded, [PROBLEMS][2 HALF] of 0 and 1."""
    place = lab.place(config)
    params = SamplingParams(max_tokens=config.rl.max_tokens)
    policy = Policy(place.engine, place.renderer, None, params, config.env.seconds, config.env.retries)
    rewards: list[list[int]] = []
    async with closing(load_env(config.env.name, config.env.args)) as dataset:
        last = (seed + 1) * PROBLEMS
        if isinstance(dataset, Finite) and dataset.problem_count("train") < last:
            raise ConfigError(
                f"env.name = {config.env.name!r} has {dataset.problem_count('train')} training problems; seed {seed} needs {last}"
            )
        for first in range(seed * PROBLEMS, last, TOGETHER):
            lab.go_on()
            indices = range(first, min(first + TOGETHER, last))
            groups = await do_rollouts(policy, dataset, "train", indices, 2 * HALF, derive_seed("groups", seed))
            check_failures(groups, 0.0)
            rewards += [_passes(group, config) for group in groups]
    return rewards


def _passes(group: TrajectoryGroup, config: RunConfig) -> list[int]:
    if not set(group.rewards_G) <= {0.0, 1.0}:
        raise ConfigError(f"env.name = {config.env.name!r} gives rewards other than 0 and 1; the law is about pass or fail")
    return [int(reward) for reward in group.rewards_G]


# ---------------------------------------------------------------- the laws


def useful(p: float, size: int) -> float:
    """The share of groups with two different rewards, of problems that are all solved with the chance p."""
    return 1 - p**size - (1 - p) ** size


def useful_of_beta(mean: float, spread: float, size: int) -> float:
    """The same of problems whose chances have the beta distribution with this mean and variance: 1 - E[p^G] - E[(1 - p)^G], of which
    E[p^G] is the product of (a + i) / (a + b + i) for i < G. No variance, or less, is none; a variance of mean (1 - mean) or more leaves
    problems that are always or never solved."""
    whole = mean * (1 - mean)
    if spread <= 0 or whole == 0:
        return useful(mean, size)
    both = whole / spread - 1
    if both <= 0:
        return 0.0
    a, b = mean * both, (1 - mean) * both
    return 1 - sum(math.prod((part + i) / (both + i) for i in range(size)) for part in (a, b))


def spread_of(tries: NDArray[np.int64]) -> float:
    """The variance between problems of the chance of a reward, of 0 and 1 [problems, tries], unbiased: the variance of their rates less
    what the draws add to it, the mean of r (1 - r) / (tries - 1). By accident below 0 where there is little.

    Raises:
        ValueError: fewer than two problems or tries.
    """
    if min(tries.shape) < 2:
        raise ValueError(f"{tries.shape[0]} problems with {tries.shape[1]} tries; a spread needs two of both")
    rates = tries.mean(axis=1)
    return float(rates.var(ddof=1) - (rates * (1 - rates)).mean() / (tries.shape[1] - 1))


def size_for(wanted: float, share: Mapping[int, float]) -> int | None:
    """The smallest group size with this share of useful groups; None: no size that was looked at."""
    return next((size for size in sorted(share) if share[size] >= wanted), None)


# ---------------------------------------------------------------- what it says


@dataclass(frozen=True)
class Size:
    """Groups of one size."""

    measured: Mean
    """The share of useful groups among those that were played."""
    by_problem: float
    """What the law says, problem by problem, of the tries."""
    by_mean: float
    by_beta: float
    problem: Comparison
    """The law of each problem's own chance, less what was measured of it; over problems."""
    mean: Comparison
    """That of the mean chance, less what was measured; over seeds."""
    beta: Comparison


@dataclass(frozen=True)
class Found:
    """One environment."""

    name: str
    solved_P: Sequence[int]
    """Of all tries."""
    variance: float
    """Of the chances between problems, as it is estimated."""
    sizes: Mapping[int, Size]
    wanted: Mapping[str, int | None]
    """By law: the group size of which WANTED are useful, up to HALF."""

    @property
    def rates(self) -> NDArray[np.float64]:
        return np.array(self.solved_P) / (2 * HALF)

    @property
    def spread(self) -> float:
        """Standard deviation of the chances between problems."""
        return math.sqrt(max(0.0, self.variance))


def judge(name: str, played: NDArray[np.int64]) -> Found:
    """``played``: 0 and 1, [seeds, PROBLEMS, 2 HALF]."""
    halves = played[..., :HALF], played[..., HALF:]
    sizes = {}
    for size in SIZES:
        measured = np.mean([_measured(half, size) for half in halves], axis=0)
        predicted = np.mean([_predicted(half, size) for half in halves], axis=0)
        by_mean = np.mean([[useful(float(seed.mean()), size) for seed in half] for half in halves], axis=0)
        by_beta = np.mean([[useful_of_beta(float(seed.mean()), spread_of(seed), size) for seed in half] for half in halves], axis=0)
        by_seed = measured.mean(axis=1)
        sizes[size] = Size(
            measured=mean_share(measured.ravel().tolist(), 2 * (HALF // size)),
            by_problem=float(predicted.mean()),
            by_mean=float(by_mean.mean()),
            by_beta=float(by_beta.mean()),
            problem=compare_seeds(predicted.ravel(), measured.ravel(), MARGIN),
            mean=compare_seeds(by_mean, by_seed, MARGIN),
            beta=compare_seeds(by_beta, by_seed, MARGIN),
        )
    tries = played.reshape(-1, 2 * HALF)
    mean, spread, every = float(tries.mean()), spread_of(tries), range(2, HALF + 1)
    wanted = {
        "problem": size_for(WANTED, {size: float(_predicted(tries, size).mean()) for size in every}),
        "mean": size_for(WANTED, {size: useful(mean, size) for size in every}),
        "beta": size_for(WANTED, {size: useful_of_beta(mean, spread, size) for size in every}),
    }
    return Found(name, [int(solved) for solved in tries.sum(axis=1)], spread, sizes, wanted)


def _predicted(tries: NDArray[np.int64], size: int) -> NDArray[np.float64]:
    """What each problem's tries [..., tries] say of groups of this size."""
    solved, among = tries.sum(axis=-1), tries.shape[-1]
    by_count = {count: useful_share([1.0] * count + [0.0] * (among - count), size) for count in np.unique(solved).tolist()}
    return np.vectorize(by_count.__getitem__, otypes=[np.float64])(solved)


def _measured(half: NDArray[np.int64], size: int) -> NDArray[np.float64]:
    """The share of useful groups of each problem [seeds, PROBLEMS], made of members that were played one after the other."""
    groups = half[..., : HALF // size * size].reshape(*half.shape[:2], -1, size).sum(axis=-1)
    return ((groups > 0) & (groups < size)).mean(axis=-1)


def groups_result(found: Sequence[Found]) -> Result:
    findings = [finding for one in found for finding in _findings(one)]
    return Result(findings, "\n".join(map(_table, found)), {"environments": [_document(one) for one in found]}, partial(_draw, found))


def _findings(found: Found) -> list[Finding]:
    laws = {
        "the law predicts useful groups from each problem's own chance": {size: one.problem for size, one in found.sizes.items()},
        "the law of the mean chance alone predicts them": {size: one.mean for size, one in found.sizes.items()},
        "the law of mean and spread predicts them": {size: one.beta for size, one in found.sizes.items()},
    }
    findings = [Finding(f"{found.name}: {words}, groups of {SIZES[0]} to {SIZES[-1]}", *_over(by_size)) for words, by_size in laws.items()]
    truth, plan = found.wanted["problem"], found.wanted["mean"]
    numbers = f"{plan or 'none'} by the mean chance alone, {found.wanted['beta'] or 'none'} by mean and spread; none is over {HALF}"
    return [*findings, Finding(f"{found.name}: group size of which {WANTED:g} are useful", str(truth or "none"), numbers)]


def _over(by_size: Mapping[int, Comparison]) -> tuple[str, str]:
    """One verdict over all sizes, and the size that is furthest off."""
    verdicts = {one.verdict for one in by_size.values()}
    worst = max(by_size, key=lambda size: abs(by_size[size].difference.value))
    decided: list[Verdict] = ["better", "worse", "undecided"]
    verdict = next((_word(verdict) for verdict in decided if verdict in verdicts), "equal")
    wanted = seeds_wanted(by_size.values()) if verdict == "undecided" else ""
    return verdict, f"furthest off in groups of {worst}: {_points(by_size[worst].difference)}; margin {100 * MARGIN:g} points{wanted}"


def _word(verdict: Verdict) -> str:
    return {"better": "too high", "worse": "too low"}.get(verdict, verdict)


def _points(difference: Mean) -> str:
    return f"{100 * difference.value:+.1f} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}] points"


def _table(found: Found) -> str:
    seeds, problems = len(found.solved_P) // PROBLEMS, len(found.solved_P)
    lines = [
        f"{found.name}: {problems} problems of {seeds} seeds, {2 * HALF} tries of each. Chance of a reward {found.rates.mean():.3f} in the",
        f"mean, with a standard deviation of {found.spread:.3f} between problems.",
        "",
        "| G | useful groups | each problem's chance | less measured | the mean chance | less measured | mean and spread | less measured |",
        "|---" * 8 + "|",
    ]
    for size, one in found.sizes.items():
        cells = [str(size), f"{one.measured.value:.3f} [{one.measured.low:.3f}, {one.measured.high:.3f}]"]
        for value, comparison in ((one.by_problem, one.problem), (one.by_mean, one.mean), (one.by_beta, one.beta)):
            cells += [f"{value:.3f}", f"{_points(comparison.difference)}: **{_word(comparison.verdict)}**"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _document(found: Found) -> dict[str, Any]:
    def compared(one: Comparison) -> dict[str, Any]:
        ends = {"value": one.difference.value, "low": one.difference.low, "high": one.difference.high}
        return {**ends, "verdict": one.verdict, "units": one.seeds}

    return {
        "env": found.name,
        "tries": 2 * HALF,
        "solved": list(found.solved_P),
        "mean": float(found.rates.mean()),
        "spread": found.spread,
        "margin": MARGIN,
        "wanted": {"share": WANTED, **found.wanted},
        "sizes": [
            {
                "group_size": size,
                "measured": {"value": one.measured.value, "low": one.measured.low, "high": one.measured.high},
                "by_problem": one.by_problem,
                "by_mean": one.by_mean,
                "by_beta": one.by_beta,
                "problem": compared(one.problem),
                "mean": compared(one.mean),
                "beta": compared(one.beta),
            }
            for size, one in found.sizes.items()
        ],
    }


# ---------------------------------------------------------------- picture


def _draw(found: Sequence[Found], path: Path) -> None:
    """A row for each environment: useful groups by their size, and how hard its problems are."""
    with picture(path, 8.4, 0.4 + 2.9 * len(found)) as figure:
        for one, (left, right) in zip(found, figure.subplots(len(found), 2, width_ratios=(3, 2), squeeze=False), strict=True):
            _draw_sizes(left, one)
            right.hist(one.rates, bins=np.arange(0, 1.05, 0.04) - 0.02, color="#0066cc", alpha=0.7)
            right.axvline(one.rates.mean(), color="#cc5500", linestyle="--", linewidth=1, label=f"mean {one.rates.mean():.2f}")
            right.set(xlabel=f"share of {2 * HALF} tries that were rewarded", ylabel="problems", xlim=(-0.02, 1.02))
            right.legend(frameon=False, fontsize=7)


def _draw_sizes(axes: Axes, found: Found) -> None:
    every = range(2, max(SIZES) + 1)
    mean = float(found.rates.mean())
    axes.plot(every, [useful(mean, size) for size in every], color="#cc5500", linestyle="--", linewidth=1, label="law of the mean chance")
    beta = [useful_of_beta(mean, found.variance, size) for size in every]
    axes.plot(every, beta, color="#228833", linestyle=":", linewidth=1.2, label="law of mean and spread")
    axes.plot(
        list(found.sizes), [one.by_problem for one in found.sizes.values()], color="#0066cc", linewidth=1, label="law, problem by problem"
    )
    measured = [one.measured for one in found.sizes.values()]
    bars = [[one.value - one.low for one in measured], [one.high - one.value for one in measured]]
    axes.errorbar(
        list(found.sizes), [one.value for one in measured], yerr=bars, fmt="o", color="black", markersize=4, capsize=3, label="measured"
    )
    axes.axhline(WANTED, color="#999999", linewidth=0.6)
    axes.set(xscale="log", ylim=(0, 1.02), xlabel="episodes in a group", ylabel="groups that teach something")
    axes.set_title(found.name, fontsize=9)
    axes.set_xticks(SIZES, [str(size) for size in SIZES])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=7, loc="lower right")
