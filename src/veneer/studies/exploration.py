"""What is exploring worth? Imitating the right answers of the base, once or in rounds, and learning from reward at every step.

Free to pursue an outcome, a policy may come upon what nobody has shown it, and sample it more often from then on. One that imitates what
the base got right once learns from rewards too, but finds nothing more. In rounds, each sampled from what the round before has trained,
it explores, and nothing else is different (expert iteration, https://arxiv.org/abs/1705.08439; RAFT, https://arxiv.org/abs/2304.06767).
Reinforcement learning samples anew at every step, and learns from wrong answers beside right ones: what it is ahead by is not exploring
alone. All three play as many episodes, of the same problems.

What there is to find is how often right answers are sampled. Whether any are found that the base would never give is another question,
which the study of the crossover asks.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from veneer.measure.verdict import compare_seeds, t_interval
from veneer.studies.contest import Arm, Contest, Entrant, Terms, compare_arms, hold_contest
from veneer.studies.contest_page import COLOURS, contest_result, draw_contest
from veneer.studies.drawing import picture
from veneer.studies.lab import Lab, Outcome
from veneer.studies.result import Finding, Result, interval_of

QUESTION = "Is it worth something to explore, or would imitating the right answers of the base do?"
CLAIMS = ()
MARGIN = 0.03
ONCE, ROUNDS, REWARDED = "imitating the base", "imitating in rounds", "reward"
STEPS, GROUPS, GROUP = 40, 8, 8
"""Of reward: steps of so many groups of so many episodes. The others play as many."""
BATCH, IMITATIONS, FOUR = 16, 80, 4
"""Rows a step and steps of imitation, in one round or in four."""
IMITATION_RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
REWARD_RATES = (3.75e-4, 7.5e-4, 1.5e-3, 3e-3, 6e-3)
FOUND_MARGIN = 0.1
"""Of a ratio, as a share."""
SHARED: Mapping[str, Any] = {"env": {"name": "arithmetic"}, "lora": {"rank": 4}, "eval": {"problems": 512, "every": 10**6}}


def arms() -> Sequence[Arm]:
    once = {"epochs": 1, "minibatches": 1, "refill": 0.0, "max_useless_steps": STEPS}
    work = {"steps": STEPS, "groups_per_batch": GROUPS, "group_size": GROUP, "max_tokens": 72, **once}
    return [_imitating(ONCE, 1), _imitating(ROUNDS, FOUR), Arm(REWARDED, {"kind": "rl", "rl": work}, REWARD_RATES)]


def _imitating(name: str, rounds: int) -> Arm:
    """Keeps every right answer."""
    part = {"rounds": rounds, "problems": STEPS * GROUPS // rounds, "steps": IMITATIONS // rounds}
    kept = {"group_size": GROUP, "keep": GROUP, "bar": 1.0, "batch_size": BATCH, "max_tokens": 72}
    return Arm(name, {"kind": "rejection", "rejection": {**part, **kept}}, IMITATION_RATES)


async def conduct(lab: Lab, terms: Terms) -> Result:
    """Raises:
    ConfigError: an override that cannot be applied, or is of what the study itself decides.
    RunError: no answer of the base to a training problem is right.
    Interrupted, VeneerError: as ``Lab.run``.
    """
    contest = await hold_contest(lab, SHARED, arms(), MARGIN, terms)
    result = contest_result(contest, "{arm} beside {reference}, each at its best learning rate")
    found = {entrant.arm.name: [right_answers(outcome) for outcome in _runs(entrant)] for entrant in contest.entrants}
    findings = [_apart(contest), *found_findings(found)]
    document = {**result.document, "right_answers": found}
    tables = f"{_table(contest, found)}\n{result.tables}"
    return Result([*result.findings, *findings], tables, document, lambda path: _draw(contest, found, path))


def _runs(entrant: Entrant) -> list[Outcome]:
    return [cast(Outcome, outcome) for outcome in entrant.outcomes]


def right_answers(outcome: Outcome) -> float:
    """Share of the episodes that were played to train which had a reward of 1; here rewards are 0 and 1."""
    played = [m for m in outcome.metrics if "reward/total" in m]
    return sum(m["reward/total"] * m["episodes"] for m in played) / sum(m["episodes"] for m in played)


# ---------------------------------------------------------------- what it says


def _apart(contest: Contest) -> Finding:
    """What reward is ahead by of imitation that explores too."""
    one, other = (next(entrant for entrant in contest.entrants if entrant.arm.name == name) for name in (REWARDED, ROUNDS))
    told = compare_arms(one.scores, one.sweep, other.scores, other.sweep, contest.margin)
    return Finding(f"{REWARDED} beside {ROUNDS}, each at its best learning rate", told.verdict, str(told))


def found_findings(found: Mapping[str, Sequence[float]]) -> list[Finding]:
    """How many right answers were sampled in as many episodes."""
    findings = []
    for arm in (ROUNDS, REWARDED):
        ratios = [one / once for one, once in zip(found[arm], found[ONCE], strict=True)]
        told = compare_seeds(ratios, [1.0] * len(ratios), FOUND_MARGIN)
        more = f"; {told.numbers.partition('; ')[2]}" if told.verdict == "undecided" else ""
        numbers = f"{interval_of(ratios)} times as many, margin {FOUND_MARGIN:g}{more}"
        findings.append(Finding(f"right answers among the episodes: {arm} beside {ONCE}", told.said("more", "fewer"), numbers))
    return findings


def _table(contest: Contest, found: Mapping[str, Sequence[float]]) -> str:
    lines = ["| arm | episodes | right among them | imitated | optimizer steps |", "|---|---|---|---|---|"]
    for entrant in contest.entrants:
        runs = _runs(entrant)
        episodes = statistics.fmean(sum(m.get("episodes", 0) for m in outcome.metrics) for outcome in runs)
        kept = statistics.fmean(sum(m.get("kept", 0) for m in outcome.metrics) for outcome in runs)
        steps = statistics.fmean(outcome.metrics[-1]["step"] for outcome in runs)
        imitated = "-" if entrant.arm.name == REWARDED else f"{kept:,.0f}"
        lines.append(f"| {entrant.arm.name} | {episodes:,.0f} | {interval_of(found[entrant.arm.name])} | {imitated} | {steps:.0f} |")
    return (
        "\n".join([*lines, "", "Means over seeds, with 95% intervals. Reward trains on all episodes of groups that are not all alike."])
        + "\n"
    )


def _draw(contest: Contest, found: Mapping[str, Sequence[float]], path: Path) -> None:
    """Left: the contest. Right: right answers among the episodes that were played."""
    with picture(path, 11.4, 3.4) as figure:
        left, right = figure.add_gridspec(1, 2, width_ratios=(8, 3))
        draw_contest(contest, figure.add_subfigure(left))
        axes = figure.add_subfigure(right).subplots()
        for place, ((_, shares), colour) in enumerate(zip(found.items(), COLOURS, strict=False)):
            around = t_interval(shares)
            bar = ([around.value - around.low], [around.high - around.value])
            axes.errorbar([place], [around.value], yerr=bar, color=colour, fmt="o", markersize=5, capsize=4)
        axes.set_xticks(range(len(found)), list(found), rotation=20)
        axes.set_ylabel("right among the episodes of training")
        axes.set_ylim(bottom=0)
