"""What does a policy forget that learns something new? One that has been taught learns longer sums by reward, by imitating its own right
answers, and by demonstrations in two manners.

RL's Razor finds that forgetting follows the KL divergence from the first policy to the trained one on the new task, by a parabola, whatever
the method; and that reinforcement learning forgets less than supervised training because it reaches the same accuracy nearer to where it
began (https://arxiv.org/abs/2509.04259). Who knows little forgets little: the bundled base half knows the other tasks, and learning sums
makes it better at them (the study of the crossover). So it is taught first, by reward, to sort digits, which has it do all of them well;
and what it began from is that, in every run. Its own right answers are sampled once, before anything is learned. Demonstrations are right
to the last step, either in the manner that it has itself, from the first number on, or from the last one on, which it has never seen.
Each way is stopped at several lengths; accuracies are made equal by interpolation between those.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from veneer.measure.verdict import compare_seeds, t_interval
from veneer.studies.contest import Terms, overridden, terms_for
from veneer.studies.drawing import picture
from veneer.studies.lab import ADAPTER, Lab
from veneer.studies.result import Finding, Result
from veneer.studies.sharpening import scorecards
from veneer.studies.worked import write_worked
from veneer.train.config import RunConfig, ScorecardSettings, make_config

QUESTION = "Does reinforcement learning forget less than supervised training at the same accuracy, and does the divergence tell it?"
CLAIMS = (20,)
REWARDED, RIGHT = "by reward", "by its own right answers"
OWN, OTHER = "by demonstrations in its manner", "by demonstrations in another"
LENGTHS: Mapping[str, Sequence[int]] = {
    REWARDED: (5, 10, 20, 40, 80),
    RIGHT: (5, 10, 20, 40, 80),
    OWN: (5, 10, 20, 40, 80),
    OTHER: (40, 80, 120, 160, 240),
}
"""Steps."""
ROWS = 400
SCORECARD = ScorecardSettings(problems=64, tries=8, envs=("sort", "count", "reverse"), elsewhere=256)
NUMBERS = (4, 6)
"""Of a sum."""
RATE = 1.5e-3
TEACHING: Mapping[str, Any] = {
    "seed": 1000,
    "env": {"name": "sort"},
    "lora": {"rank": 4},
    "rl": {"steps": 30, "groups_per_batch": 8, "group_size": 8, "learning_rate": RATE},
    "eval": {"problems": 256, "every": 10**6},
}
"""On a seed that is not compared."""
SHARED: Mapping[str, Any] = {
    "env": {"name": "arithmetic", "args": {"min_terms": NUMBERS[0], "max_terms": NUMBERS[1]}},
    "lora": {"rank": 4},
    "eval": {"problems": 64, "every": 10**6},
}
WAYS: Mapping[str, Mapping[str, Any]] = {
    REWARDED: {"kind": "rl", "rl": {"groups_per_batch": 8, "group_size": 8, "learning_rate": RATE}},
    RIGHT: {"kind": "rejection", "rejection": {"problems": 128, "group_size": 8, "keep": 8, "batch_size": 16, "learning_rate": RATE}},
    OWN: {"kind": "sft", "sft": {"batch_size": 16, "learning_rate": RATE, "held_out": 0.1}},
    OTHER: {"kind": "sft", "sft": {"batch_size": 16, "learning_rate": RATE, "held_out": 0.1}},
}
KINDS: Sequence[str] = tuple(dict.fromkeys(way["kind"] for way in WAYS.values()))
TAUGHT = ("base", "lora")
"""What whoever asks may set of the run that teaches: what all runs share."""
KL_MARGIN, LOST_MARGIN = 0.1, 0.02
"""Of nats an episode; of a reward."""


@dataclass(frozen=True)
class Point:
    """A run, as its scorecard has it."""

    steps: int
    accuracy: float
    kl: float
    """KL(first || trained) in nats an episode of the new task."""
    lost: float
    """Of the reward elsewhere, the mean over the other tasks."""


Course = Sequence[Point]
"""Of one seed and way, by rising length; what all began from first."""


async def conduct(lab: Lab, terms: Terms) -> Result:
    """Raises:
    ConfigError: an override that cannot be applied.
    RunError: no answer of the taught policy to a training problem is right.
    Interrupted, VeneerError: as ``Lab.run``.
    """
    configs = configs_of(lab.folder.parent / "data", "", terms)  # what is wrong is said before anything runs
    (taught,) = await lab.run([_teaching(terms)])
    configs = configs_of(lab.folder.parent / "data", str(taught.folder / ADAPTER), terms)
    outcomes = await lab.run(configs)
    cards = iter(await scorecards(lab, outcomes, SCORECARD))
    paths: dict[str, list[Course]] = {}
    for way, lengths in LENGTHS.items():
        paths[way] = [_path([(steps, next(cards)) for steps in lengths]) for _ in range(terms.seeds)]
    return Result(_findings(paths), _tables(paths), {"ways": _document(paths)}, lambda path: _draw(paths, path))


def _teaching(terms: Terms) -> RunConfig:
    own = tuple(override for override in terms.overrides if override.partition("=")[0].strip().partition(".")[0] in TAUGHT)
    return make_config(overridden(TEACHING, (), replace(terms, overrides=own)))


def configs_of(folder: Path, taught: str, terms: Terms) -> list[RunConfig]:
    """Of all runs: way by way, seed by seed, each at every length. ``folder``: where demonstrations are kept. ``taught``: the adapter that
    they begin from.

    Raises:
        ConfigError: an override that cannot be applied.
    """
    data = {OWN: str(write_worked(folder, ROWS, False, NUMBERS)), OTHER: str(write_worked(folder, ROWS, True, NUMBERS))}
    configs = list[RunConfig]()
    for way, settings in WAYS.items():
        kind = settings["kind"]
        part = {**settings[kind], **({"data": data[way]} if way in data else {})}
        tree = overridden({**SHARED, "kind": kind, kind: part}, (), terms_for(terms, kind, KINDS))
        for seed in range(terms.seeds):
            configs += [make_config({**tree, "init": taught, "seed": seed, kind: {**tree[kind], "steps": n}}) for n in LENGTHS[way]]
    return configs


def _path(cards: Sequence[tuple[int, Mapping[str, Any]]]) -> Course:
    start = cards[0][1]["card"]["reward"]["start"]["value"]
    return [Point(0, start, 0.0, 0.0), *(_point(steps, card) for steps, card in cards)]


def _point(steps: int, card: Mapping[str, Any]) -> Point:
    lost = -statistics.fmean(other["reward"]["difference"]["value"] for other in card["elsewhere"])
    return Point(steps, card["card"]["reward"]["end"]["value"], card["divergence"]["forward"]["value"], lost)


# ---------------------------------------------------------------- what it says


def at_accuracy(path: Course, accuracy: float) -> Point | None:
    """Where a path first reaches an accuracy, by straight lines between its points; None: it never does."""
    for a, b in itertools.pairwise(path):
        if a.accuracy < accuracy <= b.accuracy:
            share = (accuracy - a.accuracy) / (b.accuracy - a.accuracy)
            return Point(b.steps, accuracy, a.kl + share * (b.kl - a.kl), a.lost + share * (b.lost - a.lost))
    return None


def parabola(kl: NDArray[np.float64], lost: NDArray[np.float64]) -> tuple[float, float, float]:
    """lost = a kl + b kl^2 by least squares, through what all began from, where nothing is lost; and its R^2."""
    table = np.stack([kl, kl**2], axis=1)
    (a, b), *_ = np.linalg.lstsq(table, lost, rcond=None)
    left, whole = float(np.square(lost - table @ [a, b]).sum()), float(np.square(lost - lost.mean()).sum())
    return float(a), float(b), 1 - left / whole if whole > 0 else 0.0


def common_accuracy(paths: Mapping[str, Sequence[Course]]) -> float:
    """The highest that every seed of every way reaches."""
    return min(max(point.accuracy for point in path) for found in paths.values() for path in found)


def _findings(paths: Mapping[str, Sequence[Course]]) -> list[Finding]:
    findings = []
    for way in (RIGHT, OWN, OTHER):
        pair = {one: paths[one] for one in (REWARDED, way)}
        level = common_accuracy(pair)
        reached = {one: [at_accuracy(path, level) for path in found] for one, found in pair.items()}
        for name, key, margin in (("KL from where it began", "kl", KL_MARGIN), ("reward lost elsewhere", "lost", LOST_MARGIN)):
            asked = f"{name} at an accuracy of {level:.2f}: {REWARDED} beside {way}"
            pairs = [(mine, theirs) for mine, theirs in zip(reached[REWARDED], reached[way], strict=True) if mine and theirs]
            if len(pairs) < 2:
                findings.append(Finding(asked, "undecided", f"{len(pairs)} seeds rise to it on both sides"))
                continue
            found = compare_seeds([getattr(mine, key) for mine, _ in pairs], [getattr(theirs, key) for _, theirs in pairs], margin)
            findings.append(Finding(asked, found.said("more", "less"), found.numbers))
    for way, found in paths.items():
        ends = [path[-1].lost for path in found]
        lost = compare_seeds(ends, [0.0] * len(ends), LOST_MARGIN)
        asked = f"reward elsewhere after {found[0][-1].steps} steps {way}, beside where it began"
        findings.append(Finding(asked, lost.said("worse", "better"), f"lost {lost.numbers}"))
    shares = [parabola(*_columns([found[seed] for found in paths.values()]))[2] for seed in range(len(paths[REWARDED]))]
    pooled = parabola(*_columns([path for found in paths.values() for path in found]))[2]
    around = t_interval(shares)
    verdict = "yes" if around.low >= 0.9 else "no" if around.high < 0.9 else "undecided"
    return [
        *findings,
        Finding(
            "a parabola in the KL explains 0.9 of what is lost, whatever the way", verdict, f"R^2 {around} by seed, {pooled:.2f} of all"
        ),
    ]


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


def _document(paths: Mapping[str, Sequence[Course]]) -> dict[str, Any]:
    return {way: [[[p.steps, p.accuracy, p.kl, p.lost] for p in path] for path in found] for way, found in paths.items()}


def _draw(paths: Mapping[str, Sequence[Course]], path: Path) -> None:
    with picture(path, 8.4, 3.2) as figure:
        left, right = figure.subplots(1, 2)
        for (way, found), colour in zip(paths.items(), ("#0066cc", "#aa3377", "#228833", "#cc5500"), strict=True):
            for seed, points in enumerate(found):
                label = way if seed == 0 else None
                left.plot([p.accuracy for p in points], [p.kl for p in points], color=colour, linewidth=0.8, marker=".", label=label)
                right.plot([p.kl for p in points], [p.lost for p in points], color=colour, linewidth=0, marker=".")
        kl, lost = _columns([one for found in paths.values() for one in found])
        a, b, _ = parabola(kl, lost)
        along = np.linspace(0, float(kl.max(initial=0.0)), 60)
        right.plot(along, a * along + b * along**2, color="#999999", linewidth=0.8)
        left.set(xlabel="accuracy on sums", ylabel="KL(first to trained), nats an episode")
        right.set(xlabel="KL(first to trained), nats an episode", ylabel="reward lost elsewhere")
        left.legend(frameon=False, fontsize=7)
