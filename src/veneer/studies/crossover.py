"""Does reinforcement learning teach new things, or make what was there surer? pass@k of the base and of what was trained, up to k = 256.

Yue et al. find that a policy trained by reward solves more problems in one try and fewer in hundreds than the base that it comes from
(https://arxiv.org/abs/2504.13837): the curves cross. Whether they do elsewhere is contested (ProRL, https://arxiv.org/abs/2505.24864).
Each seed trains an adapter of rank 4; base and adapter then try the same held-out problems 512 times each.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.measure.intervals import Mean
from veneer.measure.verdict import compare_seeds, t_interval
from veneer.studies.contest import Terms
from veneer.studies.drawing import picture
from veneer.studies.lab import Lab
from veneer.studies.result import Finding, Result
from veneer.studies.sharpening import scorecards, trained
from veneer.train.config import ScorecardSettings

QUESTION = "Does the base solve more problems than the policy that was trained from it, if both may try often enough?"
CLAIMS = (18,)
SCORECARD = ScorecardSettings(problems=64, tries=512, envs=("sort", "count"), elsewhere=256)
MARGIN = 0.02
"""Of a share of problems."""
FORGOTTEN = 0.02
"""Of a reward in another environment."""


async def conduct(lab: Lab, terms: Terms) -> Result:
    """Raises:
    ConfigError: an override that cannot be applied.
    Interrupted, VeneerError: as ``Lab.run``.
    """
    cards = await scorecards(lab, await trained(lab, terms), SCORECARD)
    ks = [int(k) for k in cards[0]["card"]["pass_at_k"]]
    curves = {side: [[_value(card, k, side) for card in cards] for k in ks] for side in ("start", "end")}
    findings = [_compared(f"pass@{k}: trained beside base", curves["end"][i], curves["start"][i], MARGIN) for i, k in enumerate(ks)]
    findings.append(_crossing([card["card"]["crossover"] for card in cards], ks[-1]))
    findings += [_compared(f"{what}: trained beside base", *pair, margin) for what, pair, margin in _others(cards)]
    document = {"scorecards": cards, "ks": ks}
    return Result(findings, _tables(cards, ks, curves), document, lambda path: _draw(ks, curves, path))


def _value(card: Mapping[str, Any], k: int, side: str) -> float:
    return card["card"]["pass_at_k"][str(k)][side]["value"]


def _compared(question: str, arm: Sequence[float], reference: Sequence[float], margin: float) -> Finding:
    comparison = compare_seeds(arm, reference, margin)
    return Finding(question, comparison.verdict, str(comparison))


def _crossing(crossovers: Sequence[int | None], most: int) -> Finding:
    """In how many seeds the curves cross, and where."""
    found = [k for k in crossovers if k is not None]
    numbers = ", ".join("none" if k is None else str(k) for k in crossovers)
    where = f"k = {statistics.median_high(found)}" if len(found) > len(crossovers) / 2 else f"none up to {most}"
    return Finding(
        "from which k on the base solves as many problems, or more", where, f"in {len(found)} of {len(crossovers)} seeds: {numbers}"
    )


def _others(cards: Sequence[Mapping[str, Any]]) -> list[tuple[str, tuple[list[float], list[float]], float]]:
    """(what, (trained, base), margin) of what else changed: how diverse answers and solutions are, and other tasks."""

    def pair(changes: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
        return [change["end"]["value"] for change in changes], [change["start"]["value"] for change in changes]

    found = [("bits of the answers to a problem", pair([card["card"]["answer_entropy"] for card in cards]), 0.1)]
    if all(card["card"]["distinct_solutions"] for card in cards):
        found.append(("different ones among 8 solutions", pair([card["card"]["distinct_solutions"] for card in cards]), 0.5))
    for place, other in enumerate(cards[0]["elsewhere"]):
        found.append((f"reward in {other['env']}", pair([card["elsewhere"][place]["reward"] for card in cards]), FORGOTTEN))
    return found


def _tables(cards: Sequence[Mapping[str, Any]], ks: Sequence[int], curves: Mapping[str, Sequence[Sequence[float]]]) -> str:
    lines = ["| k | base | trained | difference |", "|---|---|---|---|"]
    for i, k in enumerate(ks):
        start, end = curves["start"][i], curves["end"][i]
        difference = t_interval([b - a for a, b in zip(start, end, strict=True)])
        lines.append(f"| {k} | {_shown(t_interval(start))} | {_shown(t_interval(end))} | {difference} |")
    lines += ["", "Means over seeds with 95% intervals. Seed by seed:", ""]
    for seed, card in enumerate(cards):
        inner, kl = card["card"], card["divergence"]
        changes = f"{len(inner['gained'])} problems gained that no try of the base solved, {len(inner['lost'])} lost"
        moved = f"KL(base || trained) {kl['forward']['value']:.3f}, KL(trained || base) {kl['reverse']['value']:.3f} nats an episode"
        lines.append(f"- {seed}: {changes}; {moved}" + "".join(f"; {warning}" for warning in inner["warnings"]))
    return "\n".join(lines) + "\n"


def _shown(mean: Mean) -> str:
    return f"{mean.value:.3f} [{mean.low:.3f}, {mean.high:.3f}]"


def _draw(ks: Sequence[int], curves: Mapping[str, Sequence[Sequence[float]]], path: Path) -> None:
    with picture(path, 8.4, 3.2) as figure:
        left, right = figure.subplots(1, 2)
        for side, colour, label in (("start", "#555555", "base"), ("end", "#0066cc", "trained")):
            around = [t_interval(values) for values in curves[side]]
            left.fill_between(ks, [m.low for m in around], [m.high for m in around], color=colour, alpha=0.2, linewidth=0)
            left.plot(ks, [m.value for m in around], color=colour, marker="o", markersize=3, label=label)
        pairs = zip(curves["start"], curves["end"], strict=True)
        gaps = [t_interval([b - a for a, b in zip(start, end, strict=True)]) for start, end in pairs]
        bars = [[m.value - m.low for m in gaps], [m.high - m.value for m in gaps]]
        right.axhline(0, color="#999999", linewidth=0.8)
        right.errorbar(ks, [m.value for m in gaps], yerr=bars, color="#aa3377", marker="o", markersize=3, capsize=3)
        for axes, name in ((left, "share of problems solved"), (right, "trained less base")):
            axes.set_xscale("log", base=2)
            axes.set(xlabel="tries k", ylabel=name)
        left.legend(frameon=False)
