"""What does an episode of reward teach? Bandits with a secret: which of the actions are rewarded.

"LoRA Without Regret" argues that an episode with a scalar reward teaches about one bit at most, because what a policy gradient can learn
is bounded by the entropy of its advantages (https://thinkingmachines.ai/blog/lora/). For pass or fail at a chance p of reward that entropy
is H(p), which is 0 where every episode ends alike.

The secret is a set of k of n actions, any of the C(n, k) with the same chance. An episode is one action, rewarded if the set holds it:
before anything is known every action has the chance p = k / n. All actions that were not tried are alike, so nobody, however clever,
can be told more by the next episode than by trying any one of them. n and k are the smallest with this p and 2^64 secrets.

The ideal learner tries each action once and keeps the exact posterior. REINFORCE is a softmax over the n actions that begins even and
is moved by groups of 8 episodes: for each episode the logit of its action by the learning rate times the reward less the group's mean
(the rest of the softmax's gradient cancels within a group). It has solved the bandit when it earns 9 of 10 rewards, as it does from the
start where p is 0.9 or more, and the secret can be read off it: the k likeliest actions are the rewarded ones. Its learning rate is the
one that solves most quickly on other secrets. What its episodes tell is measured by the exact posterior of somebody who watches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from veneer.measure.bits import advantage_bits, corrected_bits, entropy_bits, expected_reward_bits, reward_bits
from veneer.measure.verdict import compare_seeds, seeds_wanted, t_interval
from veneer.studies.contest import CHOICE, Terms
from veneer.studies.drawing import picture
from veneer.studies.lab import Lab
from veneer.studies.result import Finding, Result
from veneer.studies.secret import GROUP, PATIENCE, Ends, Learners, Numbers, Task, ask, expected_bits, make_task, play
from veneer.train.rollouts import derive_seed
from veneer.types import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

QUESTION = "How many bits does an episode of reward teach?"
CLAIMS = (14,)
_BELOW = (*(Fraction(1, n) for n in (200, 100, 50, 20, 10, 5)), Fraction(3, 10), Fraction(2, 5))
CHANCES: Sequence[Fraction] = (Fraction(0), *_BELOW, Fraction(1, 2), *(1 - p for p in reversed(_BELOW)), Fraction(1))
LEARNED: Sequence[Fraction] = tuple(p for p in CHANCES if Fraction(1, 100) <= p <= Fraction(99, 100))
"""Where REINFORCE learns too."""
TOLERANCE = 0.02
"""Of a number of bits, as a share."""
EPISODES_MARGIN = 0.1
"""Of a number of episodes, as a share."""
COURSES, FIRST = 100_000, 32
"""Secrets a seed of which the ideal learner's first episodes are looked at."""
LEARNERS = 16
"""Secrets a seed that REINFORCE is given."""
RATES = tuple(2.0**k for k in range(-5, 2))
WATCHED = Fraction(1, 10)
"""Where the course of learning is drawn."""
SIZES: Sequence[int] = (2, 4, 8, 16, 32, 64, 128)
MEASURED: Sequence[Fraction] = (Fraction(1, 2), Fraction(1, 5), Fraction(1, 10), Fraction(1, 50))
GROUPS = 1_000_000
"""Groups a seed on which the measure is measured."""


async def conduct(lab: Lab, terms: Terms) -> Result:
    """Raises:
    ConfigError: an override; there are no runs to be set.
    Interrupted: ``lab.stop`` was set.
    """
    if terms.overrides:
        raise ConfigError(f"--set {terms.overrides[0]}: this study trains no model, and there is nothing to set")
    seeds = range(terms.seeds)
    told, learned = dict[Fraction, Told](), dict[Fraction, Learned]()
    for chance in CHANCES:
        lab.go_on()
        task = make_task(chance)
        told[chance] = Told(task, np.array([ask(task, COURSES, FIRST, _rng("ideal", chance, seed)) for seed in seeds]))
        if chance in LEARNED:
            learned[chance] = teach(task, terms)
    lab.go_on()
    measured = {(p, size): measure(p, size, terms.seeds) for p in MEASURED for size in SIZES}
    return bandit_result(told, learned, measured, watch(make_task(WATCHED), learned[WATCHED].rate))


def _rng(*parts: object) -> np.random.Generator:
    return np.random.default_rng(derive_seed("bandit", *parts))


# ---------------------------------------------------------------- what is simulated


@dataclass(frozen=True)
class Told:
    """What the ideal learner's first episodes tell."""

    task: Task
    bits: Numbers
    """[seeds, FIRST]"""

    @property
    def means(self) -> Numbers:
        """An episode of each seed."""
        return self.bits.mean(axis=1)


