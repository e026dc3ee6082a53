"""Do adapters of all ranks begin alike? The first steps of ranks 1 to 64 at one learning rate.

With W + (alpha / r) B A, alpha 32 and B = 0 the update is a mean over r terms that all begin with the same expected step, so early
learning curves should not depend on the rank ("LoRA Without Regret", https://thinkingmachines.ai/blog/lora/, section on
parametrisation): that is why one learning rate can suit all ranks. A start is a seed, of A and of the order of the rows, the same for all
ranks. What is compared is how much the first step takes off the held-out loss, and that loss behind the tenth; and how far first steps of a
rank scatter by their A, which is beside the widest rank on the same rows, whose terms are the most.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from veneer.measure.verdict import compare_seeds, t_interval
from veneer.studies.contest import Arm, Terms, config_of, overridden
from veneer.studies.demonstrations import write_demonstrations
from veneer.studies.drawing import picture
from veneer.studies.lab import Lab, Outcome
from veneer.studies.result import Finding, Result

QUESTION = "Do adapters of all ranks begin alike?"
CLAIMS = (6,)
RANKS: Sequence[int] = (1, 4, 16, 64)
REFERENCE = 16
WIDEST = RANKS[-1]
STARTS = 4
"""Starts for each seed that is asked for: twenty at five seeds."""
ROWS, STEPS = 500, 10
RATE = 5e-4
"""Half of the best one of long runs: a first step of Adam is as large as all its steps."""
DROP_MARGIN = 0.1
"""Of what the reference's first step takes off the loss, as a share."""
LOSS_MARGIN = 0.01
"""Of the held-out loss behind the tenth step, as a share."""
SHARED: Mapping[str, Any] = {
    "kind": "sft",
    "sft": {"steps": STEPS, "batch_size": 16, "held_out": 0.2},
    "eval": {"every": 1},
}


def starters() -> Sequence[Arm]:
    return [Arm(f"rank {rank}", {"lora": {"rank": rank}, "eval": SHARED["eval"]}, (RATE,)) for rank in RANKS]


async def conduct(lab: Lab, terms: Terms) -> Result:
    """Raises:
    ConfigError: an override that cannot be applied.
    Interrupted, VeneerError: as ``Lab.run``.
    """
    data = write_demonstrations(lab.folder.parent / "data", ROWS, seed=0)
    shared = overridden({**SHARED, "sft": {**SHARED["sft"], "data": str(data)}}, starters(), terms)
    starts = range(STARTS * terms.seeds)
    configs = [config_of(shared, arm, RATE, seed) for arm in starters() for seed in starts]
    outcomes = iter(await lab.run(configs))
    return early_result({rank: [next(outcomes) for _ in starts] for rank in RANKS})


# ---------------------------------------------------------------- what it says


def losses(outcome: Outcome) -> list[float]:
    """Held out, behind every step, the start first; those that a divergence leaves out are the start's."""
    found = {int(m["step"]): float(m["eval/mean_nll"]) for m in outcome.metrics if "eval/mean_nll" in m}
    return [found.get(step, found[0]) for step in range(outcome.config.sft.steps + 1)]


def early_result(outcomes: Mapping[int, Sequence[Outcome]]) -> Result:
    return curves_result({rank: np.array([losses(outcome) for outcome in found]) for rank, found in outcomes.items()})


def curves_result(curves: Mapping[int, np.ndarray]) -> Result:
    """``curves``: by rank [starts, steps + 1]."""
    drops = {rank: curve[:, 0] - curve[:, 1] for rank, curve in curves.items()}
    typical = float(drops[REFERENCE].mean())
    findings = []
    for rank in curves:
        if rank != REFERENCE:
            found = compare_seeds(drops[rank] / typical, drops[REFERENCE] / typical, DROP_MARGIN)
            asked = f"what the first step takes off the held-out loss: rank {rank} beside rank {REFERENCE}, as a share of the latter"
            findings.append(Finding(asked, found.said("more", "less"), found.numbers))
    last = {rank: curve[:, -1] for rank, curve in curves.items()}
    scale = float(last[REFERENCE].mean())
    for rank in curves:
        if rank != REFERENCE:
            found = compare_seeds(last[rank] / scale, last[REFERENCE] / scale, LOSS_MARGIN)
            asked = f"held-out loss behind {curves[rank].shape[1] - 1} steps: rank {rank} beside rank {REFERENCE}, as a share of the latter"
            findings.append(Finding(asked, found.said("higher", "lower"), found.numbers))
    findings.append(_scatter(drops, typical))
    document = {"curves": {str(rank): curve.tolist() for rank, curve in curves.items()}}
    return Result(findings, _tables(curves), document, lambda path: _draw(curves, path))


def _scatter(drops: Mapping[int, np.ndarray], typical: float) -> Finding:
    asked = "the power of the rank by which the first steps' scatter over A falls"
    spreads = {rank: float(np.std(drop - drops[WIDEST], ddof=1)) / typical for rank, drop in drops.items() if rank != WIDEST}
    told = ", ".join(f"{spread:.3f} at rank {rank}" for rank, spread in spreads.items())
    if not all(spreads.values()):
        return Finding(asked, "undecided", told)
    apart = [1 / (1 / rank + 1 / WIDEST) for rank in spreads]  # the widest scatters too
    power = float(np.polyfit(np.log2(apart), np.log2(list(spreads.values())), 1)[0])
    return Finding(asked, f"{power:+.2f}", f"-0.5 if its terms are independent; standard deviations as shares of the mean: {told}")


def _tables(curves: Mapping[int, np.ndarray]) -> str:
    lines = ["| rank | first step takes off | loss behind the last step |", "|---|---|---|"]
    for rank, curve in curves.items():
        cells = [t_interval(values) for values in (curve[:, 0] - curve[:, 1], curve[:, -1])]
        lines.append(f"| {rank} | {' | '.join(f'{m.value:.4f} [{m.low:.4f}, {m.high:.4f}]' for m in cells)} |")
    starts, start = next(iter(curves.values())).shape[0], statistics.fmean(curve[:, 0].mean() for curve in curves.values())
    return "\n".join([*lines, "", f"Nats a token, means over {starts} starts with 95% intervals; the loss begins at {start:.3f}."]) + "\n"


def _draw(curves: Mapping[int, np.ndarray], path: Path) -> None:
    with picture(path, 8.4, 3.2) as figure:
        left, right = figure.subplots(1, 2)
        for place, (rank, curve) in enumerate(curves.items()):
            shade = str(0.75 - 0.75 * place / len(curves))
            left.plot(range(curve.shape[1]), curve.mean(axis=0), color=shade, linewidth=1, label=str(rank))
            right.scatter([rank] * len(curve), curve[:, 0] - curve[:, 1], color=shade, s=10)
        left.set(xlabel="step", ylabel="held-out loss")
        left.legend(title="rank", frameon=False, fontsize=7)
        right.set(xscale="log", xlabel="rank", ylabel="what the first step takes off the loss")
