"""Learning rates that ``veneer plan`` gives, beside swept ones, on bases of two widths, as a section of docs/plan.md: an hour of a core.

    make narrow rates     # a base half as wide as nano, pretrained in half an hour, and then this

On every base full fine-tuning and an adapter of the rank that is planned try a grid of learning rates on a few seeds. The plan is asked
with the best rate of full fine-tuning, and by its range test on each seed alone and on all of them, the base under a name that it does not
know.
Runs are kept in $VENEER_HOME/studies, so what was interrupted goes on.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pages import ROOT, machine, veneer, write_section
from veneer.assets import resolve_base
from veneer.cli.assemble import start
from veneer.engine.shapes import count_shape
from veneer.measure.plan.rate import first_step_ratio
from veneer.measure.verdict import t_interval
from veneer.store.files import veneer_home
from veneer.studies.contest import Arm, Sweep, sweep_all
from veneer.studies.lab import Lab, Outcome, Place
from veneer.studies.learning_rate import best_rates
from veneer.studies.rank import SHARED
from veneer.train.config import RunConfig
from veneer.train.session import stop_signals
from veneer.types import LoraConfig

RANK, FACTOR = 8, 1.6
POINTS = {"nano": 5, "": 7}
"""Of a grid: fewer where the best rate is known to within a factor of two."""
CENTRES = {"full": 1.5e-4, "adapter": 1.5e-3}
"""Of the grids: the best rates of docs/studies/rank.md. A grid whose best rate is the last on a side is widened there."""
GOAL = 1.5
"""The factor within which a planned rate is to lie."""
NEAR = 0.03
"""Of reward: what is not told apart (the margin of docs/studies/rank.md)."""


@dataclass(frozen=True)
class Optimum:
    """Of a swept arm: the geometric mean over seeds of where each one's parabola is highest, with its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def optimum(sweep: Sweep) -> Optimum:
    logs = t_interval(np.log2(best_rates(sweep)))
    return Optimum(2**logs.value, 2**logs.low, 2**logs.high)


def ratio(sweeps: Mapping[str, Sweep]) -> Optimum:
    """Of the adapter's best rate to that of full fine-tuning, seed by seed."""
    logs = t_interval(np.log2(best_rates(sweeps["adapter"])) - np.log2(best_rates(sweeps["full"])))
    return Optimum(2**logs.value, 2**logs.low, 2**logs.high)


def reward_at(rate: float, sweep: Sweep) -> float:
    """Between the grid's points along the rate's logarithm; beyond them that of the last."""
    return float(np.interp(np.log(rate), np.log(list(sweep.means)), list(sweep.means.values())))


# ---------------------------------------------------------------- what is measured