@dataclass(frozen=True)
class Learned:
    """REINFORCE at the learning rate that suits it."""

    task: Task
    rate: float
    tried: Mapping[float, float]
    """By learning rate, on the choice seeds: log2 K / H(p) over the episodes until solved, 0 where it was not, in the mean."""
    ends: Sequence[Ends]
    """A seed each."""

    def shares(self, what: str) -> Numbers:
        """Of each seed: log2 K / H(p) over the episodes until ``told`` or ``solved``, 0 where it never was, the mean over learners."""
        return np.array([(self.task.claimed / getattr(ends, what)).mean() for ends in self.ends])

    @property
    def solved(self) -> float:
        """The share of the learners."""
        return float(np.mean([np.isfinite(ends.solved).mean() for ends in self.ends]))

    @property
    def printed(self) -> Numbers:
        """Of each seed: bits by the measure of real runs for each bit received."""
        return np.array([ends.printed.sum() / ends.received.sum() for ends in self.ends])


def teach(task: Task, terms: Terms) -> Learned:
    """Choose a learning rate on the choice seeds, and learn with it on the others."""
    grid = RATES[::2] if terms.coarse else RATES
    rates = [rate for rate in grid for _ in range(LEARNERS)]
    choice = [play(task, rates, _rng("rate", task, CHOICE + seed)) for seed in range(terms.choice_seeds)]
    means = np.mean([(task.claimed / ends.solved).reshape(len(grid), LEARNERS).mean(axis=1) for ends in choice], axis=0)
    tried = dict(zip(grid, map(float, means), strict=True))
    best = max(grid, key=lambda rate: (tried[rate], -rate))
    return Learned(task, best, tried, [play(task, [best] * LEARNERS, _rng("learn", task, seed)) for seed in range(terms.seeds)])


def watch(task: Task, rate: float, learners: int = 64) -> Mapping[str, Numbers]:
    """Half as long as PATIENCE: episodes, and what was received, printed and narrowed by then, the mean over learners."""
    watched = Learners(task, [rate] * learners, _rng("watch", task))
    course = [(0.0, 0.0, 0.0, 0.0)]
    while watched.steps * GROUP < PATIENCE * task.actions / 2:
        watched.step()
        course.append((watched.steps * GROUP, watched.received.mean(), watched.printed.mean(), watched.narrowed.mean()))
    return dict(zip(("episodes", "received", "printed", "narrowed"), np.array(course).T, strict=True))


# ---------------------------------------------------------------- the measure of real runs


def measure(chance: Fraction, size: int, seeds: int) -> Mapping[str, Numbers]:
    """What the measures say of groups of so many episodes in the mean over GROUPS of them, one number a seed, as shares of the
    entropy of their rewards."""
    rewards = [[1.0] * solved + [0.0] * (size - solved) for solved in range(size + 1)]
    whole = size * entropy_bits(float(chance))
    drawn = [_rng("measure", chance, size, seed).binomial(size, float(chance), GROUPS) for seed in range(seeds)]
    tables = {"reward_bits": np.array([*map(reward_bits, rewards)]), "corrected_bits": np.array([*map(corrected_bits, rewards)])}
    return {name: np.array([table[solved].mean() for solved in drawn]) / whole for name, table in tables.items()}


# ---------------------------------------------------------------- what it says

Measured = Mapping[tuple[Fraction, int], Mapping[str, Numbers]]
"""By chance and group size."""


def bandit_result(
    told: Mapping[Fraction, Told], learned: Mapping[Fraction, Learned], measured: Measured, course: Mapping[str, Numbers]
) -> Result:
    findings = [*_of_the_ideal(told), *_of_reinforce(learned), *_of_the_measure(measured)]
    draw = partial(_draw, told, learned, measured, course)
    return Result(findings, _tables(told, learned, measured), _document(told, learned, measured), draw)


def _document(told: Mapping[Fraction, Told], learned: Mapping[Fraction, Learned], measured: Measured) -> dict[str, Any]:
    return {
        "ideal": [
            {
                "chance": float(chance),
                "actions": one.task.actions,
                "secret_bits": one.task.bits,
                "bound": entropy_bits(float(chance)),
                "bits": list(one.means),
                "expected": float(expected_bits(one.task, FIRST).mean()),
                "episodes": one.task.ideal,
            }
            for chance, one in told.items()
        ],
        "reinforce": [
            {
                "chance": float(chance),
                "learning_rate": one.rate,
                "tried": [{"learning_rate": rate, "share": share} for rate, share in one.tried.items()],
                "claimed_episodes": one.task.claimed,
                "solved": one.solved,
                "told_share": list(one.shares("told")),
                "solved_share": list(one.shares("solved")),
                "printed_for_each_bit": list(one.printed),
                "narrowed": [float(ends.narrowed.mean()) for ends in one.ends],
            }
            for chance, one in learned.items()
        ],
        "measure": [
            {"chance": float(chance), "group_size": size, **{name: list(shares) for name, shares in by_name.items()}}
            for (chance, size), by_name in measured.items()
        ],
    }


