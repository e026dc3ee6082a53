"""Do adapters bear large batches less well than full fine-tuning? Batches of 8, 32 and 128 demonstrations, each for as many epochs.

"LoRA Without Regret" finds that the loss of adapters falls behind that of full fine-tuning as batches grow, whatever the rank
(https://thinkingmachines.ai/blog/lora/, figure 3); others find the best batch not always to be small (https://arxiv.org/abs/2602.09492).
Every arm has a learning rate of its own at every batch size, and all read each demonstration as often: a larger batch makes fewer steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.measure.verdict import compare_seeds, t_interval
from veneer.studies.contest import Arm, Contest, Terms, hold_contest, overridden
from veneer.studies.contest_page import contest_result
from veneer.studies.demonstrations import write_demonstrations
from veneer.studies.drawing import picture
from veneer.studies.lab import Lab
from veneer.studies.result import Finding, Result, joined

QUESTION = "Do adapters bear large batches less well than full fine-tuning?"
CLAIMS = (13,)
BATCHES: Sequence[int] = (8, 32, 128)
RANKS: Sequence[int] = (8, 64)
EPOCHS, ROWS, HELD_OUT = 6, 640, 0.2
MARGIN = 0.02
"""Of a loss in nats a token."""
LORA_RATES = tuple(5e-4 * 2**k for k in range(6))
FULL_RATES = tuple(5e-5 * 2**k for k in range(6))
SHARED: Mapping[str, Any] = {"kind": "sft", "sft": {"held_out": HELD_OUT}, "eval": {"every": 10**6}}


def arms(batch: int = BATCHES[0]) -> Sequence[Arm]:
    """That read the demonstrations EPOCHS times in batches of this size."""
    work = {"sft": {"batch_size": batch, "steps": round(EPOCHS * ROWS * (1 - HELD_OUT) / batch)}}
    thin = [Arm(f"rank {rank}", {"lora": {"rank": rank}, **work}, LORA_RATES) for rank in RANKS]
    return [Arm("full", {"weights": "full", **work}, FULL_RATES), *thin]


async def conduct(lab: Lab, terms: Terms) -> Result:
    data = write_demonstrations(lab.folder.parent / "data", ROWS, seed=0)
    shared = overridden({**SHARED, "sft": {**SHARED["sft"], "data": str(data)}}, arms(), terms)
    contests = {f"batches of {batch}": await hold_contest(lab, shared, arms(batch), MARGIN, terms) for batch in BATCHES}
    question = "{arm} beside {reference}, each at its best learning rate"
    results = {name: contest_result(contest, question) for name, contest in contests.items()}
    result = joined(results, _gaps(contests), lambda path: _draw(contests, path))
    return Result([*_trends(contests), *result.findings], result.tables, result.document, result.draw)


def gaps(contest: Contest) -> dict[str, list[float]]:
    """By arm and seed: its score less that of full fine-tuning."""
    full = contest.reference.scores
    return {e.arm.name: [score - other for score, other in zip(e.scores, full, strict=True)] for e in contest.entrants[1:]}


def _trends(contests: Mapping[str, Contest]) -> list[Finding]:
    """Whether what an adapter lacks is more at the largest batch than at the smallest."""
    names = list(contests)
    first, last = gaps(contests[names[0]]), gaps(contests[names[-1]])
    found = []
    for arm in first:
        comparison = compare_seeds(last[arm], first[arm], MARGIN)
        asked = f"{arm}: what it lacks beside full fine-tuning, in {names[-1]} beside {names[0]}"
        found.append(Finding(asked, comparison.said("shrinks", "grows"), comparison.numbers))
    return found


def _gaps(contests: Mapping[str, Contest]) -> str:
    """Markdown: how far each arm is from full fine-tuning, by batch."""
    first = next(iter(contests.values()))
    lines = ["| | " + " | ".join(e.arm.name for e in first.entrants[1:]) + " |", "|---" * len(first.entrants) + "|"]
    for name, contest in contests.items():
        lines.append(f"| {name} | " + " | ".join(str(t_interval(values)) for values in gaps(contest).values()) + " |")
    return "\n".join([*lines, "", "Scores, which are minus the held-out loss in nats a token, less those of full fine-tuning."]) + "\n"


def _draw(contests: Mapping[str, Contest], path: Path) -> None:
    with picture(path, 9.6, 3.0) as figure:
        *parts, last = figure.subplots(1, len(contests) + 1)
        colours = ("#555555", "#0066cc", "#cc5500")
        for axes, (name, contest) in zip(parts, contests.items(), strict=True):
            for entrant, colour in zip(contest.entrants, colours, strict=False):
                losses = [-mean for mean in entrant.sweep.means.values()]
                axes.plot(list(entrant.sweep.means), losses, color=colour, marker="o", markersize=3, label=entrant.arm.name)
            axes.set(xscale="log", yscale="log", xlabel="learning rate", title=name)
        parts[0].set_ylabel("held-out loss")
        parts[0].legend(frameon=False, fontsize=7)
        last.axhline(0, color=colours[0], linewidth=0.8)
        by_batch = [gaps(contest) for contest in contests.values()]
        for arm, colour in zip(by_batch[0], colours[1:], strict=False):
            means = [t_interval(found[arm]) for found in by_batch]
            bars = [[m.value - m.low for m in means], [m.high - m.value for m in means]]
            last.errorbar(BATCHES[: len(means)], [m.value for m in means], yerr=bars, color=colour, marker="o", markersize=3, capsize=3)
        last.set_xscale("log", base=2)
        last.set(xlabel="batch", ylabel="score less that of full")
