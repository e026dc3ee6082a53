"""Which learning rate suits which rank? Supervised training of ranks 1 to 64 by two rules for alpha, and of all weights.

With the published rule, W + (alpha / r) B A and alpha 32, the best learning rate is said not to depend on the rank ("LoRA Without
Regret", https://thinkingmachines.ai/blog/lora/), and to be about ten times that of full fine-tuning. With alpha = 2 r, which many
libraries' examples have, theory says that it falls as the square root of the rank (https://arxiv.org/abs/2602.06204).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from veneer.measure.verdict import compare_seeds, t_interval
from veneer.studies.contest import Arm, Sweep, Terms, overridden, peak, sweep_all, thinned
from veneer.studies.demonstrations import write_demonstrations
from veneer.studies.drawing import across_learning_rates, picture
from veneer.studies.lab import Lab
from veneer.studies.result import Finding, Result, ratio_of

QUESTION = "Does the best learning rate depend on the rank, and is it ten times that of full fine-tuning?"
CLAIMS = (7, 8, 9)
RANKS: Sequence[int] = (1, 4, 16, 64)
FIXED, GROWING = "alpha 32", "alpha 2 r"
ROWS = 500
"""Of which a fifth is held out."""
SLOPE_MARGIN = 0.2
"""Of a power of the rank: from rank 4 to 64 it is less than a factor of 1.8."""
RATIO_MARGIN = 1.0
"""Of the ratio's logarithm to base 2: a factor of two to either side of ten."""
SHARED: Mapping[str, Any] = {"kind": "sft", "sft": {"steps": 60, "batch_size": 16, "held_out": 0.2}, "eval": {"every": 60}}
LORA_RATES = tuple(2.5e-4 * 2**k for k in range(7))
FULL_RATES = tuple(2.5e-5 * 2**k for k in range(7))


def arms() -> Sequence[Arm]:
    fixed = [Arm(f"{FIXED}, rank {rank}", {"lora": {"rank": rank, "alpha": 32.0}}, LORA_RATES) for rank in RANKS]
    growing = [Arm(f"{GROWING}, rank {rank}", {"lora": {"rank": rank, "alpha": 2.0 * rank}}, LORA_RATES) for rank in RANKS]
    return [*fixed, *growing, Arm("full", {"weights": "full"}, FULL_RATES)]


async def conduct(lab: Lab, terms: Terms) -> Result:
    data = write_demonstrations(lab.folder.parent / "data", ROWS, seed=0)
    shared = overridden({**SHARED, "sft": {**SHARED["sft"], "data": str(data)}}, arms(), terms)
    sweeps = await sweep_all(lab, shared, thinned(arms(), terms), terms.seeds)
    by_rule = {FIXED: dict(zip(RANKS, sweeps, strict=False)), GROWING: dict(zip(RANKS, sweeps[len(RANKS) :], strict=False))}
    return _result(by_rule, sweeps[-1])


# ---------------------------------------------------------------- the best rate


def best_rates(sweep: Sweep) -> list[float]:
    """The best learning rate of each seed, between the points of the grid."""
    rates = list(sweep.tried)
    return [peak(rates, scores) for scores in zip(*([o.score for o in outcomes] for outcomes in sweep.tried.values()), strict=True)]


def slopes(sweeps: Mapping[int, Sweep], smallest: int = 4) -> list[float]:
    """For each seed the power of the rank that the best rate follows, from rank ``smallest`` on: least squares in logarithms."""
    chosen = {math.log2(rank): np.log2(best_rates(sweep)) for rank, sweep in sweeps.items() if rank >= smallest}
    return [float(slope) for slope in np.polyfit(list(chosen), np.array(list(chosen.values())), 1)[0]]


# ---------------------------------------------------------------- what it says


def _result(by_rule: Mapping[str, Mapping[int, Sweep]], full: Sweep) -> Result:
    findings = [
        _power(f"{FIXED}: the best rate does not depend on the rank (power 0, ranks 4 to 64)", slopes(by_rule[FIXED]), 0.0),
        _power(f"{GROWING}: the best rate falls as the root of the rank (power -0.5, ranks 4 to 64)", slopes(by_rule[GROWING]), -0.5),
    ]
    of_full = np.log2(best_rates(full))
    by_rank = np.array([np.log2(best_rates(sweep)) for rank, sweep in by_rule[FIXED].items() if rank >= 4])
    findings.append(_ratio(list(by_rank.mean(axis=0) - of_full)))
    document = {
        "rules": {rule: [_one(sweep) | {"rank": rank} for rank, sweep in sweeps.items()] for rule, sweeps in by_rule.items()},
        "full": _one(full),
    }
    return Result(findings, _tables(by_rule, full), document, lambda path: _draw(by_rule, full, path))