def _of_the_ideal(told: Mapping[Fraction, Told]) -> list[Finding]:
    inner = {chance: one for chance, one in told.items() if 0 < chance < 1}
    expected = {chance: expected_bits(one.task, FIRST) for chance, one in told.items()}
    ratios = {chance: one.means / expected[chance].mean() for chance, one in inner.items()}
    most = max(expected[chance].max() / entropy_bits(float(chance)) for chance in inner)
    silent = all(not told[chance].bits.any() for chance in told if chance not in inner)
    best = [max(told, key=lambda chance: told[chance].means[seed]) for seed in range(len(next(iter(told.values())).bits))]
    peak = max(set(best), key=best.count)
    takes = {chance: one.task.ideal / one.task.claimed for chance, one in inner.items()}
    return [
        Finding(
            f"the ideal learner is told what the closed form says, in its first {FIRST} episodes, at every chance",
            *_same(ratios, TOLERANCE),
        ),
        Finding(
            "no episode tells more than H(p), and none tells anything at p = 0 and 1",
            "holds" if most <= 1 + 1e-9 and silent else "broken",
            f"at most {most:.4f} of it by the closed form, over all chances and episodes",
        ),
        Finding(
            "the chance at which an episode tells most",
            f"{float(peak):g}",
            f"in {best.count(peak)} of {len(best)} seeds; {_share(told[peak].means)} bits",
        ),
        Finding(
            "the ideal learner takes log2 K / H(p) episodes in the mean, at every chance",
            "equal" if all(abs(ratio - 1) < EPISODES_MARGIN for ratio in takes.values()) else "differs",
            f"{_range(takes)} times as many, exactly; margin {EPISODES_MARGIN:g}",
        ),
    ]


def _of_reinforce(learned: Mapping[Fraction, Learned]) -> list[Finding]:
    half = Fraction(1, 2)
    told, solved = ({p: one.shares(what) for p, one in learned.items()} for what in ("told", "solved"))
    printed = {p: one.printed for p, one in learned.items()}
    fewest = min(one.solved for one in learned.values())
    above = [p for p, shares in told.items() if t_interval(shares).low > 1]
    in_time = compare_seeds(solved[half], [1.0] * len(solved[half]), EPISODES_MARGIN)
    measured = compare_seeds(printed[half], [1.0] * len(printed[half]), TOLERANCE)
    return [
        Finding(
            "REINFORCE is told no more than H(p) an episode, until it has been told all",
            "broken" if above else "holds",
            f"{_share(told[half])} of it at p = 0.5; {_means(told)}",
        ),
        Finding(
            "REINFORCE solves it in log2 K / H(p) episodes (their number over those that it takes)",
            in_time.said("higher", "lower"),
            f"{_share(solved[half])} at p = 0.5; {_means(solved)}; {fewest:.0%} or more solve it in time; margin {EPISODES_MARGIN:g}"
            f"{in_time.wanted}",
        ),
        Finding(
            "bits by the measure of real runs, for each bit that REINFORCE's episodes tell until it has solved it",
            measured.said("higher", "lower"),
            f"{_share(printed[half])} at p = 0.5; {_means(printed)}; margin {TOLERANCE:g}{measured.wanted}",
        ),
    ]


def _of_the_measure(measured: Measured) -> list[Finding]:
    exact = {
        (p, size): by_name["reward_bits"] * size * entropy_bits(float(p)) / expected_reward_bits(float(p), size)
        for (p, size), by_name in measured.items()
    }
    findings = [Finding("reward_bits of groups is its exact expectation, at every chance and size", *_same(exact, TOLERANCE))]
    for name in ("reward_bits", "corrected_bits"):
        shares = {p: by_name[name] for (p, size), by_name in measured.items() if size == GROUP}
        half, others = shares[MEASURED[0]], [p for p in shares if p != MEASURED[0]]
        numbers = f"{_share(half)} of it at p = 0.5; " + ", ".join(f"{shares[p].mean():.3f} at {float(p):g}" for p in others)
        enough = [size for size in SIZES if abs(measured[MEASURED[0], size][name].mean() - 1) <= TOLERANCE]
        numbers += f"; within {TOLERANCE:g} at p = 0.5 from groups of {min(enough)} on" if enough else ""
        told = compare_seeds(half, [1.0] * len(half), TOLERANCE)
        asked = f"{name} of groups of {GROUP} is the entropy of their rewards"
        findings.append(Finding(asked, told.said("higher", "lower"), numbers + told.wanted))
    return findings


