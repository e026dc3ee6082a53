"""What does a policy forget that learns something new? One that was taught to sort learns longer sums, in five ways.

Sums are learned by reward, by reward of right answers alone, by imitation of its own right answers, and by demonstrations in two manners.
RL's Razor finds that forgetting follows the KL divergence from the first policy to the trained one on the new task, by a parabola, whatever
the method; and that reinforcement learning forgets less than supervised training because it reaches the same accuracy nearer to where it
began, which comes of drawing from the policy itself and not of learning from wrong answers too: without them it forgets as little
(https://arxiv.org/abs/2509.04259). Who knows little forgets little: the bundled base half knows the other tasks, and learning sums makes it
better at them (the study of the crossover). So it is taught first, by reward, to sort digits, and every run begins from the one adapter
that comes of it: intervals are over what seeds do behind that, not over what else it might have been taught.

Right answers alone are those that it draws at every step, with an advantage of 1, and 0 for all others ("1-0 Reinforce"). Its own right
answers to imitate are sampled once, before anything is learned. Demonstrations are right to the last step, either in the manner that it
has itself, from the first number on, or from the last one on, which it has never seen. Each way runs at its best learning rate, by the
score of its longest runs, and is stopped at several lengths; accuracies are made equal by straight lines between those, and where such a
line would begin before the first step nothing is said.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from veneer.measure.verdict import compare_seeds, t_interval
from veneer.studies.contest import CHOICE, Arm, Sweep, Terms, config_of, overridden, sweep_all, thinned
from veneer.studies.contest_page import tell_edges, tell_sweep
from veneer.studies.drawing import picture
from veneer.studies.lab import ADAPTER, Lab
from veneer.studies.result import Finding, Result
from veneer.studies.sharpening import scorecards
from veneer.studies.worked import write_worked
from veneer.train.config import RunConfig, ScorecardSettings, make_config
from veneer.types import RunError

QUESTION = "Does reinforcement learning forget less than supervised training at the same accuracy, and does the divergence tell it?"
CLAIMS = (20,)
REWARDED, POSITIVE, RIGHT = "by reward", "by reward of right answers alone", "by its own right answers"
OWN, OTHER = "by demonstrations in its manner", "by demonstrations in another"
SHORT, LONG = (5, 10, 20, 40, 80), (40, 80, 120, 160, 240)
LENGTHS: Mapping[str, Sequence[int]] = {REWARDED: SHORT, POSITIVE: SHORT, RIGHT: SHORT, OWN: SHORT, OTHER: LONG}
"""Steps."""
RATES = (3.75e-4, 7.5e-4, 1.5e-3, 3e-3, 6e-3)
ROWS = 400
NUMBERS = (4, 6)
"""Of a sum."""
ENV: Mapping[str, Any] = {"env": {"name": "arithmetic", "args": {"min_terms": NUMBERS[0], "max_terms": NUMBERS[1]}}}
SCORECARD = ScorecardSettings(problems=64, tries=12, envs=("sort", "count", "reverse"), elsewhere=256)
TEACHING: Mapping[str, Any] = {
    "seed": CHOICE,
    "env": {"name": "sort"},
    "rl": {"steps": 30, "groups_per_batch": 8, "group_size": 8, "learning_rate": 1.5e-3},
}
SHARED: Mapping[str, Any] = {"lora": {"rank": 4}, "eval": {"problems": 256, "every": 10**6}}
KL_MARGIN, LOST_MARGIN = 0.1, 0.02
"""Of nats an episode; of a reward."""
GAIN = 0.02
"""By which an accuracy must exceed the starts of all seeds, to be one that was learned."""
NORMAL = 1.96
"""Standard errors of a 95% interval, on either side."""
EXPLAINED = 0.9
"""The share of variance that the claim has the parabola explain."""


@dataclass(frozen=True)
class Point:
    """A run, as its scorecard has it."""

    steps: int
    accuracy: float
    kl: float
    """KL(first || trained) in nats an episode of the new task."""
    lost: float
    """Of the reward elsewhere, the mean over the other tasks."""
    error: float = 0.0
    """Of that, its standard error."""


Course = Sequence[Point]
"""Of one seed and way, by rising length; what all began from first."""


def ways_of(folder: Path) -> Sequence[Arm]:
    """One for each way, at its longest. ``folder``: where demonstrations are kept.

    Raises:
        StorageError: they cannot be.
    """
    imitation = {"rounds": 1, "problems": 128, "group_size": 8, "keep": 8, "bar": 1.0, "batch_size": 16, "max_tokens": 72}
    demonstrations = {"batch_size": 16, "held_out": 0.1}
    reward = {"groups_per_batch": 8, "group_size": 8, "max_tokens": 72}
    settings: dict[str, tuple[str, dict[str, Any]]] = {
        REWARDED: ("rl", reward),
        POSITIVE: ("rl", {**reward, "advantage": "reinforce"}),
        RIGHT: ("rejection", imitation),
        OWN: ("sft", {**demonstrations, "data": str(write_worked(folder, ROWS, False, NUMBERS))}),
        OTHER: ("sft", {**demonstrations, "data": str(write_worked(folder, ROWS, True, NUMBERS))}),
    }
    return [Arm(way, {**ENV, "kind": kind, kind: {**own, "steps": LENGTHS[way][-1]}}, RATES) for way, (kind, own) in settings.items()]


async def conduct(lab: Lab, terms: Terms) -> Result:
    """Raises:
    ConfigError: an override that cannot be applied, or is of what the study itself decides.
    RunError: the teaching came to nothing, or no answer of the taught policy to a training problem is right.
    Interrupted, VeneerError: as ``Lab.run``.
    """
    ways = thinned(ways_of(lab.folder.parent / "data"), terms)
    shared = overridden(SHARED, ways, terms)
    shared = {**shared, "init": str(await _taught(lab, shared) / ADAPTER)}
    sweeps = await sweep_all(lab, shared, ways, terms.choice_seeds)
    outcomes = await lab.run([config for way, sweep in zip(ways, sweeps, strict=True) for config in _configs(shared, way, sweep, terms)])
    cards = await scorecards(lab, outcomes, SCORECARD)
    at = iter(cards)
    paths: dict[str, list[Course]] = {}
    for way in ways:
        paths[way.name] = [_path([(steps, next(at)) for steps in LENGTHS[way.name]]) for _ in range(terms.seeds)]
    swept = {way.name: sweep for way, sweep in zip(ways, sweeps, strict=True)}
    findings = [_beginning(cards), *_findings(paths, swept)]
    document = {"ways": _document(paths), "learning_rates": {name: sweep.means for name, sweep in swept.items()}}
    return Result(findings, f"{_tables(paths)}\n{_rates(swept)}", document, lambda path: _draw(paths, path))


async def _taught(lab: Lab, shared: Mapping[str, Any]) -> Path:
    """The run that every other begins from."""
    (taught,) = await lab.run([make_config({**shared, **TEACHING})])
    if taught.diverged or taught.score <= taught.score_before:
        raise RunError(f"teaching came to nothing ({taught.score_before:.3f} -> {taught.score:.3f}); there would be nothing to forget")
    return taught.folder


def _configs(shared: Mapping[str, Any], way: Arm, sweep: Sweep, terms: Terms) -> list[RunConfig]:
    """Seed by seed, each at every length."""
    kind = way.settings["kind"]
    cut = [replace(way, settings={**way.settings, kind: {**way.settings[kind], "steps": steps}}) for steps in LENGTHS[way.name]]
    return [config_of(shared, arm, sweep.best, seed) for seed in range(terms.seeds) for arm in cut]


def _path(cards: Sequence[tuple[int, Mapping[str, Any]]]) -> Course:
    start = statistics.fmean(card["card"]["reward"]["start"]["value"] for _, card in cards)  # the same policy and draws each time
    return [Point(0, start, 0.0, 0.0), *(_point(steps, card) for steps, card in cards)]


def _point(steps: int, card: Mapping[str, Any]) -> Point:
    changes = [other["reward"]["difference"] for other in card["elsewhere"]]
    lost = -statistics.fmean(change["value"] for change in changes)
    error = math.hypot(*((change["high"] - change["low"]) / 2 / NORMAL for change in changes)) / len(changes)
    return Point(steps, card["card"]["reward"]["end"]["value"], card["divergence"]["forward"]["value"], lost, error)


# ---------------------------------------------------------------- what it says


def at_accuracy(path: Course, accuracy: float) -> Point | None:
    """Where a path first reaches an accuracy, by straight lines between its points. None: it never does, or before the first of them
    that was measured, where the line would be drawn from the start."""
    for a, b in itertools.pairwise(path):
        if a.accuracy < accuracy <= b.accuracy:
            share = (accuracy - a.accuracy) / (b.accuracy - a.accuracy)
            return Point(b.steps, accuracy, a.kl + share * (b.kl - a.kl), a.lost + share * (b.lost - a.lost)) if a.steps else None
    return None


def parabola(kl: NDArray[np.float64], lost: NDArray[np.float64]) -> tuple[float, float, float]:
    """lost = a kl + b kl^2 by least squares, through what all began from, where nothing is lost; and its R^2."""
    table = np.stack([kl, kl**2], axis=1)
    (a, b), *_ = np.linalg.lstsq(table, lost, rcond=None)
    left, whole = float(np.square(lost - table @ [a, b]).sum()), float(np.square(lost - lost.mean()).sum())
    return float(a), float(b), 1 - left / whole if whole > 0 else 0.0


def common_accuracy(paths: Mapping[str, Sequence[Course]]) -> float | None:
    """The highest that every seed of every way reaches behind its start. None: it is no more than where one of them began, by GAIN."""
    reached = min(max(point.accuracy for point in path[1:]) for found in paths.values() for path in found)
    return reached if reached >= _highest_start(paths) + GAIN else None


def _highest_start(paths: Mapping[str, Sequence[Course]]) -> float:
    return max(path[0].accuracy for found in paths.values() for path in found)


def _beginning(cards: Sequence[Mapping[str, Any]]) -> Finding:
    """What there is to forget."""
    first = cards[0]
    elsewhere = {other["env"]: statistics.fmean(_start(card, other["env"]) for card in cards) for other in first["elsewhere"]}
    here = statistics.fmean(card["card"]["reward"]["start"]["value"] for card in cards)
    known = ", ".join(f"{env} {value:.2f}" for env, value in elsewhere.items())
    asked = "reward of the taught policy, which every run begins from, elsewhere"
    return Finding(asked, f"{statistics.fmean(elsewhere.values()):.2f}", f"{known}; in the new task {here:.2f}")


def _start(card: Mapping[str, Any], env: str) -> float:
    return next(other["reward"]["start"]["value"] for other in card["elsewhere"] if other["env"] == env)


def _findings(paths: Mapping[str, Sequence[Course]], swept: Mapping[str, Sweep]) -> list[Finding]:
    findings = [finding for way in (POSITIVE, RIGHT, OWN, OTHER) for finding in _beside(paths, way, swept)]
    for way, found in paths.items():
        ends = [path[-1].lost for path in found]
        lost = compare_seeds(ends, [0.0] * len(ends), LOST_MARGIN)
        asked = f"reward elsewhere after {found[0][-1].steps} steps {way}, beside where it began"
        findings.append(Finding(asked, lost.said("worse", "better"), f"lost {lost.numbers}"))
    return [*findings, _follows(paths)]


def _beside(paths: Mapping[str, Sequence[Course]], way: str, swept: Mapping[str, Sweep]) -> Iterator[Finding]:
    """Reward and another way where both have learned as much."""
    pair = {one: paths[one] for one in (REWARDED, way)}
    level, start = common_accuracy(pair), _highest_start(pair)
    at = "where both have learned as much" if level is None else f"at an accuracy of {level:.2f}"
    edge = tell_edges({one: swept[one] for one in pair})
    for name, key, margin in (("KL from where it began", "kl", KL_MARGIN), ("reward lost elsewhere", "lost", LOST_MARGIN)):
        asked = f"{name} {at}: {REWARDED} beside {way}"
        reached = [[None if level is None else at_accuracy(path, level) for path in found] for found in pair.values()]
        pairs = [(mine, theirs) for mine, theirs in zip(*reached, strict=True) if mine and theirs]
        if len(pairs) < len(paths[way]):
            told = f"in {len(pairs)} of {len(paths[way])} seeds both rise to it between measured lengths; they begin at up to {start:.2f}"
            yield Finding(asked, "undecided", f"{told}{edge}")
            continue
        found = compare_seeds([getattr(mine, key) for mine, _ in pairs], [getattr(theirs, key) for _, theirs in pairs], margin)
        yield Finding(asked, found.said("more", "less"), f"{found.numbers}; begun at {start:.2f} or less{edge}")


def _follows(paths: Mapping[str, Sequence[Course]]) -> Finding:
    """Whether the divergence tells the loss. What the loss is measured with may leave less than EXPLAINED to be explained by anything."""
    points = [point for found in paths.values() for path in found for point in path[1:]]
    spread = statistics.pvariance([point.lost for point in points])
    most = 1 - statistics.fmean(point.error**2 for point in points) / spread if spread > 0 else 0.0
    shares = [parabola(*_columns([found[seed] for found in paths.values()]))[2] for seed in range(len(paths[REWARDED]))]
    pooled = parabola(*_columns([path for found in paths.values() for path in found]))[2]
    around = t_interval(shares)
    verdict = "yes" if around.low >= EXPLAINED else "no" if around.high < EXPLAINED and most >= EXPLAINED else "undecided"
    numbers = f"R^2 {around} by seed, {pooled:.2f} of all; errors of measurement leave {most:.3f} to be explained; {_without(paths)}"
    return Finding(f"a parabola in the KL explains {EXPLAINED} of what is lost, whatever the way", verdict, numbers)


def _without(paths: Mapping[str, Sequence[Course]]) -> str:
    """What the law rests on: R^2 of all, without the way whose absence lowers it most."""
    left = {way: parabola(*_columns([path for other, found in paths.items() if other != way for path in found]))[2] for way in paths}
    lowest = min(left, key=lambda way: left[way])
    return f"without the runs {lowest} {left[lowest]:.2f}"


def _columns(paths: Sequence[Course]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    points = [point for path in paths for point in path[1:]]
    return np.array([point.kl for point in points]), np.array([point.lost for point in points])


def _tables(paths: Mapping[str, Sequence[Course]]) -> str:
    lines = ["| way | steps | accuracy | KL(first to trained), nats an episode | reward lost elsewhere |", "|---|---|---|---|---|"]
    for way, found in paths.items():
        for points in zip(*found, strict=True):
            if points[0].steps:
                cells = [t_interval([getattr(point, key) for point in points]) for key in ("accuracy", "kl", "lost")]
                lines.append(f"| {way} | {points[0].steps} | {' | '.join(f'{m.value:.3f} [{m.low:.3f}, {m.high:.3f}]' for m in cells)} |")
    tasks = ", ".join(SCORECARD.envs)
    return "\n".join([*lines, "", f"Means over seeds with 95% intervals. Elsewhere: the mean over {tasks}; less than 0 is gained."]) + "\n"


def _rates(swept: Mapping[str, Sweep]) -> str:
    """How each way's rate was chosen."""
    lines = ["Learning rates, by the mean score of the longest runs on other seeds; * is the best, d one at which runs diverged:", ""]
    return "\n".join([*lines, *(f"- {name}: {tell_sweep(sweep)}" for name, sweep in swept.items())]) + "\n"


