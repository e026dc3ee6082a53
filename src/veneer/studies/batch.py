"""Do adapters bear large batches less well than full fine-tuning? Of demonstrations and of episodes, each arm given as many of them.

"LoRA Without Regret" finds that the loss of adapters falls behind that of full fine-tuning as batches grow, whatever the rank
(https://thinkingmachines.ai/blog/lora/, figure 3); others find the best batch not always to be small (https://arxiv.org/abs/2602.09492).
Both speak of supervised training; reinforcement learning is tried beside it. Every arm has a learning rate of its own at every batch size,
and all read each demonstration as often, or play as many episodes: a larger batch makes fewer steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.measure.verdict import compare_seeds, t_interval
from veneer.studies.contest import Arm, Contest, Terms, hold_contest, overridden, terms_for
from veneer.studies.contest_page import contest_result
from veneer.studies.demonstrations import write_demonstrations
from veneer.studies.drawing import picture
from veneer.studies.lab import Lab
from veneer.studies.result import Finding, Result, joined

QUESTION = "Do adapters bear large batches less well than full fine-tuning?"
CLAIMS = (13,)
EPOCHS, ROWS, HELD_OUT = 6, 640, 0.2
EPISODES, GROUP = 2560, 8
SHARED: Mapping[str, Any] = {"kind": "sft", "eval": {"every": 10**6}}
REWARDED: Mapping[str, Any] = {"env": {"name": "arithmetic"}, "eval": {"problems": 512, "every": 10**6}}
ONCE: Mapping[str, Any] = {"epochs": 1, "minibatches": 1, "refill": 0.0}
"""A batch of episodes is a step."""


@dataclass(frozen=True)
class Way:
    """Of training."""

    batches: Sequence[int]
    of: str
    kind: str
    ranks: Sequence[int]
    lora_rates: Sequence[float]
    full_rates: Sequence[float]
    margin: float
    """Of a loss in nats a token; of the reward on held-out problems."""

    def named(self, batch: int) -> str:
        return f"batches of {batch} {self.of}"

    def work(self, batch: int) -> Mapping[str, Any]:
        """Settings with which a batch of this size is trained on, as often as any other."""
        if self.kind == "sft":
            steps = round(EPOCHS * ROWS * (1 - HELD_OUT) / batch)
            return {"sft": {"batch_size": batch, "steps": steps, "held_out": HELD_OUT}}
        return {"rl": {"groups_per_batch": batch // GROUP, "group_size": GROUP, "steps": EPISODES // batch, **ONCE}}


WAYS: Sequence[Way] = (
    Way((8, 32, 128), "demonstrations", "sft", (8, 64), tuple(5e-4 * 2**k for k in range(6)), tuple(5e-5 * 2**k for k in range(6)), 0.02),
    Way((32, 256), "episodes", "rl", (8,), tuple(3.75e-4 * 2**k for k in range(6)), tuple(3.75e-5 * 2**k for k in range(6)), 0.03),
)


def arms(way: Way = WAYS[0], batch: int | None = None) -> Sequence[Arm]:
    """``batch``: None: the smallest."""
    work = way.work(way.batches[0] if batch is None else batch)
    thin = [Arm(f"rank {rank}", {"lora": {"rank": rank}, **work}, way.lora_rates) for rank in way.ranks]
    return [Arm("full", {"weights": "full", **work}, way.full_rates), *thin]


async def conduct(lab: Lab, terms: Terms) -> Result:
    """Raises:
    ConfigError: an override that cannot be applied, or is of what the study itself decides.
    Interrupted, VeneerError: as ``Lab.run``.
    """
    data = write_demonstrations(lab.folder.parent / "data", ROWS, seed=0)
    by_kind = {"sft": {**SHARED, "sft": {"data": str(data)}}, "rl": REWARDED}
    own = {way: terms_for(terms, way.kind) for way in WAYS}
    shared = {way: overridden(by_kind[way.kind], arms(way), own[way]) for way in WAYS}  # all of it is checked before any run
    contests = {
        way: {batch: await hold_contest(lab, shared[way], arms(way, batch), way.margin, own[way]) for batch in way.batches} for way in WAYS
    }
    question = "{arm} beside {reference}, each at its best learning rate"
    results = {way.named(batch): contest_result(contest, question) for way, held in contests.items() for batch, contest in held.items()}
    result = joined(results, _gaps(contests), lambda path: _draw(contests, path))
    trends = [finding for way, held in contests.items() for finding in _trends(way, held)]
    return Result([*trends, *result.findings], result.tables, result.document, result.draw)


def gaps(contest: Contest) -> dict[str, list[float]]:
    """By arm and seed: its score less that of full fine-tuning."""
    full = contest.reference.scores
    return {e.arm.name: [score - other for score, other in zip(e.scores, full, strict=True)] for e in contest.entrants[1:]}


def _trends(way: Way, contests: Mapping[int, Contest]) -> list[Finding]:
    """Whether what an adapter lacks is more at the largest batch than at the smallest."""
    small, large = min(contests), max(contests)
    first, last = gaps(contests[small]), gaps(contests[large])
    found = []
    for arm in first:
        comparison = compare_seeds(last[arm], first[arm], way.margin)
        asked = f"{arm}: what it lacks beside full fine-tuning, in {way.named(large)} beside {small}"
        found.append(Finding(asked, comparison.said("shrinks", "grows"), comparison.numbers))
    return found


def _gaps(contests: Mapping[Way, Mapping[int, Contest]]) -> str:
    """Markdown: how far each arm is from full fine-tuning, by batch."""
    lines = ["| | arm | score less that of full |", "|---|---|---|"]
    for way, held in contests.items():
        for batch, contest in held.items():
            lines += [f"| {way.named(batch)} | {arm} | {t_interval(values)} |" for arm, values in gaps(contest).items()]
    lines += [
        "",
        "Scores are minus the held-out loss in nats a token of demonstrations, and the reward on held-out problems of episodes.",
    ]
    return "\n".join(lines) + "\n"


def _draw(contests: Mapping[Way, Mapping[int, Contest]], path: Path) -> None:
    """A row for each way: scores by learning rate for every batch, and what adapters lack."""
    colours = ("#555555", "#0066cc", "#cc5500")
    with picture(path, 11.4, 5.6) as figure:
        grid = figure.subplots(len(contests), 1 + max(map(len, contests.values())), squeeze=False)
        for row, (way, held) in zip(grid, contests.items(), strict=True):
            *parts, last = row
            for axes in parts[len(held) :]:
                axes.axis("off")
            for axes, (batch, contest) in zip(parts, held.items(), strict=False):
                for entrant, colour in zip(contest.entrants, colours, strict=False):
                    scores = [-mean if way.kind == "sft" else mean for mean in entrant.sweep.means.values()]
                    axes.plot(list(entrant.sweep.means), scores, color=colour, marker="o", markersize=3, label=entrant.arm.name)
                axes.set(xscale="log", xlabel="learning rate", title=way.named(batch))
            parts[0].set_ylabel("held-out loss" if way.kind == "sft" else "reward on held-out problems")
            parts[0].set_yscale("log" if way.kind == "sft" else "linear")
            parts[0].legend(frameon=False, fontsize=7)
            last.axhline(0, color=colours[0], linewidth=0.8)
            for arm, colour in zip(gaps(held[min(held)]), colours[1:], strict=False):
                means = [t_interval(gaps(contest)[arm]) for contest in held.values()]
                bars = [[m.value - m.low for m in means], [m.high - m.value for m in means]]
                last.errorbar(list(held), [m.value for m in means], yerr=bars, color=colour, marker="o", markersize=3, capsize=3)
            last.set_xscale("log", base=2)
            last.set(xlabel="batch", ylabel="score less that of full")
