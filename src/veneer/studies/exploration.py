"""What is exploring worth? Reward, which samples anew at every step from what was learned, beside imitating the right answers of the base.

Free to pursue an outcome, a policy may come upon what nobody has shown it, and a step later sample it more often. Whoever imitates what
the base got right once learns from rewards too, but goes on from nothing that it has found; in rounds, each sampled from what the
round before has trained, it explores (expert iteration, https://arxiv.org/abs/1705.08439; RAFT, https://arxiv.org/abs/2304.06767). All
three play as many episodes on the same problems, and train on as many rows.

Whether anything new is found is asked of held-out problems that the base hardly solves or does not: whether reinforcement learning
goes beyond what the base samples is contested (https://arxiv.org/abs/2504.13837, https://arxiv.org/abs/2505.24864). They are sorted by how
often the base solves them, and the base tries them anew beside whoever was trained, as a problem that it never solved by chance is one
that it may solve.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from veneer.measure.verdict import compare_seeds, t_interval
from veneer.studies.contest import Arm, Contest, Terms, hold_contest, overridden
from veneer.studies.contest_page import COLOURS, contest_result, draw_contest
from veneer.studies.drawing import picture
from veneer.studies.lab import Lab, Outcome
from veneer.studies.result import Finding, Result, interval_of
from veneer.studies.sharpening import both
from veneer.train.config import RunConfig
from veneer.train.metrics import check_failures
from veneer.train.rollouts import Policy, derive_seed, do_rollouts
from veneer.types import EnvDataset

QUESTION = "Is it worth something to explore, or would imitating the right answers of the base do?"
CLAIMS = ()
MARGIN = 0.03
REWARDED, ONCE, ROUNDS = "reward", "imitating the base", "imitating in rounds"
STEPS, GROUPS, GROUP = 40, 8, 8
IMITATED: Mapping[str, Any] = {"group_size": GROUP, "keep": GROUP, "batch_size": 16}
LORA_RATES = (3.75e-4, 7.5e-4, 1.5e-3, 3e-3, 6e-3)
IMITATION_RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
SHARED: Mapping[str, Any] = {
    "env": {"name": "arithmetic", "args": {"min_terms": 4, "max_terms": 6}},
    "lora": {"rank": 4},
    "eval": {"problems": 512, "every": 10**6},
}
PROBLEMS, SORTED, ANEW = 128, 64, 32
"""Held-out problems: how often the base tries each to sort them, and then anew."""
AFTER = 8
"""Tries of a trained policy."""
STRATA: Mapping[str, tuple[int, int]] = {"never": (0, 0), "seldom": (1, SORTED // 16), "more often": (SORTED // 16 + 1, SORTED)}
"""Problems by how many of SORTED tries the base solves: from and to."""
REACH_MARGIN = 0.05
FEWEST = 5
"""Problems, of fewer nothing is said."""


def arms() -> Sequence[Arm]:
    """2,560 episodes each, and as many rows trained on."""
    episodes = STEPS * GROUPS * GROUP
    work = {"steps": STEPS, "groups_per_batch": GROUPS, "group_size": GROUP, "max_tokens": 72}
    return [Arm(REWARDED, {"rl": work}, LORA_RATES), *(_imitating(name, rounds, episodes) for name, rounds in ((ONCE, 1), (ROUNDS, 4)))]


def _imitating(name: str, rounds: int, episodes: int) -> Arm:
    part = {"rounds": rounds, "problems": episodes // GROUP // rounds, "steps": episodes // IMITATED["batch_size"] // rounds}
    return Arm(name, {"kind": "rejection", "rejection": {**IMITATED, **part, "max_tokens": 72}}, IMITATION_RATES)


@dataclass(frozen=True)
class Reach:
    """What a policy solves of the problems of each stratum, in one try."""

    solved: Mapping[str, float]


async def conduct(lab: Lab, terms: Terms) -> Result:
    """Raises:
    ConfigError: an override that cannot be applied, or is of what the study itself decides.
    RunError: the base solves no training problem.
    Interrupted, VeneerError: as ``Lab.run``.
    """
    shared = overridden(SHARED, arms(), terms)
    contest = await hold_contest(lab, shared, arms(), MARGIN, terms)
    first = cast(Outcome, contest.reference.outcomes[0])
    played = await lab.measured(f"solved by the base, {PROBLEMS} problems", first.config, partial(_play, lab, first, SORTED + ANEW, True))
    strata = sort_problems([solved[:SORTED] for solved in played])
    base = reach([solved[SORTED:] for solved in played], strata)
    found = dict[str, list[Reach]]()
    for entrant in contest.entrants:
        shares = list[Reach]()
        for outcome in (cast(Outcome, outcome) for outcome in entrant.outcomes):
            after = await lab.measured(f"solved, {PROBLEMS} problems", outcome.config, partial(_play, lab, outcome, AFTER, False))
            shares.append(reach(after, strata))
        found[entrant.arm.name] = shares
    result = contest_result(contest, "{arm} beside {reference}, each at its best learning rate")
    document = {
        **result.document,
        "strata": {name: len(problems) for name, problems in strata.items()},
        "base": base.solved,
        "solved": {arm: [one.solved for one in shares] for arm, shares in found.items()},
    }
    tables = f"{_table(strata, base, found)}\n{result.tables}"
    findings = [*result.findings, *reach_findings(strata, base, found)]
    return Result(findings, tables, document, lambda path: _draw(contest, base, found, path))


async def _play(lab: Lab, outcome: Outcome, tries: int, as_base: bool, config: RunConfig) -> list[list[bool]]:
    """Of each problem and try, whether it was solved: by what was trained, or by its base."""
    async with both(lab, outcome, config) as (start, end, dataset):
        return await _tries(start if as_base else end, dataset, tries, config)


async def _tries(policy: Policy, dataset: EnvDataset, tries: int, config: RunConfig) -> list[list[bool]]:
    groups = await do_rollouts(policy, dataset, "eval", range(PROBLEMS), tries, derive_seed("exploration", config.seed))
    check_failures(groups, config.env.max_failed_share)
    return [[t.reward >= 1 for t in group.trajectories_G] for group in groups]


def sort_problems(solved: Sequence[Sequence[bool]]) -> dict[str, list[int]]:
    """The problems of each stratum, by the base's tries."""
    counts = [sum(tries) for tries in solved]
    return {name: [i for i, count in enumerate(counts) if low <= count <= high] for name, (low, high) in STRATA.items()}