def _document(paths: Mapping[str, Sequence[Course]]) -> dict[str, Any]:
    return {way: [[[p.steps, p.accuracy, p.kl, p.lost, p.error] for p in path] for path in found] for way, found in paths.items()}


def _draw(paths: Mapping[str, Sequence[Course]], path: Path) -> None:
    with picture(path, 8.4, 3.2) as figure:
        left, right = figure.subplots(1, 2)
        for (way, found), colour in zip(paths.items(), ("#0066cc", "#33aacc", "#aa3377", "#228833", "#cc5500"), strict=True):
            for seed, points in enumerate(found):
                label = way if seed == 0 else None
                left.plot([p.accuracy for p in points], [p.kl for p in points], color=colour, linewidth=0.8, marker=".", label=label)
                right.plot([p.kl for p in points], [p.lost for p in points], color=colour, linewidth=0, marker=".")
        kl, lost = _columns([one for found in paths.values() for one in found])
        a, b, _ = parabola(kl, lost)
        along = np.concatenate([np.linspace(0, 1, 20), np.geomspace(1, max(2.0, float(kl.max(initial=0.0))), 60)])
        right.plot(along, a * along + b * along**2, color="#999999", linewidth=0.8)
        left.set(xlabel="accuracy on sums", ylabel="KL(first to trained), nats an episode")
        right.set(xlabel="KL(first to trained), nats an episode", ylabel="reward lost elsewhere")
        left.set_yscale("symlog", linthresh=1.0)  # ways that stay near are a hundredth of those that do not
        right.set_xscale("symlog", linthresh=1.0)
        right.set_yscale("symlog", linthresh=0.02)
        left.legend(frameon=False, fontsize=7, loc="lower right")
