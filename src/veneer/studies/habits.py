"""Does reinforcement learning teach a behaviour, or make one reliable that was there? Working step by step, and taking back a slip.

Self-correction is often said to emerge from reinforcement learning; others find it in base models before any
(https://arxiv.org/abs/2503.20783), and that it is amplified where the base has it and hardly arises where it has not
(https://arxiv.org/abs/2503.01307). Base and trained policy, of the runs of the study of the crossover, do the same held-out problems as
often. What they do is read from what they write: an equation is work, and one that is stated again with another result was taken back.

A policy that works step by step more often gains what working adds to answering at once, times how much more often it does; the rest of
the gain is doing either better (Kitagawa 1955, https://doi.org/10.1080/01621459.1955.10501299, with the means of both sides as weights).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from veneer.measure.habits import CLAIM, find_habits
from veneer.measure.verdict import compare_seeds, t_interval
from veneer.studies.contest import Terms
from veneer.studies.drawing import picture
from veneer.studies.lab import Lab, Outcome
from veneer.studies.result import Finding, Result
from veneer.studies.sharpening import both, trained
from veneer.train.config import RunConfig
from veneer.train.metrics import check_failures
from veneer.train.rollouts import Policy, derive_seed, do_rollouts
from veneer.types import EnvDataset, TrajectoryGroup

QUESTION = "Does reinforcement learning teach a behaviour, or make one reliable that was there before?"
CLAIMS = ()
PROBLEMS, TRIES = 256, 4
MARGIN = 0.02
"""Of a share of episodes."""


@dataclass(frozen=True)
class Seen:
    """What a policy did in some episodes: counts."""

    episodes: int
    worked: int
    """Wrote an equation down."""
    worked_right: int
    """And answered right."""
    direct_right: int
    """Answered right without."""
    took_back: int
    """Stated an equation again with another result."""
    took_back_right: int
    """And answered right."""
    mended: int
    """Equations that were taken back and became right; the others stayed wrong or became so."""
    spoilt: int
    still_wrong: int

    @property
    def works(self) -> float:
        """Share of the episodes."""
        return self.worked / self.episodes

    @property
    def right(self) -> float:
        return (self.worked_right + self.direct_right) / self.episodes

    @property
    def right_if_worked(self) -> float:
        return self.worked_right / self.worked if self.worked else 0.0

    @property
    def right_if_direct(self) -> float:
        direct = self.episodes - self.worked
        return self.direct_right / direct if direct else 0.0

    @property
    def takes_back(self) -> float:
        """Share of the episodes."""
        return self.took_back / self.episodes

    @property
    def mends(self) -> float | None:
        """Share of what was taken back; None: nothing was."""
        changes = self.mended + self.spoilt + self.still_wrong
        return self.mended / changes if changes else None


def see(groups: Sequence[TrajectoryGroup]) -> Seen:
    found = list[tuple[bool, bool, int, int, int]]()
    for member in (t for group in groups for t in group.trajectories_G):
        text = "\n".join(f"{turn.action.get('reasoning_content', '')}\n{turn.action['content']}" for turn in member.transitions)
        habits = find_habits([text])
        changes = (habits.incorrect_to_correct, habits.correct_to_incorrect, habits.still_incorrect)
        found.append((CLAIM.search(text) is not None, member.reward >= 1, *changes))
    return Seen(
        episodes=len(found),
        worked=sum(worked for worked, *_ in found),
        worked_right=sum(worked and right for worked, right, *_ in found),
        direct_right=sum(right and not worked for worked, right, *_ in found),
        took_back=sum(any(changes) for _, _, *changes in found),
        took_back_right=sum(right and any(changes) for _, right, *changes in found),
        mended=sum(changes[0] for _, _, *changes in found),
        spoilt=sum(changes[1] for _, _, *changes in found),
        still_wrong=sum(changes[2] for _, _, *changes in found),
    )


def more_often(base: Seen, after: Seen) -> float:
    """What of the gain in right answers comes of working step by step more often."""
    worth = (base.right_if_worked + after.right_if_worked - base.right_if_direct - after.right_if_direct) / 2
    return (after.works - base.works) * worth


async def conduct(lab: Lab, terms: Terms) -> Result:
    """Raises:
    ConfigError: an override that cannot be applied.
    Interrupted, VeneerError: as ``Lab.run``.
    """

    async def play(policy: Policy, dataset: EnvDataset, config: RunConfig) -> dict[str, int]:
        groups = await do_rollouts(policy, dataset, "eval", range(PROBLEMS), TRIES, derive_seed("habits", config.seed))
        check_failures(groups, config.env.max_failed_share)
        return asdict(see(groups))

    async def measure(outcome: Outcome, config: RunConfig) -> dict[str, Any]:
        async with both(lab, outcome, config) as (start, end, dataset):
            return {"base": await play(start, dataset, config), "trained": await play(end, dataset, config)}

    what = f"habits, {PROBLEMS} problems {TRIES} times"
    found = [await lab.measured(what, outcome.config, partial(measure, outcome)) for outcome in await trained(lab, terms)]
    return habits_result([(Seen(**one["base"]), Seen(**one["trained"])) for one in found])


# ---------------------------------------------------------------- what it says

Pairs = Sequence[tuple[Seen, Seen]]
"""Base and trained, a pair each seed."""


def habits_result(pairs: Pairs) -> Result:
    findings = [
        _compared("share of episodes that work step by step: trained beside base", pairs, "works"),
        _compared("share that is right among those that work: trained beside base", pairs, "right_if_worked"),
        _part("of the gain in right answers, that comes of working step by step more often", pairs),
        _compared("share of episodes that take an equation back: trained beside base", pairs, "takes_back"),
        _mending(pairs),
    ]
    document = {"seeds": [{"base": asdict(base), "trained": asdict(after)} for base, after in pairs]}
    return Result(findings, _tables(pairs), document, lambda path: _draw(pairs, path))


def _compared(question: str, pairs: Pairs, what: str) -> Finding:
    before, after = ([getattr(pair[side], what) for pair in pairs] for side in (0, 1))
    found = compare_seeds(after, before, MARGIN)
    numbers = f"{t_interval(before).value:.3f} before, {t_interval(after).value:.3f} after: {found.numbers}"
    return Finding(question, found.said("more", "less"), numbers)


def _part(question: str, pairs: Pairs) -> Finding:
    gains = [(more_often(base, after), after.right - base.right) for base, after in pairs]
    if any(gain <= 0 for _, gain in gains):
        return Finding(question, "undecided", "a seed gained nothing")
    share = t_interval([part / gain for part, gain in gains])
    part, gain = (t_interval([pair[i] for pair in gains]) for i in (0, 1))
    return Finding(
        question, f"{share.value:.0%}", f"{share.value:.0%} [{share.low:.0%}, {share.high:.0%}]: {part.value:+.3f} of {gain.value:+.3f}"
    )


def _mending(pairs: Pairs) -> Finding:
    asked = "share of equations taken back that became right: trained beside base"
    known = [(a.mends, b.mends) for a, b in pairs if a.mends is not None and b.mends is not None]
    counts = [sum(getattr(seen, name) for pair in pairs for seen in pair) for name in ("mended", "spoilt", "still_wrong")]
    told = "{} became right, {} wrong, {} stayed wrong, in all".format(*counts)
    if len(known) < 2:
        return Finding(asked, "undecided", f"in {len(known)} of {len(pairs)} seeds both sides took one back; {told}")
    found = compare_seeds([after for _, after in known], [before for before, _ in known], MARGIN)
    return Finding(asked, found.said("more", "less"), f"{found.numbers}; {told}")


ROWS: Mapping[str, str] = {
    "right": "right",
    "works": "works step by step",
    "right_if_worked": "right, if it works",
    "right_if_direct": "right, if it answers at once",
    "takes_back": "takes an equation back",
}


def _tables(pairs: Pairs) -> str:
    lines = ["| share of episodes | base | trained |", "|---|---|---|"]
    for name, label in ROWS.items():
        around = [t_interval([getattr(pair[side], name) for pair in pairs]) for side in (0, 1)]
        lines.append(f"| {label} | " + " | ".join(f"{m.value:.3f} [{m.low:.3f}, {m.high:.3f}]" for m in around) + " |")
    episodes = pairs[0][0].episodes
    return "\n".join([*lines, "", f"Means over seeds with 95% intervals; {episodes} episodes of each policy a seed."]) + "\n"


def _draw(pairs: Pairs, path: Path) -> None:
    with picture(path, 7.0, 3.0) as figure:
        axes = figure.subplots()
        for side, colour, label in ((0, "#555555", "base"), (1, "#0066cc", "trained")):
            around = [t_interval([getattr(pair[side], name) for pair in pairs]) for name in ROWS]
            places = [i + (side - 0.5) * 0.2 for i in range(len(ROWS))]
            bars = [[m.value - m.low for m in around], [m.high - m.value for m in around]]
            axes.errorbar([m.value for m in around], places, xerr=bars, color=colour, fmt="o", markersize=4, capsize=3, label=label)
        axes.set_yticks(range(len(ROWS)), list(ROWS.values()))
        axes.invert_yaxis()
        axes.set(xlabel="share of episodes", xlim=(-0.02, 1.02))  # whole marks at the ends
        axes.legend(frameon=False)