def _same(ratios: Mapping[Any, Numbers], margin: float) -> tuple[str, str]:
    """Whether all ratios, one a seed, are 1; and the one that speaks most against it."""
    found = {key: compare_seeds(ratio, [1.0] * len(ratio), margin) for key, ratio in ratios.items()}
    worst = max(found, key=lambda key: max(abs(found[key].difference.low), abs(found[key].difference.high)))
    verdicts = {one.verdict for one in found.values()}
    verdict = "differs" if verdicts & {"better", "worse"} else "undecided" if "undecided" in verdicts else "equal"
    where = ", groups of ".join(f"{float(part):g}" for part in (worst if isinstance(worst, tuple) else (worst,)))
    wanted = seeds_wanted(found.values()) if verdict == "undecided" else ""
    return verdict, f"furthest off at p = {where}: {_share(ratios[worst])} of it; margin {margin:g}{wanted}"


def _share(values: Numbers) -> str:
    mean = t_interval(values)
    return f"{mean.value:.3f} [{mean.low:.3f}, {mean.high:.3f}]"


def _means(by_chance: Mapping[Fraction, Numbers]) -> str:
    return f"{_range({p: float(values.mean()) for p, values in by_chance.items()})} over p"


def _range(values: Mapping[Fraction, float]) -> str:
    low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    return f"from {values[low]:.3g} (p = {float(low):g}) to {values[high]:.3g} (p = {float(high):g})"


def _tables(told: Mapping[Fraction, Told], learned: Mapping[Fraction, Learned], measured: Measured) -> str:
    lines = [f"The ideal learner; K secrets, bits an episode over the first {FIRST}, episodes until it knows the secret:", ""]
    lines += ["| p | k of n | log2 K | H(p) | closed form | simulated | log2 K / H(p) | it takes |", "|---" * 8 + "|"]
    for chance, one in told.items():
        task, bound, expected = one.task, entropy_bits(float(chance)), expected_bits(one.task, FIRST).mean()
        takes = (f"{task.claimed:.1f}", f"{task.ideal:.1f}") if bound else ("-", "-")
        cells = (f"{float(chance):g}", f"{task.rewarded} of {task.actions}", f"{task.bits:.1f}", f"{bound:.4f}", f"{expected:.4f}")
        lines.append(f"| {' | '.join((*cells, _share(one.means), *takes))} |")
    lines += ["", f"REINFORCE; episodes as log2 K / H(p) over their number, {LEARNERS} secrets a seed; never is 0:", ""]
    lines += ["| p | learning rate | solved | until told all | until solved | bits printed for each told | policy narrowed by, bits |"]
    lines += ["|---" * 7 + "|"]
    for chance, one in learned.items():
        rate = f"{one.rate:g}" + (" (last tried)" if one.rate in (RATES[0], RATES[-1]) else "")
        narrowed = f"{np.mean([ends.narrowed.mean() for ends in one.ends]):.2f}"
        cells = (_share(one.shares("told")), _share(one.shares("solved")), _share(one.printed), narrowed)
        lines.append(f"| {' | '.join((f'{float(chance):g}', rate, f'{one.solved:.2f}', *cells))} |")
    lines += ["", "The measures of groups, as shares of the entropy of their rewards, G H(p); beside them that of centred advantages:", ""]
    lines += ["| p | G | advantages | reward_bits, exactly | measured | corrected_bits, measured |", "|---" * 6 + "|"]
    for (chance, size), by_name in measured.items():
        whole = size * entropy_bits(float(chance))
        exact = (advantage_bits(float(chance), size) / whole, expected_reward_bits(float(chance), size) / whole)
        cells = (f"{float(chance):g}", str(size), *(f"{share:.4f}" for share in exact), *map(_share, by_name.values()))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- picture

BOUND, IDEAL, LEARNER, PRINTED, POLICY = "#555555", "#0066cc", "#cc5500", "#aa3377", "#228833"


