"""How much a task's rewards can teach, from the pass rates of its problems: bits, useful groups, the size of a group."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from veneer.measure.plan.figure import TML, Figure

LARGEST_GROUP = 1024
"""Above it a task should be made easier."""
TOO_HARD, TOO_EASY = 0.02, 0.98
"""Pass rates of the median problem beyond which groups of a usual size carry almost nothing."""
RESAMPLES = 100
QUANTILES, LEAST_ALIKE = 128, 1e-3


@dataclass(frozen=True)
class PassRates:
    """Of problems, as measured, assumed or read."""

    rates_P: tuple[float, ...]
    """The share of tries that solved each problem."""
    tries: int | None = None
    """At each; None: not known, and the rates are taken as they are."""

    def __post_init__(self) -> None:
        if not self.rates_P or not all(0 <= p <= 1 for p in self.rates_P):
            raise ValueError("pass rates are shares from 0 to 1, at least one")

    @property
    def array(self) -> NDArray[np.float64]:
        return np.array(self.rates_P)

    @property
    def mean(self) -> float:
        return float(self.array.mean())

    @property
    def median(self) -> float:
        return float(np.median(self.array))

    def population(self) -> PassRates:
        """What is known of problems like these: quantiles of the Beta distribution of pass rates from which so many tries would give
        these shares, by its first two moments (beta-binomial). A problem that eight tries did not solve is not one that cannot be
        solved. Without tries, the rates themselves."""
        if self.tries is None or self.tries < 2:
            return self
        from scipy.special import betaincinv

        mean = min(max(self.mean, 0.5 / (self.tries * len(self.rates_P) + 1)), 1 - 0.5 / (self.tries * len(self.rates_P) + 1))
        spread = float(self.array.var(ddof=1)) / (mean * (1 - mean)) if len(self.rates_P) > 1 else 0.0
        alike = (self.tries * spread - 1) / (self.tries - 1)  # intraclass correlation: Var(c / n) = m (1 - m) (1 + (n - 1) rho) / n
        alike = min(max(alike, LEAST_ALIKE), 1 - LEAST_ALIKE)
        both = 1 / alike - 1
        places = (np.arange(QUANTILES) + 0.5) / QUANTILES
        return PassRates(tuple(np.clip(betaincinv(mean * both, (1 - mean) * both, places), 0.0, 1.0).tolist()))


def entropy(p: float | NDArray[np.float64]) -> NDArray[np.float64]:
    """Of pass or fail, in bits; 0 where p is 0 or 1."""
    p = np.asarray(p, np.float64)
    inside = np.clip(p, 1e-300, 1 - 1e-16)
    return np.where((p <= 0) | (p >= 1), 0.0, -inside * np.log2(inside) - (1 - inside) * np.log2(1 - inside))


def mixed_share(p: float | NDArray[np.float64], group_size: int) -> NDArray[np.float64]:
    """The chance that not all of a group fare alike: 1 - p^G - (1 - p)^G."""
    p = np.asarray(p, np.float64)
    return 1 - p**group_size - (1 - p) ** group_size


def advantage_bits(p: float | NDArray[np.float64], group_size: int) -> NDArray[np.float64]:
    """Entropy an episode of the centred advantages of a group: H(p) less what is lost because a group that all fail and one that all pass
    look alike, s h(p^G / s) / G with s = p^G + (1 - p)^G."""
    p = np.asarray(p, np.float64)
    alike = p**group_size + (1 - p) ** group_size
    safe = np.where(alike > 0, alike, 1.0)
    return entropy(p) - alike * entropy(p**group_size / safe) / group_size


def useful_groups(rates: PassRates, group_size: int) -> float:
    """The share of groups with two different rewards, over all problems."""
    return float(mixed_share(rates.array, group_size).mean())


def smallest_group(rates: PassRates, share: float) -> int | None:
    """The smallest group of which this share is useful on average over the problems; None: none up to LARGEST_GROUP."""
    low, high = 2, LARGEST_GROUP
    if useful_groups(rates, high) < share:
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if useful_groups(rates, middle) >= share else (middle + 1, high)
    return low


def plan_group_size(rates: PassRates, share: float) -> Figure:
    """From the wanted share of useful groups. The range: problems drawn anew from those measured, 95%."""
    known = rates.population()
    value = smallest_group(known, share)
    formula = f"the smallest G with mean over problems of 1 - p^G - (1 - p)^G >= {share:g}"
    if rates.tries:
        formula += f"; p as {rates.tries} tries at each of {len(rates.rates_P)} let it be (beta-binomial)"
    source = "counting: a group in which all fare alike has advantages of 0"
    if value is None:
        reached = useful_groups(known, LARGEST_GROUP)
        why = f"even groups of {LARGEST_GROUP} are useful in {reached:.0%} only: the others are always or never solved"
        return Figure("group size", None, "episodes", formula, source, note=why)
    sizes = [value, *(smallest_group(one.population(), share) or LARGEST_GROUP for one in _resampled(rates))]
    low, high = np.quantile(sizes, (0.025, 0.975)).tolist()
    note = hardness(rates) if rates.tries else "the rates are taken as they are: no tries behind them are known"
    return Figure("group size", value, "episodes", formula, source, min(value, math.floor(low)), max(value, math.ceil(high)), note)


def _resampled(rates: PassRates) -> list[PassRates]:
    rng = np.random.default_rng(0)
    count = RESAMPLES if len(rates.rates_P) > 1 else 0
    return [PassRates(tuple(rng.choice(rates.array, len(rates.rates_P)).tolist()), rates.tries) for _ in range(count)]


def plan_pass_rate(rates: PassRates) -> Figure:
    """The mean over problems. The range: problems drawn anew from those measured, 95%."""
    count = len(rates.rates_P)
    formula = f"mean over {count} problems" + (f", {rates.tries} tries at each" if rates.tries else "")
    if count == 1:
        return Figure("pass rate", rates.mean, "", formula, "measured or given", note="of one problem: what others have is not known")
    low, high = np.quantile([one.mean for one in _resampled(rates)], (0.025, 0.975)).tolist()
    return Figure("pass rate", rates.mean, "", formula, "measured or given", min(low, rates.mean), max(high, rates.mean))


def plan_useful(rates: PassRates, group_size: int) -> Figure:
    """The share of useful groups of a given size."""
    value = useful_groups(rates.population(), group_size)
    shares = [value, *(useful_groups(one.population(), group_size) for one in _resampled(rates))]
    low, high = np.quantile(shares, (0.025, 0.975)).tolist()
    formula = f"mean over problems of 1 - p^G - (1 - p)^G, G = {group_size}"
    return Figure("useful groups", value, "", formula, "as the group size", min(low, value), max(high, value))


def hardness(rates: PassRates) -> str:
    """What is wrong with the problems, in words; nothing where they are fit."""
    if rates.median < TOO_HARD:
        return f"half of the problems are solved in less than {TOO_HARD:.0%} of tries: demonstrations or easier problems first"
    if rates.median > TOO_EASY:
        return f"half of the problems are solved in more than {TOO_EASY:.0%} of tries: harder problems teach more"
    return ""


def plan_bits(rates: PassRates, group_size: int) -> Figure:
    """Bits that an episode brings at most."""
    known = rates.population().array
    value, bound = float(advantage_bits(known, group_size).mean()), float(entropy(known).mean())
    formula = "mean over problems of H(p) - s h(p^G / s) / G, s = p^G + (1 - p)^G"
    source = f"{TML}, section on capacity: what a policy gradient learns is at most the entropy of its advantages"
    note = f"an upper bound at the pass rates of the start; H(p) itself is {bound:.3g}, and it is never 1 unless every p is 1/2"
    return Figure("bits an episode", value, "bits", formula, source, 0.0, max(value, bound), note)


def plan_demand(rates: PassRates, group_size: int, episodes: int) -> Figure:
    """Bits that a run of so many episodes brings at most."""
    each = plan_bits(rates, group_size)
    assert each.value is not None
    high = None if each.high is None else each.high * episodes
    formula = f"episodes ({episodes:,}) x bits an episode"
    return Figure("bits demanded", each.value * episodes, "bits", formula, each.source, 0.0, high, "an upper bound: pass rates move")


def plan_demand_of_text(tokens: float, first_epoch_nats: float) -> Figure:
    """Bits that there are to memorise in supervised training: the loss of the first epoch, which sees every token for the first time."""
    return Figure(
        "bits demanded",
        tokens * first_epoch_nats / math.log(2),
        "bits",
        "trained tokens x first-epoch loss (nats a token) / ln 2",
        f"{TML}, section on capacity (prequential coding)",
        0.0,
        tokens * first_epoch_nats / math.log(2),
        "an upper bound: all of it memorised",
    )


def r1_zero_episodes(steps: int = 10_400, questions: int = 32, samples: int = 16) -> int:
    """Episodes of DeepSeek-R1-Zero: steps x questions a step x samples a question (https://www.nature.com/articles/s41586-025-09422-z)."""
    return steps * questions * samples
