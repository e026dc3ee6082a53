"""What does a task teach when it is told token by token, step by step, or only at the end? Sums, learned from feedback of three kinds.

A reward at the end is one number for all tokens, "about a bit an episode", where supervision tells something of every token
(https://thinkingmachines.ai/blog/lora/); a scalar advantage is what bounds it, and feedback on each step may tell as much again for
each (https://richardli.xyz/post/information-bandwidth-rl). Here the same policy plays the same sums as often, and is told whether
its answer is right (end), which lines of its working are those of the worked solution (steps), or which tokens are (tokens); each is
compared with the members of its group at the same place, and nothing else differs. Beside them worked solutions are shown to it, as many
as there are episodes (demonstrations). Each has a learning rate of its own. Where the gradient's noise is compared, the three kinds
judge the very same episodes of an adapter that has learned nothing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

from veneer.measure.noise_scale import NoiseScale, noise_scale
from veneer.measure.verdict import compare_seeds, t_interval
from veneer.studies.contest import Arm, Contest, Terms, hold_contest, overridden
from veneer.studies.contest_page import COLOURS, contest_result
from veneer.studies.courses import SHOWN, Course, Courses, school
from veneer.studies.credit import Feedback
from veneer.studies.drawing import picture
from veneer.studies.lab import Lab
from veneer.studies.rank import LORA_RATES
from veneer.studies.result import Finding, Result
from veneer.train.config import RunConfig
from veneer.types import ConfigError

QUESTION = "How much more does a task teach if every step or every token is judged, not the end alone?"
CLAIMS = ()
MARGIN = 0.03
RATIO_MARGIN = math.log(1.1)
"""Of a ratio of episodes, as a logarithm."""
TARGET = 0.4
"""Of the held-out problems: how many episodes until they are solved?"""
KINDS: Sequence[Feedback] = get_args(Feedback)
BATCHES, WIDE = 4, 16
"""A seed's batches on which noise is measured, and groups of each."""
SHARED: Mapping[str, Any] = {
    "env": {"name": "arithmetic", "args": {"min_terms": 4, "max_terms": 6}},
    "lora": {"rank": 4},
    "rl": {"steps": 30, "groups_per_batch": 8, "group_size": 8},
    "eval": {"problems": 128, "every": 3},
}
"""Sums that the base solves one of ten times, as in the study of the crossover."""
READ = ("base", "env.args", "env.seconds", "lora", "rl.steps", "rl.groups_per_batch", "rl.group_size", "rl.max_tokens", "eval")
"""What courses read of a run's configuration."""


def arms() -> Sequence[Arm]:
    return [Arm(name, {"name": name}, LORA_RATES) for name in (*KINDS, SHOWN)]


async def conduct(lab: Lab, terms: Terms) -> Result:
    """Raises:
    ConfigError: an override that cannot be applied, or of what courses do not read.
    Interrupted, VeneerError: as ``Lab.run``.
    """
    shared = overridden(SHARED, arms(), terms)
    for override in terms.overrides:
        key = override.partition("=")[0].strip()
        if not any(key == read or key.startswith(f"{read}.") for read in READ):
            raise ConfigError(f"--set {override}: courses of feedback do not read it; they read {', '.join(READ)}")
    contest = await hold_contest(Courses(lab), shared, arms(), MARGIN, terms)
    noise = await _measure_noise(lab, [cast(Course, outcome).config for outcome in contest.reference.outcomes])
    courses = {entrant.arm.name: [cast(Course, outcome) for outcome in entrant.outcomes] for entrant in contest.entrants}
    return feedback_result(contest, courses, noise)


async def _measure_noise(lab: Lab, configs: Sequence[RunConfig]) -> Mapping[Feedback, list[dict[str, float]]]:
    """Of every batch of every seed, for each kind of feedback on the same episodes."""

    async def measure(config: RunConfig) -> dict[str, list[dict[str, float]]]:
        async with school(lab.place(config), config) as lessons:
            batches = [await lessons.play(batch, WIDE) for batch in range(1, BATCHES + 1)]
            return {kind: [await lessons.noise(groups, kind) for groups in batches] for kind in KINDS}

    found = [await lab.measured(f"noise of feedback, {BATCHES} batches of {WIDE}", config, measure) for config in configs]
    return {kind: [batch for one in found for batch in one[kind]] for kind in KINDS}


# ---------------------------------------------------------------- what it says

Noise = Mapping[Feedback, Sequence[Mapping[str, float]]]
"""trace and signal of every batch, by kind."""


def feedback_result(contest: Contest, courses: Mapping[str, Sequence[Course]], noise: Noise) -> Result:
    size = courses[KINDS[0]][0].config.rl.group_size
    scales: dict[Feedback, NoiseScale | None] = {kind: noise_scale(noise[kind], size) for kind in KINDS}
    findings = [*_episodes(courses), *_bits(courses), *(_scale(kind, scale) for kind, scale in scales.items() if scale)]
    result = contest_result(contest, "{arm} beside {reference}, after as many episodes, each at its best learning rate", findings)
    document = {
        **result.document,
        "courses": {name: [_document(course) for course in found] for name, found in courses.items()},
        "noise": {kind: list(batches) for kind, batches in noise.items()},
    }
    return Result(result.findings, f"{_table(courses)}\n{result.tables}", document, lambda path: _draw(courses, scales, path))


def episodes_to(course: Course) -> float | None:
    """Until TARGET is reached; None: it is not."""
    steps = course.steps_to(TARGET)
    return None if steps is None else steps * course.episodes_a_step


