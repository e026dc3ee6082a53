"""What people read of a contest: findings, tables, numbers and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.measure.intervals import Mean
from veneer.measure.verdict import Comparison, t_interval
from veneer.studies.contest import Contest, Entrant, Sweep
from veneer.studies.drawing import across_learning_rates, picture
from veneer.studies.result import Finding, Result

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase

MOST_LETTERS = 32
"""Of all names below an axis; more run into each other."""
COLOURS = ("#555555", "#0066cc", "#cc5500", "#228833", "#aa3377", "#997700")


def contest_result(contest: Contest, question: str, more: Sequence[Finding] = ()) -> Result:
    """``question``: what each arm is asked, with {arm} and {reference} in it. ``more``: findings behind those of the comparisons."""
    against = contest.reference.arm.name
    findings = [
        Finding(
            question.format(arm=entrant.arm.name, reference=against),
            entrant.comparison.verdict,
            f"{entrant.comparison}{tell_edges({one.arm.name: one.sweep for one in (contest.reference, entrant)})}",
        )
        for entrant in contest.entrants
        if entrant.comparison is not None
    ]
    asked = f"noise floor: {against} on other seeds, compared with itself"
    floor = Finding(asked, contest.noise.verdict, f"{contest.noise}{_beyond_noise(contest.noise)}")
    return Result([*findings, *more, floor], _tables(contest), _document(contest), lambda path: _draw(contest, path))


def tell_edges(sweeps: Mapping[str, Sweep]) -> str:
    """Of those whose best learning rate is the last that was tried, by arm: a better one may lie beyond."""
    return "".join(f"; {name} at the {sweep.edge} learning rate tried" for name, sweep in sweeps.items() if sweep.edge)


def _beyond_noise(noise: Comparison) -> str:
    """What a noise floor that is not equal says of the other comparisons."""
    if noise.verdict == "equal":
        return ""
    largest = max(abs(noise.difference.low), abs(noise.difference.high))
    return f"; seeds alone may differ by {largest:.3g}: take no smaller difference above for one between arms"


# ---------------------------------------------------------------- tables


def _tables(contest: Contest) -> str:
    against, margin = contest.reference.arm.name, contest.margin
    lines = [f"| arm | best learning rate | before | after | less {against} | verdict |", "|---|---|---|---|---|---|"]
    for entrant in contest.entrants:
        comparison = entrant.comparison
        verdict = ("-", "reference") if comparison is None else (str(comparison.difference), _short(comparison))
        before = sum(outcome.score_before for outcome in entrant.outcomes) / len(entrant.outcomes)
        cells = (entrant.arm.name, _rate(entrant.sweep), f"{before:.3f}", _score(t_interval(entrant.scores)), *verdict)
        lines.append(f"| {' | '.join(cells)} |")
    lines.append(f"| {against}, other seeds | the same | - | - | {contest.noise.difference} | {_short(contest.noise)} |")
    chosen = len(next(iter(contest.reference.sweep.tried.values())))
    lines += [
        "",
        f"Scores of {len(contest.reference.scores)} seeds, with 95% intervals. Mean score by learning rate on the {chosen} others on",
    ]
    lines += ["which it is chosen; * is the best, d a rate at which runs diverged:", ""]
    lines += [f"- {entrant.arm.name}: {tell_sweep(entrant.sweep)}; {_plateau(entrant, margin)}" for entrant in contest.entrants]
    diverged = [f"{e.arm.name}, seed {o.config.seed}: {o.diverged}" for e in contest.entrants for o in e.outcomes if o.diverged]
    return "\n".join([*lines, *([""] if diverged else []), *(f"- diverged: {line}" for line in diverged)]) + "\n"


def _score(mean: Mean) -> str:
    return f"{mean.value:.3f} [{mean.low:.3f}, {mean.high:.3f}]"


def _short(comparison: Comparison) -> str:
    more = f" ({comparison.seeds_needed or 'too many'} seeds would do)" if comparison.verdict == "undecided" else ""
    return f"**{comparison.verdict}** at a margin of {comparison.margin:g}{more}"


def _rate(sweep: Sweep) -> str:
    return f"{sweep.best:.3g}" + (f" ({sweep.edge} tried)" if sweep.edge else "")


def tell_sweep(sweep: Sweep) -> str:
    """The mean score at every learning rate; * is the best, d one at which runs diverged."""

    def one(rate: float, mean: float) -> str:
        lost = any(outcome.diverged for outcome in sweep.tried[rate])
        return f"{rate:.3g} {mean:.3f}{'*' if rate == sweep.best else ''}{' d' if lost else ''}"

    return ", ".join(one(rate, mean) for rate, mean in sweep.means.items())


def _plateau(entrant: Entrant, margin: float) -> str:
    return f"within {margin:g} of the best over a factor of {entrant.sweep.plateau(margin):.3g}"


# ---------------------------------------------------------------- numbers


def _document(contest: Contest) -> dict[str, Any]:
    return {
        "margin": contest.margin,
        "reference": contest.reference.arm.name,
        "noise": _compared(contest.noise),
        "arms": [
            {
                "arm": entrant.arm.name,
                "settings": entrant.arm.settings,
                "learning_rate": entrant.sweep.best,
                "edge": entrant.sweep.edge,
                "widened": entrant.sweep.widened,
                "tried": [
                    {"learning_rate": rate, "scores": [o.score for o in outcomes], "diverged": [o.diverged for o in outcomes]}
                    for rate, outcomes in entrant.sweep.tried.items()
                ],
                "seeds": [outcome.config.seed for outcome in entrant.outcomes],
                "scores": entrant.scores,
                "scores_before": [outcome.score_before for outcome in entrant.outcomes],
                "diverged": [outcome.diverged for outcome in entrant.outcomes],
                "comparison": None if entrant.comparison is None else _compared(entrant.comparison),
            }
            for entrant in contest.entrants
        ],
    }


def _compared(comparison: Comparison) -> dict[str, Any]:
    ends = {"value": comparison.difference.value, "low": comparison.difference.low, "high": comparison.difference.high}
    said = {"verdict": comparison.verdict, "seeds_needed": comparison.seeds_needed}
    return {**ends, "deviation": comparison.deviation, "seeds": comparison.seeds, "choice": comparison.choice, **said}


# ---------------------------------------------------------------- picture


def _draw(contest: Contest, path: Path) -> None:
    with picture(path, 8.4, 3.2) as figure:
        draw_contest(contest, figure)


def draw_contest(contest: Contest, figure: FigureBase) -> None:
    """Left: what each learning rate reaches. Right: every seed at the best one, and the arms' 95% intervals."""
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))  # differences of a few points need a scale of their own
    for place, entrant in enumerate(contest.entrants):
        colour, means = COLOURS[place % len(COLOURS)], entrant.sweep.means
        left.plot(list(means), list(means.values()), color=colour, marker="o", markersize=3, label=entrant.arm.name)
        for rate, outcomes in entrant.sweep.tried.items():
            left.scatter([rate] * len(outcomes), [o.score for o in outcomes], color=colour, s=6, alpha=0.4, linewidth=0)
        around = t_interval(entrant.scores)
        bar = ([around.value - around.low], [around.high - around.value])
        right.errorbar([place], [around.value], yerr=bar, color=colour, fmt="o", capsize=4, markersize=5)
        right.scatter([place + 0.2] * len(entrant.scores), entrant.scores, color=colour, s=10, alpha=0.6, linewidth=0)
    across_learning_rates(left)
    left.set_ylabel("held-out score")
    left.legend(frameon=False)
    right.set_xticks(range(len(contest.entrants)), [entrant.arm.name for entrant in contest.entrants])
    letters = sum(len(entrant.arm.name) for entrant in contest.entrants)
    right.tick_params(axis="x", rotation=0 if letters < MOST_LETTERS else 20)
    right.set_xlim(-0.5, len(contest.entrants) - 0.2)
    right.set_xlabel("at its best learning rate, fresh seeds")
