"""Does an adapter fall behind once reward has told it more bits than it has parameters? Adapters of 256 to 180,224 of them, on sums.

"LoRA Without Regret" argues that an episode tells about a bit, so that even an adapter of rank 1 has room for all that reinforcement
learning tells it (https://thinkingmachines.ai/blog/lora/). On a model of billions no run can put that to the test. The bundled base is so
small that one map of one layer, at rank 1, has fewer parameters than a run of 40 steps has bits: if it learned no less, what a run is told
would not be what an adapter has to hold. The same map at rank 16 tells a want of parameters from being in one place alone.

Bits received are the entropy of the rewards in every group, which is the most that they can tell, by its plug-in estimate, which is low.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from veneer.measure.verdict import t_interval
from veneer.studies.contest import Arm, Contest, Entrant, Terms, hold_contest
from veneer.studies.contest_page import COLOURS, contest_result
from veneer.studies.demand import Demanded, demand_finding
from veneer.studies.drawing import picture
from veneer.studies.lab import Lab, Outcome
from veneer.studies.result import Finding, Result

QUESTION = "Does an adapter fall behind once reward has told it more bits than it has parameters?"
CLAIMS = ()
MARGIN = 0.03
RATES = (3.75e-4, 7.5e-4, 1.5e-3, 3e-3, 6e-3)
THIN_RATES = (1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2)
"""Of adapters in one place, which have further to go."""
ONE_MAP = "layers.1.self_attn.o_proj"
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
        Arm("rank 16 of one map", {"lora": {"rank": 16, "target_modules": [ONE_MAP]}}, THIN_RATES),
        Arm("rank 1 of one map", {"lora": {"rank": 1, "target_modules": [ONE_MAP]}}, THIN_RATES),
    ]


async def conduct(lab: Lab, terms: Terms) -> Result:
    """Raises:
    ConfigError: an override that cannot be applied, or is of what the study itself decides.
    Interrupted, VeneerError: as ``Lab.run``.
    """
    contest = await hold_contest(lab, SHARED, arms(), MARGIN, terms)
    parameters = {entrant.arm.name: lab.trainable(_runs(entrant)[0].config) for entrant in contest.entrants}
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


def _gained(entrant: Entrant) -> list[float]:
    return [outcome.score - outcome.score_before for outcome in entrant.outcomes]


# ---------------------------------------------------------------- what it says


def received_findings(contest: Contest, parameters: Mapping[str, int]) -> list[Finding]:
    """Whether adapters fall behind just where they received more bits than they have parameters, and how much the thinnest learned."""
    told = [
        Demanded(entrant.arm.name, t_interval([_bits(o) for o in _runs(entrant)]).value / parameters[entrant.arm.name], entrant.comparison)
        for entrant in contest.entrants
        if entrant.comparison is not None
    ]
    thinnest = min(contest.entrants, key=lambda entrant: parameters[entrant.arm.name])
    count, reference = parameters[thinnest.arm.name], contest.reference
    each = [_bits(outcome) / count for outcome in _runs(thinnest)]
    shares = [one / whole if whole > 0 else 0.0 for one, whole in zip(_gained(thinnest), _gained(reference), strict=True)]
    return [
        demand_finding(reference.arm.name, told),
        Finding(
            f"bits that each of the {count:,} parameters of {thinnest.arm.name} was told, at most",
            f"{t_interval(each).value:.1f}",
            _interval(each),
        ),
        Finding(
            f"of what {reference.arm.name} learns, the share that {thinnest.arm.name} learns",
            f"{t_interval(shares).value:.2f}",
            _interval(shares),
        ),
    ]


def _interval(values: Sequence[float]) -> str:
    mean = t_interval(values)
    return f"{mean.value:.3g} [{mean.low:.3g}, {mean.high:.3g}]"


def _table(contest: Contest, parameters: Mapping[str, int]) -> str:
    lines = ["| arm | parameters | bits received | for each parameter | gained |", "|---|---|---|---|---|"]
    for entrant in contest.entrants:
        count, bits = parameters[entrant.arm.name], [_bits(outcome) for outcome in _runs(entrant)]
        cells = [entrant.arm.name, f"{count:,}", f"{t_interval(bits).value:,.0f}", _interval([one / count for one in bits])]
        lines.append(f"| {' | '.join(cells)} | {_interval(_gained(entrant))} |")
    return "\n".join([*lines, "", "Means over seeds with 95% intervals; gained is in the share of held-out problems solved."]) + "\n"


def _draw(contest: Contest, parameters: Mapping[str, int], path: Path) -> None:
    """Scores over bits received for each parameter; the argument promises nothing to the right of 1."""
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
        axes.set(xscale="log", xlabel="bits received, a parameter", ylabel="share of held-out problems solved", ylim=(0, 1))
        axes.legend(frameon=False, fontsize=7, loc="lower left")
