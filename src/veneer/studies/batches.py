"""Batches of several sizes, in each of which adapters are compared with full fine-tuning: what ``batch.py`` and ``batch_rl.py`` share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.measure.verdict import compare_seeds, t_interval
from veneer.studies.contest import Arm, Contest, Terms, hold_contest
from veneer.studies.contest_page import contest_result
from veneer.studies.drawing import across_learning_rates, picture
from veneer.studies.lab import Lab
from veneer.studies.result import Finding, Result, joined


@dataclass(frozen=True)
class Sizes:
    """Of batches, and how they are trained on."""

    batches: Sequence[int]
    of: str
    """What a batch is of."""
    work: Callable[[int], Mapping[str, Any]]
    """Settings with which a batch of a size is trained on, as much in all as any other."""
    ranks: Sequence[int]
    lora_rates: Sequence[float]
    full_rates: Sequence[float]
    margin: float
    """Of a score."""
    losses: bool
    """A score is minus a held-out loss, and otherwise a reward on held-out problems."""

    @property
    def scored(self) -> str:
        return "minus the held-out loss in nats a token" if self.losses else "the reward on held-out problems"

    def named(self, batch: int) -> str:
        return f"batches of {batch} {self.of}"

    def asked(self, terms: Terms) -> Sequence[int]:
        """The batches that are compared: on a coarse grid the outermost, between which a gap would grow."""
        return (min(self.batches), max(self.batches)) if terms.coarse else self.batches

    def arms(self, batch: int) -> Sequence[Arm]:
        work = self.work(batch)
        thin = [Arm(f"rank {rank}", {"lora": {"rank": rank}, **work}, self.lora_rates) for rank in self.ranks]
        return [Arm("full", {"weights": "full", **work}, self.full_rates), *thin]


async def hold_contests(lab: Lab, sizes: Sizes, shared: Mapping[str, Any], terms: Terms) -> Result:
    """Raises:
    ConfigError, Interrupted, VeneerError: as ``hold_contest``.
    """
    contests = {batch: await hold_contest(lab, shared, sizes.arms(batch), sizes.margin, terms) for batch in sizes.asked(terms)}
    question = "{arm} beside {reference}, each at its best learning rate"
    results = {sizes.named(batch): contest_result(contest, question) for batch, contest in contests.items()}
    result = joined(results, _gaps(sizes, contests), lambda path: _draw(sizes, contests, path))
    return Result([*trends(sizes, contests), *result.findings], result.tables, result.document, result.draw)


def gaps(contest: Contest) -> dict[str, list[float]]:
    """By arm and seed: its score less that of full fine-tuning."""
    full = contest.reference.scores
    return {e.arm.name: [score - other for score, other in zip(e.scores, full, strict=True)] for e in contest.entrants[1:]}


def trends(sizes: Sizes, contests: Mapping[int, Contest]) -> list[Finding]:
    """Whether what an adapter lacks is more at the largest batch than at the smallest."""
    small, large = min(contests), max(contests)
    first, last = gaps(contests[small]), gaps(contests[large])
    found = []
    for arm in first:
        choices = [e.comparison.choice for n in (small, large) for e in contests[n].entrants if e.arm.name == arm and e.comparison]
        comparison = compare_seeds(last[arm], first[arm], sizes.margin, math.hypot(*choices))
        asked = f"{arm}: what it lacks beside full fine-tuning, in {sizes.named(large)} beside {small}"
        found.append(Finding(asked, comparison.said("shrinks", "grows"), comparison.numbers))
    return found


def _gaps(sizes: Sizes, contests: Mapping[int, Contest]) -> str:
    """Markdown: how far each arm is from full fine-tuning, by batch."""
    first = next(iter(contests.values()))
    lines = ["| | " + " | ".join(e.arm.name for e in first.entrants[1:]) + " |", "|---" * len(first.entrants) + "|"]
    for batch, contest in contests.items():
        lines.append(f"| {sizes.named(batch)} | " + " | ".join(str(t_interval(values)) for values in gaps(contest).values()) + " |")
    return "\n".join([*lines, "", f"Scores less those of full fine-tuning. A score is {sizes.scored}."]) + "\n"


def _draw(sizes: Sizes, contests: Mapping[int, Contest], path: Path) -> None:
    """What each learning rate reaches, batch by batch, and on the right what adapters lack."""
    colours = ("#555555", "#0066cc", "#cc5500")
    with picture(path, 2.8 * (len(contests) + 1), 3.0) as figure:
        *parts, last = figure.subplots(1, len(contests) + 1)
        for axes, (batch, contest) in zip(parts, contests.items(), strict=True):
            for entrant, colour in zip(contest.entrants, colours, strict=False):
                heights = [-mean if sizes.losses else mean for mean in entrant.sweep.means.values()]
                axes.plot(list(entrant.sweep.means), heights, color=colour, marker="o", markersize=3, label=entrant.arm.name)
            across_learning_rates(axes)
            axes.set_title(sizes.named(batch))
            axes.set_yscale("log" if sizes.losses else "linear")
        parts[0].set_ylabel("held-out loss" if sizes.losses else "held-out score")
        parts[0].legend(frameon=False, fontsize=7)
        last.axhline(0, color=colours[0], linewidth=0.8)
        for arm, colour in zip(gaps(contests[min(contests)]), colours[1:], strict=False):
            means = [t_interval(gaps(contest)[arm]) for contest in contests.values()]
            bars = [[m.value - m.low for m in means], [m.high - m.value for m in means]]
            last.errorbar(list(contests), [m.value for m in means], yerr=bars, color=colour, marker="o", markersize=3, capsize=3)
        last.set_xscale("log", base=2)
        last.set(xlabel="batch", ylabel="score less that of full")