def _draw(
    told: Mapping[Fraction, Told], learned: Mapping[Fraction, Learned], measured: Measured, course: Mapping[str, Numbers], path: Path
) -> None:
    """Bits an episode and episodes to solve by the chance of reward, the course of learning, and the measure by group size."""
    with picture(path, 9.2, 6.6) as figure:
        (bits, takes), (learning, sizes) = figure.subplots(2, 2)
        _draw_chances(bits, takes, told, learned)
        _draw_course(learning, learned[WATCHED].task, course)
        for chance, shade in zip(MEASURED, ("#004488", "#0077bb", "#33bbee", "#99ccdd"), strict=True):
            for name, line in (("reward_bits", "-"), ("corrected_bits", ":")):
                shares = [measured[chance, size][name].mean() for size in SIZES]
                label = f"p = {float(chance):g}" if line == "-" else None
                sizes.plot(SIZES, shares, color=shade, linestyle=line, marker="o", markersize=3, label=label)
        sizes.axhspan(1 - TOLERANCE, 1 + TOLERANCE, color=BOUND, alpha=0.15, linewidth=0)
        sizes.set(xscale="log", ylim=(0, 1.05), xlabel="episodes in a group", ylabel="share of the rewards' entropy")
        sizes.set_xticks(SIZES, [str(size) for size in SIZES], minor=False)
        sizes.minorticks_off()
        sizes.set_title("the measure of real runs (dotted: corrected)", fontsize=9)
        sizes.legend(frameon=False, fontsize=7, loc="lower right")


def _draw_chances(bits: Axes, takes: Axes, told: Mapping[Fraction, Told], learned: Mapping[Fraction, Learned]) -> None:
    grid = np.linspace(0, 1, 401)
    bits.plot(grid, [entropy_bits(p) for p in grid], color=BOUND, linewidth=1, label="H(p), the bound")
    bits.plot([float(p) for p in told], [one.means.mean() for one in told.values()], "o", color=IDEAL, markersize=4, label="ideal learner")
    shares = [t_interval(one.shares("told")) for one in learned.values()]
    chances, bounds = [float(p) for p in learned], np.array([entropy_bits(float(p)) for p in learned])
    around = np.array([[one.value - one.low, one.high - one.value] for one in shares]).T * bounds
    values = np.array([one.value for one in shares]) * bounds
    bits.errorbar(chances, values, yerr=around, color=LEARNER, fmt="s-", markersize=3, linewidth=0.8, label="REINFORCE, until told all")
    bits.set(xlabel="chance of reward p", ylabel="bits an episode")
    bits.set_title("what an episode tells of the secret", fontsize=9)
    bits.legend(frameon=False, fontsize=7, loc="center", bbox_to_anchor=(0.5, 0.52))
    takes.plot(chances, [one.task.claimed for one in learned.values()], color=BOUND, linewidth=1, label="log2 K / H(p)")
    takes.plot(chances, [one.task.ideal for one in learned.values()], "o", color=IDEAL, markersize=4, label="ideal learner")
    for what, marker, label in (("told", "s:", "REINFORCE, until told all"), ("solved", "s-", "REINFORCE, until it has solved it")):
        middle = [float(np.median([getattr(ends, what) for ends in one.ends])) for one in learned.values()]
        takes.plot(chances, middle, marker, color=LEARNER, markersize=3, linewidth=0.8, label=label)
    takes.set(yscale="log", xlabel="chance of reward p", ylabel="episodes")
    takes.set_title("episodes to a secret of 64 bits or a little more", fontsize=9)
    takes.legend(frameon=False, fontsize=7)


def _draw_course(axes: Axes, task: Task, course: Mapping[str, Numbers]) -> None:
    episodes = course["episodes"]
    bound = np.minimum(episodes * entropy_bits(task.chance), task.bits)
    axes.plot(episodes, bound, color=BOUND, linewidth=1, label="H(p) an episode")
    known = np.concatenate([[0.0], expected_bits(task, task.actions).cumsum()])
    axes.plot(np.arange(len(known)), known, color=IDEAL, linewidth=1, label="told to the ideal learner")
    axes.plot(episodes, course["printed"], color=PRINTED, linewidth=1, linestyle="--", label="printed by the measure of real runs")
    axes.plot(episodes, course["received"], color=LEARNER, linewidth=1.4, label="told to REINFORCE")
    axes.plot(episodes, course["narrowed"], color=POLICY, linewidth=1, label="entropy that its policy lost")
    axes.set(ylim=(0, 2.6 * task.bits), xlabel="episodes", ylabel="bits")
    axes.set_title(f"learning at p = {task.chance:g}", fontsize=9)
    axes.legend(frameon=False, fontsize=7, loc="upper right")