def _power(question: str, powers: Sequence[float], claimed: float) -> Finding:
    found = compare_seeds(powers, [claimed] * len(powers), SLOPE_MARGIN)
    told = t_interval(powers)
    numbers = f"{told.value:+.2f} [{told.low:+.2f}, {told.high:+.2f}], margin {SLOPE_MARGIN:g}{found.wanted}"
    return Finding(question, found.said("higher", "lower"), numbers)


def _ratio(logs: Sequence[float]) -> Finding:
    found = compare_seeds(logs, [math.log2(10)] * len(logs), RATIO_MARGIN)
    numbers = f"{ratio_of(logs)}, margin a factor of 2{found.wanted}"
    return Finding(
        f"{FIXED}: the best rate is 10 times that of full fine-tuning (mean over ranks 4 to 64)", found.said("higher", "lower"), numbers
    )


def _one(sweep: Sweep) -> dict[str, Any]:
    return {
        "best_rates": best_rates(sweep),
        "edge": sweep.edge,
        "widened": sweep.widened,
        "losses": [{"learning_rate": rate, "losses": [-o.score for o in outcomes]} for rate, outcomes in sweep.tried.items()],
        "diverged": sum(outcome.diverged is not None for outcomes in sweep.tried.values() for outcome in outcomes),
    }


def _tables(by_rule: Mapping[str, Mapping[int, Sweep]], full: Sweep) -> str:
    lines = ["| arm | best learning rate | loss there | loss at the others, rising | diverged |", "|---|---|---|---|---|"]
    for name, sweep in [*((f"{rule}, rank {rank}", s) for rule, sweeps in by_rule.items() for rank, s in sweeps.items()), ("full", full)]:
        best = ratio_of(list(np.log2(best_rates(sweep))), ".3g") + (f", {sweep.edge} tried" if sweep.edge else "")
        means = {rate: -mean for rate, mean in sweep.means.items()}
        others = ", ".join(f"{rate:.3g} {mean:.3f}" for rate, mean in means.items() if rate != sweep.best)
        lost = sum(outcome.diverged is not None for outcomes in sweep.tried.values() for outcome in outcomes)
        lines.append(f"| {name} | {best} | {means[sweep.best]:.3f} | {others} | {lost} |")
    return "\n".join(lines) + "\n"


def _draw(by_rule: Mapping[str, Mapping[int, Sweep]], full: Sweep, path: Path) -> None:
    with picture(path, 9.6, 3.2) as figure:
        *losses, powers = figure.subplots(1, 3)
        for axes, (rule, sweeps) in zip(losses, by_rule.items(), strict=True):
            for place, (rank, sweep) in enumerate(sweeps.items()):
                shade = str(0.75 - 0.75 * place / len(sweeps))
                axes.plot(list(sweep.means), [-mean for mean in sweep.means.values()], color=shade, label=str(rank), linewidth=1)
            axes.plot(list(full.means), [-mean for mean in full.means.values()], color="#aa3377", linestyle="--", label="full", linewidth=1)
            across_learning_rates(axes)
            axes.set(yscale="log", ylabel="held-out loss", title=rule)
        losses[0].legend(title="rank", frameon=False, fontsize=7)
        for (rule, sweeps), colour in zip(by_rule.items(), ("#0066cc", "#cc5500"), strict=True):
            around = [t_interval(np.log2(best_rates(sweep))) for sweep in sweeps.values()]
            bars = [[2**one.value - 2**one.low for one in around], [2**one.high - 2**one.value for one in around]]
            powers.errorbar(list(sweeps), [2**one.value for one in around], yerr=bars, color=colour, marker="o", markersize=3, label=rule)
        powers.axhline(statistics.geometric_mean(best_rates(full)), color="#aa3377", linestyle="--", label="full")
        powers.set(xscale="log", yscale="log", xlabel="rank", ylabel="best learning rate")
        powers.legend(frameon=False, fontsize=7)
