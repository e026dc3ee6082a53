"""Does an adapter fall behind once reward has told it more bits than it has parameters? Adapters of 256 to 180,224 of them, on sums.

"LoRA Without Regret" argues that an episode tells about a bit, so that even an adapter of rank 1 has room for all that reinforcement
learning tells it (https://thinkingmachines.ai/blog/lora/). On a model of billions no run can put that to the test. The bundled base is so
small that one map of one layer, at rank 1, has fewer parameters than a run of 40 steps has bits: if it learns no less than the same map at
rank 16, what a run is told is not what an adapter has to hold. Beside an adapter of all layers one map is in one place as well as thin.

The map is the one that learned most of seven that were tried at rank 1 on another seed, so it says what one map can do, not what any can.
Bits are the entropy of the rewards in every group, the most that they could tell (by its plug-in estimate, which is a little low). What a
learner makes of them is less: the study of the bandit finds a fraction.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from veneer.measure.verdict import t_interval
from veneer.studies.contest import Arm, Contest, Entrant, Terms, compare_arms, config_of, hold_contest, overridden
from veneer.studies.contest_page import COLOURS, contest_result
from veneer.studies.demand import Demanded, demand_findings
from veneer.studies.drawing import picture
from veneer.studies.lab import Lab, Outcome
from veneer.studies.result import Finding, Result, interval_of

QUESTION = "Does an adapter fall behind once reward has told it more bits than it has parameters?"
CLAIMS = ()
MARGIN = 0.03
RATES = (3.75e-4, 7.5e-4, 1.5e-3, 3e-3, 6e-3)
THIN_RATES = (1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2)
"""Of adapters in one place."""
ONE_MAP = "layers.1.self_attn.o_proj"
THICK, THIN = "rank 16 of one map", "rank 1 of one map"
SHARED: Mapping[str, Any] = {
    "env": {"name": "arithmetic"},
    "rl": {"steps": 40, "groups_per_batch": 8, "group_size": 8},
    "eval": {"problems": 512, "every": 40},
}


def arms() -> Sequence[Arm]:
    """On nano: 180,224 parameters, 11,264, 2,560, 4,096 and 256."""
    return [
        Arm("rank 16", {"lora": {"rank": 16}}, RATES),
        Arm("rank 1", {"lora": {"rank": 1}}, RATES),
        Arm("rank 1 of down_proj", {"lora": {"rank": 1, "target_modules": ["down_proj"]}}, RATES),
        Arm(THICK, {"lora": {"rank": 16, "target_modules": [ONE_MAP]}}, THIN_RATES),
        Arm(THIN, {"lora": {"rank": 1, "target_modules": [ONE_MAP]}}, THIN_RATES),
    ]


async def conduct(lab: Lab, terms: Terms) -> Result:
    """Raises:
    ConfigError: an override that cannot be applied, or is of what the study itself decides.
    AdapterError: the base has no such map.
    Interrupted, VeneerError: as ``Lab.run``.
    """
    shared = overridden(SHARED, arms(), terms)
    parameters = {arm.name: lab.trainable(config_of(shared, arm, arm.rates[0], 0)) for arm in arms()}
    contest = await hold_contest(lab, shared, arms(), MARGIN, terms)
    result = contest_result(contest, "{arm} beside {reference}, each at its best learning rate")
    bits = {entrant.arm.name: [_bits(outcome) for outcome in _runs(entrant)] for entrant in contest.entrants}
    document = {**result.document, "parameters": parameters, "bits": bits}
    tables = f"{_table(contest, parameters)}\n{result.tables}"
    findings = [*received_findings(contest, parameters), *result.findings]
    return Result(findings, tables, document, lambda path: _draw(contest, parameters, path))


def _runs(entrant: Entrant) -> list[Outcome]:
    return [cast(Outcome, outcome) for outcome in entrant.outcomes]


def _bits(outcome: Outcome) -> float:
    """That a run received in all its steps."""
    return sum(float(m["bits"]) for m in outcome.metrics if "bits" in m)


def _late_rise(outcome: Outcome) -> float:
    """By how much the mean reward of episodes rose from the third quarter of the steps to the last: near 0, more would teach little."""
    rewards = [float(m["reward/total"]) for m in outcome.metrics if "reward/total" in m]
    quarter = len(rewards) // 4
    return statistics.fmean(rewards[-quarter:]) - statistics.fmean(rewards[-2 * quarter : -quarter]) if quarter else 0.0


# ---------------------------------------------------------------- what it says


def received_findings(contest: Contest, parameters: Mapping[str, int]) -> list[Finding]:
    """The thin map beside the same at a higher rank; adapters with and without room for their bits beside one of all layers."""
    entrants = {entrant.arm.name: entrant for entrant in contest.entrants}
    thin, thick = entrants[THIN], entrants[THICK]
    each = [_bits(outcome) / parameters[THIN] for outcome in _runs(thin)]
    beside = compare_arms(thin.scores, thin.sweep, thick.scores, thick.sweep, contest.margin)
    told = [
        Demanded(entrant.arm.name, t_interval([_bits(o) for o in _runs(entrant)]).value / parameters[entrant.arm.name], entrant.comparison)
        for entrant in contest.entrants
        if entrant.comparison is not None
    ]
    return [
        Finding(f"{THIN}, {parameters[THIN]:,} parameters, beside {THICK}, {parameters[THICK]:,}", beside.verdict, str(beside)),
        Finding(f"bits that rewards could tell at most, for each parameter of {THIN}", f"{t_interval(each).value:.1f}", interval_of(each)),
        *demand_findings(contest.reference.arm.name, told),
    ]


def _table(contest: Contest, parameters: Mapping[str, int]) -> str:
    lines = ["| arm | parameters | bits received | for each parameter | gained | reward gained in the last quarter |"]
    lines.append("|---" * 6 + "|")
    for entrant in contest.entrants:
        count, bits = parameters[entrant.arm.name], [_bits(outcome) for outcome in _runs(entrant)]
        cells = [entrant.arm.name, f"{count:,}", f"{t_interval(bits).value:,.0f}", interval_of([one / count for one in bits])]
        cells += [interval_of([outcome.score - outcome.score_before for outcome in entrant.outcomes])]
        lines.append(f"| {' | '.join(cells)} | {interval_of([_late_rise(outcome) for outcome in _runs(entrant)])} |")
    lines += [
        "",
        "Means over seeds with 95% intervals; gained is in the score on held-out problems, and in the last quarter of the steps in the",
    ]
    return "\n".join([*lines, "reward of the episodes that were trained on."]) + "\n"


def _draw(contest: Contest, parameters: Mapping[str, int], path: Path) -> None:
    """Scores over bits received for each parameter. To the right of 1 the argument promises nothing."""
    with picture(path, 7.2, 3.4) as figure:
        axes = figure.subplots()
        for entrant, colour in zip(contest.entrants, COLOURS, strict=False):
            count = parameters[entrant.arm.name]
            each, around = [_bits(outcome) / count for outcome in _runs(entrant)], t_interval(entrant.scores)
            bar = ([around.value - around.low], [around.high - around.value])
            axes.scatter(each, entrant.scores, color=colour, s=8, alpha=0.5, linewidth=0)
            axes.errorbar(
                [t_interval(each).value],
                [around.value],
                yerr=bar,
                color=colour,
                fmt="o",
                markersize=4,
                capsize=3,
                label=f"{entrant.arm.name}: {count:,} parameters",
            )
        before = [outcome.score_before for entrant in contest.entrants for outcome in entrant.outcomes]
        axes.axhline(sum(before) / len(before), color="#999999", linewidth=0.8, linestyle=":", label="base")
        axes.axvline(1, color="#999999", linewidth=0.8)
        axes.set(xscale="log", xlabel="bits that rewards could tell, a parameter", ylabel="score on held-out problems")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=7, loc="center left")
