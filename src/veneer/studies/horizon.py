"""Does the best learning rate depend on how long a run is? Supervised training of rank 16 and of all weights, at three lengths.

Short runs are said to want a larger ratio between the rates of adapters and of full fine-tuning, about 15 in place of 10, as B begins at
zero and has to grow first ("LoRA Without Regret", https://thinkingmachines.ai/blog/lora/, section on the learning rate, an anecdote
there). The rate is constant, so a run of the longest length is a run of each shorter one until then: the lengths are compared within the
same runs. The best rate of each seed and length is found between the points of the grid, as in the study of learning rates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from veneer.measure.verdict import compare_seeds, t_interval
from veneer.studies.contest import Arm, Sweep, Terms, overridden, peak, sweep_all, thinned
from veneer.studies.demonstrations import write_demonstrations
from veneer.studies.drawing import across_learning_rates, picture
from veneer.studies.lab import Lab, Outcome
from veneer.studies.result import Finding, Result, ratio_of

QUESTION = "Is the best learning rate of an adapter further above that of full fine-tuning in short runs than in long ones?"
CLAIMS = (10,)
LENGTHS: Sequence[int] = (30, 120, 480)
ROWS = 4000
"""So many that the longest run reads none of them three times: what is compared is learning, not how soon rows are known by heart."""
MARGIN = 0.5
"""Of a ratio of ratios, as a logarithm to base 2: a factor of 1.4."""
LORA_RATES = tuple(2.5e-4 * 2**k for k in range(8))
FULL_RATES = tuple(2.5e-5 * 2**k for k in range(8))
SHARED: Mapping[str, Any] = {
    "kind": "sft",
    "sft": {"steps": LENGTHS[-1], "batch_size": 16, "held_out": 0.05},
    "eval": {"every": LENGTHS[0]},
}


def arms() -> Sequence[Arm]:
    often = {"eval": SHARED["eval"]}
    return [Arm("rank 16", {"lora": {"rank": 16}, **often}, LORA_RATES), Arm("full", {"weights": "full", **often}, FULL_RATES)]


async def conduct(lab: Lab, terms: Terms) -> Result:
    """Raises:
    ConfigError: an override that cannot be applied.
    Interrupted, VeneerError: as ``Lab.run``.
    """
    data = write_demonstrations(lab.folder.parent / "data", ROWS, seed=0)
    shared = overridden({**SHARED, "sft": {**SHARED["sft"], "data": str(data)}}, arms(), terms)
    thin, full = await sweep_all(lab, shared, thinned(arms(), terms), terms.seeds)
    lengths = sorted({int(m["step"]) for m in cast(Outcome, next(iter(thin.tried.values()))[0]).metrics if "eval/mean_nll" in m} - {0})
    wanted = [length for length in LENGTHS if length in lengths] or lengths
    return horizon_result({"rank 16": _by_length(thin, wanted), "full": _by_length(full, wanted)})


Losses = Mapping[int, Mapping[float, Sequence[float]]]
"""By length and learning rate: the held-out loss of each seed."""


def _by_length(sweep: Sweep, lengths: Sequence[int]) -> Losses:
    def loss(outcome: Outcome, length: int) -> float:
        found = {int(m["step"]): float(m["eval/mean_nll"]) for m in outcome.metrics if "eval/mean_nll" in m}
        return found.get(length, found[0])  # of one that diverged before, that of the start

    return {n: {rate: [loss(cast(Outcome, o), n) for o in tried] for rate, tried in sweep.tried.items()} for n in lengths}


# ---------------------------------------------------------------- what it says


def best_rates(losses: Mapping[float, Sequence[float]]) -> list[float]:
    """Of each seed."""
    return [peak(list(losses), [-loss for loss in by_rate]) for by_rate in zip(*losses.values(), strict=True)]


def horizon_result(arms: Mapping[str, Losses]) -> Result:
    """``arms``: the adapter first, full fine-tuning second."""
    thin, full = arms.values()
    ratios = {n: np.log2(best_rates(thin[n])) - np.log2(best_rates(full[n])) for n in thin}
    shortest, longest = min(ratios), max(ratios)
    findings = []
    for n, ratio in ratios.items():
        told = t_interval(ratio)
        numbers = f"{ratio_of(list(ratio))}{_edge(arms, n)}"
        findings.append(Finding(f"best learning rate of rank 16 over that of full, after {n} steps", f"{2**told.value:.1f}", numbers))
    found, logs = compare_seeds(ratios[shortest], ratios[longest], MARGIN), list(ratios[shortest] - ratios[longest])
    asked = f"that ratio after {shortest} steps, over that after {longest}"
    findings.append(
        Finding(
            asked,
            found.said("larger", "smaller"),
            f"{ratio_of(logs, '.2f')}, margin a factor of {2**MARGIN:.2g}{found.wanted}",
        )
    )
    document = {
        arm: {
            str(n): {"best_rates": best_rates(by_rate), "losses": {f"{r:.6g}": list(v) for r, v in by_rate.items()}}
            for n, by_rate in by.items()
        }
        for arm, by in arms.items()
    }
    return Result(findings, _tables(arms), {"arms": document}, lambda path: _draw(arms, path))


def _edge(arms: Mapping[str, Losses], length: int) -> str:
    """Whether a best rate is the last that was tried."""
    found = []
    for arm, by_length in arms.items():
        means = {rate: sum(losses) for rate, losses in by_length[length].items()}
        best = min(means, key=lambda rate: means[rate])
        side = "lowest" if best == min(means) else "highest" if best == max(means) else ""
        found += [f"{arm} at the {side} tried"] if side else []
    return "".join(f"; {one}" for one in found)


def _tables(arms: Mapping[str, Losses]) -> str:
    lines = ["| arm | steps | best learning rate | loss at each, rising |", "|---|---|---|---|"]
    for arm, by_length in arms.items():
        for n, by_rate in by_length.items():
            best = ratio_of(list(np.log2(best_rates(by_rate))), ".3g")
            losses = ", ".join(f"{rate:.3g} {sum(values) / len(values):.3f}" for rate, values in by_rate.items())
            lines.append(f"| {arm} | {n} | {best} | {losses} |")
    return "\n".join([*lines, "", "Held-out losses in nats a token, means over seeds; best rates with 95% intervals."]) + "\n"


def _draw(arms: Mapping[str, Losses], path: Path) -> None:
    with picture(path, 8.4, 3.2) as figure:
        left, right = figure.subplots(1, 2)
        for (arm, by_length), colour in zip(arms.items(), ("#0066cc", "#aa3377"), strict=True):
            for place, (n, by_rate) in enumerate(by_length.items()):
                means = [sum(values) / len(values) for values in by_rate.values()]
                left.plot(list(by_rate), means, color=colour, alpha=(place + 1) / len(by_length), linewidth=1, label=f"{arm}, {n} steps")
            told = [t_interval(np.log2(best_rates(by_rate))) for by_rate in by_length.values()]
            bars = [[2**m.value - 2**m.low for m in told], [2**m.high - 2**m.value for m in told]]
            right.errorbar(
                list(by_length), [2**m.value for m in told], yerr=bars, color=colour, marker="o", markersize=3, capsize=3, label=arm
            )
        across_learning_rates(left)
        left.set(yscale="log", ylabel="held-out loss")
        left.legend(frameon=False, fontsize=6)
        right.set(xscale="log", yscale="log", xlabel="steps", ylabel="best learning rate")
        right.set_xticks(list(next(iter(arms.values()))), [str(n) for n in next(iter(arms.values()))], minor=False)
        right.set_xticks([], minor=True)
        right.legend(frameon=False, fontsize=7)