def reach(solved: Sequence[Sequence[bool]], strata: Mapping[str, Sequence[int]]) -> Reach:
    """0 where a stratum is empty."""
    return Reach(
        {name: statistics.fmean(statistics.fmean(solved[i]) for i in problems) if problems else 0.0 for name, problems in strata.items()}
    )


# ---------------------------------------------------------------- what it says


def reach_findings(strata: Mapping[str, Sequence[int]], base: Reach, found: Mapping[str, Sequence[Reach]]) -> list[Finding]:
    """Of problems that the base does not solve: each arm beside the base, and imitation beside reward."""
    hard = next(iter(STRATA))
    asked = f"of {len(strata[hard])} problems of which no try of {SORTED} of the base was right, the share solved in one try"
    if len(strata[hard]) < FEWEST:
        return [Finding(asked, "untested", f"they are fewer than {FEWEST}")]
    shares = {arm: [one.solved[hard] for one in reached] for arm, reached in found.items()}
    findings = []
    for arm, share in shares.items():
        told = compare_seeds(share, [base.solved[hard]] * len(share), REACH_MARGIN)
        findings.append(Finding(f"{asked}: {arm} beside the base tried anew", told.verdict, told.numbers))
    for arm in (ONCE, ROUNDS):
        told = compare_seeds(shares[arm], shares[REWARDED], REACH_MARGIN)
        findings.append(Finding(f"{asked}: {arm} beside {REWARDED}", told.verdict, told.numbers))
    return findings


def _table(strata: Mapping[str, Sequence[int]], base: Reach, found: Mapping[str, Sequence[Reach]]) -> str:
    lines = ["| solved by the base | problems | base tried anew | " + " | ".join(found) + " |", "|---" * (3 + len(found)) + "|"]
    for name, problems in strata.items():
        low, high = STRATA[name]
        which = f"{name}: {low} to {high} of {SORTED} tries" if high else f"{name}, in {SORTED} tries"
        cells = [interval_of([one.solved[name] for one in reached]) if problems else "-" for reached in found.values()]
        lines.append(f"| {which} | {len(problems)} | {base.solved[name]:.3g} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "Shares of held-out problems that one try solves; means over seeds with 95% intervals."]) + "\n"


def _draw(contest: Contest, base: Reach, found: Mapping[str, Sequence[Reach]], path: Path) -> None:
    """Left: the contest. Right: what is solved, by how often the base does."""
    with picture(path, 11.4, 3.4) as figure:
        left, right = figure.add_gridspec(1, 2, width_ratios=(8, 4))
        draw_contest(contest, figure.add_subfigure(left))
        axes = figure.add_subfigure(right).subplots()
        places = range(len(STRATA))
        axes.plot(places, [base.solved[name] for name in STRATA], color="black", linestyle=":", marker="o", markersize=3, label="base")
        for (arm, reached), colour in zip(found.items(), COLOURS, strict=False):
            around = [t_interval([one.solved[name] for one in reached]) for name in STRATA]
            bars = [[m.value - m.low for m in around], [m.high - m.value for m in around]]
            axes.errorbar(places, [m.value for m in around], yerr=bars, color=colour, marker="o", markersize=3, capsize=3, label=arm)
        axes.set_xticks(places, list(STRATA))
        axes.set(xlabel="solved by the base", ylabel="share solved in one try", ylim=(-0.02, 1.02))
        axes.legend(frameon=False, fontsize=7)