def bits_to(course: Course) -> float | None:
    """Told until TARGET is reached."""
    steps = course.steps_to(TARGET)
    if steps is None:
        return None
    whole = math.floor(steps)
    return math.fsum(course.bits[:whole]) + (steps - whole) * (course.bits[whole] if whole < len(course.bits) else 0.0)


def _episodes(courses: Mapping[str, Sequence[Course]]) -> list[Finding]:
    """How many times as many episodes the end alone takes, seed by seed."""
    end = [episodes_to(course) for course in courses["end"]]
    found = []
    for name, mine in courses.items():
        if name == "end":
            continue
        pairs = [(a, b) for a, b in zip(end, map(episodes_to, mine), strict=True) if a and b]
        asked = f"episodes to {TARGET:.0%} by the end alone, over those by {name}"
        if len(pairs) < 2:
            found.append(Finding(asked, "undecided", f"{len(pairs)} of {len(mine)} seeds come there both ways"))
            continue
        logs = [math.log(a / b) for a, b in pairs]
        told, ratio = compare_seeds(logs, [0.0] * len(logs), RATIO_MARGIN), t_interval(logs)
        low, value, high = (math.exp(x) for x in (ratio.low, ratio.value, ratio.high))
        lost = len(mine) - len(pairs)
        missing = f"; {lost} of {len(mine)} seeds do not come there both ways" if lost else ""
        numbers = f"{value:.2f} [{low:.2f}, {high:.2f}], margin a factor of {math.exp(RATIO_MARGIN):.3g}{told.wanted}{missing}"
        found.append(Finding(asked, told.said("more", "fewer"), numbers))
    return found


def _bits(courses: Mapping[str, Sequence[Course]]) -> list[Finding]:
    """An episode of the first step, before anything is learned."""
    found = []
    for name, mine in courses.items():
        told = t_interval([course.bits[0] / course.episodes_a_step for course in mine])
        found.append(
            Finding(f"bits an episode that {name} tell{'s' if name == 'end' else ''} at first, at most", f"{told.value:.2f}", str(told))
        )
    return found


def _scale(kind: Feedback, scale: NoiseScale) -> Finding:
    asked = f"episodes of which a gradient by {kind} has as much signal as noise, before anything is learned"
    if scale.episodes is None:
        return Finding(asked, "undecided", f"no signal stands out of the noise in {scale.steps} batches")
    around = "no interval" if scale.low is None or scale.high is None else f"[{scale.low:,.0f}, {scale.high:,.0f}]"
    return Finding(asked, f"{scale.episodes:,.0f}", f"{scale.episodes:,.0f} {around} from {scale.steps} batches of {WIDE} groups")


def _table(courses: Mapping[str, Sequence[Course]]) -> str:
    lines = [
        f"| feedback | after all episodes | episodes to {TARGET:.0%} | bits told until then, at most | bits in all |",
        "|---|---|---|---|---|",
    ]
    for name, mine in courses.items():
        end = t_interval([course.score for course in mine])
        cells = [_median(list(map(episodes_to, mine))), _median(list(map(bits_to, mine))), _median([math.fsum(c.bits) for c in mine])]
        lines.append(f"| {name} | {end.value:.3f} [{end.low:.3f}, {end.high:.3f}] | {' | '.join(cells)} |")
    lines += [
        "",
        "Medians over seeds, with the least and the most. Bits of feedback are the sum of what each place tells by itself, an upper",
    ]
    lines += [
        "bound; those of demonstrations are what the policy did not foresee of them. In the contest the score is the share of held-out"
    ]
    return "\n".join([*lines, "problems that are solved in the end.", ""])


def _median(found: Sequence[float | None]) -> str:
    there = [value for value in found if value is not None]
    if not there:
        return "never"
    lost = f", never in {len(found) - len(there)}" if len(there) < len(found) else ""
    return f"{statistics.median(there):,.0f} ({min(there):,.0f} to {max(there):,.0f}{lost})"


def _document(course: Course) -> dict[str, Any]:
    kept = {"seed": course.config.seed, "learning_rate": course.config.rl.learning_rate, "diverged": course.diverged}
    return {**kept, "accuracy": [list(pair) for pair in course.accuracy], "bits": list(course.bits)}


def _draw(courses: Mapping[str, Sequence[Course]], scales: Mapping[Feedback, NoiseScale | None], path: Path) -> None:
    with picture(path, 9.6, 3.2) as figure:
        left, middle, right = figure.subplots(1, 3)
        for (name, mine), colour in zip(courses.items(), COLOURS, strict=False):
            for place, course in enumerate(mine):
                label = name if place == 0 else None
                told = [math.fsum(course.bits[:step]) for step, _ in course.accuracy]
                values = [value for _, value in course.accuracy]
                left.plot([s * course.episodes_a_step for s, _ in course.accuracy], values, color=colour, linewidth=0.8, label=label)
                middle.plot(told[1:], values[1:], color=colour, linewidth=0.8)
        for axes in (left, middle):
            axes.axhline(TARGET, color="#999999", linewidth=0.6)
        left.set(xlabel="episodes", ylabel="held-out problems solved")
        middle.set(xscale="log", xlabel="bits told, at most", ylabel="held-out problems solved")
        left.legend(frameon=False, fontsize=7)
        known = [(kind, scale) for kind, scale in scales.items() if scale and scale.episodes]
        for place, (_, scale) in enumerate(known):
            value = scale.episodes or 0.0
            bars = [[value - scale.low], [scale.high - value]] if scale.low is not None and scale.high is not None else None
            right.errorbar([place], [value], yerr=bars, color=COLOURS[place], marker="o", markersize=4, capsize=3)
        right.set_xticks(range(len(known)), [kind for kind, _ in known])
        right.set(yscale="log", ylabel="episodes: signal equals noise")