def grid(arm: str, base: str) -> list[float]:
    points = POINTS.get(base, POINTS[""])
    return [CENTRES[arm] * FACTOR ** (i - points // 2) for i in range(points)]


async def swept(lab: Lab, base: str, seeds: int) -> dict[str, Sweep]:
    arms = [
        Arm("adapter", {"lora": {"rank": RANK}}, grid("adapter", base)),
        Arm("full", {"weights": "full"}, grid("full", base)),
    ]
    shared = {**SHARED, "base": base}
    return {arm.name: (await sweep_all(lab, shared, [arm], seeds))[0] for arm in arms}


def learning_rate(document: Mapping[str, Any]) -> Mapping[str, Any]:
    figures = [figure for section in document["sections"].values() for figure in section]
    assert next(figure for figure in figures if figure["name"] == "rank")["value"] == RANK
    return next(figure for figure in figures if figure["name"] == "learning rate")


def unnamed(base: str) -> Path:
    """The base as a folder whose name says nothing."""
    link = veneer_home() / "studies" / "bases" / f"unnamed-{Path(base).name}"
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(Path(resolve_base(base)).resolve())
    return link


def planned(base: str, full: float, tests: int) -> dict[str, list[Mapping[str, Any]]]:
    """What the plan says, by how it was asked."""
    task = ("--env", SHARED["env"]["name"], "--problems", 64)
    plan = [learning_rate(veneer(veneer_home(), "plan", base, *task, "--full-lr", full))]
    test = ("plan", unnamed(base), *task, "--range-test")
    alone = [learning_rate(veneer(veneer_home(), *test, "--range-seeds", 1, "--seed", seed)) for seed in range(tests)]
    together = [learning_rate(veneer(veneer_home(), *test, "--range-seeds", tests))]
    return {"`--full-lr`": plan, "`--range-test --range-seeds 1`": alone, f"`--range-test --range-seeds {tests}`": together}


# ---------------------------------------------------------------- what is told


def section(found: Mapping[str, Mapping[str, Any]], terms: str) -> str:
    lines = [
        f"Written by `make rates`: {terms}.",
        "*Best* is the geometric mean over seeds of the vertex of each one's parabola through its best rate and the two beside it, with",
        "Student's 95% interval; *near* are the rates of the grid whose mean reward on held-out problems is within "
        f"{NEAR} of the best one's. A",
        f"planned rate is to lie within a factor of {GOAL} of the best; *costs* is how much less reward the sweep has there.",
        "",
        "| base | pass rate | arm | best rate | near | reward there | tried |",
        "|---|---|---|---|---|---|---|",
    ]
    for base, one in found.items():
        for name, sweep in one["sweeps"].items():
            near = [rate for rate, mean in sweep.means.items() if mean >= sweep.means[sweep.best] - NEAR]
            tried = ", ".join(f"{rate:.2g}: {mean:.3f}" for rate, mean in sweep.means.items())
            arm = f"rank {RANK}" if name == "adapter" else name
            edge = f", {sweep.edge} tried" if sweep.edge else ""
            cells = (base, f"{one['before']:.3f}", arm, f"{optimum(sweep)}{edge}", f"{near[0]:.2g} to {near[-1]:.2g}")
            lines.append(f"| {' | '.join(cells)} | {sweep.means[sweep.best]:.3f} | {tried} |")
    lines += ["", "| base | the adapter's best rate over that of full fine-tuning | with equal first steps |", "|---|---|---|"]
    for base, one in found.items():
        lines.append(f"| {base} | {ratio(one['sweeps'])} | {one['equal']:.2f} |")
    lines += ["", "| base | asked with | planned | times the best | within the goal | costs |", "|---|---|---|---|---|---|"]
    for base, one in found.items():
        best, sweep = optimum(one["sweeps"]["adapter"]), one["sweeps"]["adapter"]
        for way, figures in one["plans"].items():
            lines.append(row(base, way, [figure["value"] for figure in figures], best, sweep))
    return "\n".join([*lines, "", f"{machine()}."])


def row(base: str, way: str, rates: Sequence[float | None], best: Optimum, sweep: Sweep) -> str:
    """Of one way to ask: each seed's rate, and their geometric mean."""
    known = [rate for rate in rates if rate is not None]
    told = ", ".join("none" if rate is None else f"{rate:.3g}" for rate in rates)
    if not known:
        return f"| {base} | {way} | {told} | - | **no** | - |"
    times = [rate / best.value for rate in known]
    each = f" ({', '.join(f'{ratio:.2f}' for ratio in times)})" if len(times) > 1 else ""
    mean = statistics.geometric_mean(times)
    close = [1 / GOAL <= ratio <= GOAL for ratio in times]
    word = "yes" if all(close) and len(known) == len(rates) else f"{sum(close)} of {len(rates)}"
    costs = statistics.fmean(sweep.means[sweep.best] - reward_at(rate, sweep) for rate in known)
    return f"| {base} | {way} | {told} | {mean:.2f}{each} | **{word}** | {costs:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", action="append", required=True, help="nano, or a folder; repeatable")
    parser.add_argument("--seeds", type=int, default=3, help="of sweeps")
    parser.add_argument("--tests", type=int, default=3, help="seeds of range tests, alone and together")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    def open_place(config: RunConfig) -> Place:
        there = start(config.base, args.threads, config.weights, config.device)
        return Place(there.engine, there.renderer)

    def told(outcome: Outcome, done: int, of: int) -> None:
        config = outcome.config
        print(f"{done} of {of}: {config.weights} {config.rl.learning_rate:.3g}: {outcome.score:.3f}", file=sys.stderr, flush=True)

    lab, found = Lab(veneer_home() / "studies" / "runs", open_place, "cpu", 8, told), dict[str, dict[str, Any]]()
    for base in args.base:
        with stop_signals(lab.stop):
            sweeps = asyncio.run(swept(lab, base, args.seeds))
        before = statistics.fmean(outcome.score_before for outcomes in sweeps["adapter"].tried.values() for outcome in outcomes)
        shape = count_shape(base)
        found[f"{shape.name}, {shape.hidden} wide"] = {
            "sweeps": sweeps,
            "before": before,
            "equal": first_step_ratio(shape.adapted(LoraConfig(RANK))),
            "plans": planned(base, optimum(sweeps["full"]).value, args.tests),
        }
    work = SHARED["rl"]
    terms = f"{work['steps']} steps of {work['groups_per_batch'] * work['group_size']} episodes of `{SHARED['env']['name']}`"
    terms += f", {SHARED['eval']['problems']} held-out problems, {args.seeds} seeds"
    write_section(ROOT / "docs/plan.md", "## Planned learning rates beside swept ones", section(found, terms))


if __name__ == "__main__":
    main()
