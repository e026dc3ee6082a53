"""Which layers must an adapter reach? Attention, MLPs, both, each with and without the unembedding, at equal numbers of parameters.

"LoRA Without Regret" finds that adapters of the MLPs alone do what adapters of all layers do, and that adapters of attention alone fall
behind even with more parameters, in supervised training and in reinforcement learning (https://thinkingmachines.ai/blog/lora/, figures 4
and 5). Every arm here has the rank at which its number of parameters is nearest to that of all layers at rank 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from veneer.studies.contest import Arm, Contest, Terms, config_of, hold_contest, overridden, terms_for
from veneer.studies.contest_page import contest_result, draw_contest
from veneer.studies.demonstrations import write_demonstrations
from veneer.studies.drawing import picture
from veneer.studies.lab import Lab
from veneer.studies.result import Result, joined

QUESTION = "Does an adapter of the MLPs alone do what one of all layers does, and does one of attention alone fall behind?"
CLAIMS = (12,)
RANK = 5
"""Of the arm with all layers: the smallest at which every other can have about as many parameters on the bundled base."""
TARGETS: Mapping[str, Mapping[str, bool]] = {
    "all": {},
    "MLP": {"train_attn": False},
    "attention": {"train_mlp": False},
    "all and head": {"train_unembed": True},
    "MLP and head": {"train_attn": False, "train_unembed": True},
    "attention and head": {"train_mlp": False, "train_unembed": True},
}
NANO_RANKS: Mapping[str, int] = {"all": 5, "MLP": 7, "attention": 16, "all and head": 5, "MLP and head": 7, "attention and head": 13}
RATES = (3.75e-4, 7.5e-4, 1.5e-3, 3e-3, 6e-3)
ROWS = 500
"""Of which a fifth is held out."""
SHARED: Mapping[str, Any] = {
    "env": {"name": "arithmetic"},
    "rl": {"steps": 40, "groups_per_batch": 8, "group_size": 8},
    "eval": {"problems": 512, "every": 40},
}
SUPERVISED: Mapping[str, Any] = {"kind": "sft", "sft": {"steps": 60, "batch_size": 16, "held_out": 0.2}, "eval": {"every": 60}}
REWARDED, SHOWN = "by reward", "by demonstrations"
MARGINS = {REWARDED: 0.03, SHOWN: 0.02}
"""Of the share of held-out problems solved; of the held-out loss in nats a token."""


def arms(ranks: Mapping[str, int] = NANO_RANKS) -> Sequence[Arm]:
    """``ranks``: of each arm, by its name."""
    return [Arm(name, {"lora": {"rank": ranks[name], **targets}}, RATES) for name, targets in TARGETS.items()]


async def conduct(lab: Lab, terms: Terms) -> Result:
    data = write_demonstrations(lab.folder.parent / "data", ROWS, seed=0)
    ways = {REWARDED: SHARED, SHOWN: {**SUPERVISED, "sft": {**SUPERVISED["sft"], "data": str(data)}}}
    own = {way: terms_for(terms, settings.get("kind", "rl")) for way, settings in ways.items()}
    shared = {way: overridden(settings, arms(), own[way]) for way, settings in ways.items()}  # all of it is checked before any run
    counts = parameters(lab, shared[REWARDED])
    chosen = matched(counts)
    contests = {way: await hold_contest(lab, shared[way], arms(chosen), MARGINS[way], own[way]) for way in ways}
    question = "{arm} beside {reference}, with as many parameters, each at its best learning rate"
    results = {way: contest_result(contest, question) for way, contest in contests.items()}
    return joined(results, _sizes(counts, chosen), lambda path: _draw(contests, path))


def parameters(lab: Lab, shared: Mapping[str, Any]) -> dict[str, int]:
    """How many each arm has at rank 1."""
    thinnest = arms(dict.fromkeys(TARGETS, 1))
    return {arm.name: lab.trainable(config_of(shared, arm, arm.rates[0], 0)) for arm in thinnest}


def matched(counts: Mapping[str, int]) -> dict[str, int]:
    """The rank of every arm at which it has about as many parameters as all layers at RANK. ``counts``: at rank 1."""
    return {name: max(1, round(RANK * counts["all"] / count)) for name, count in counts.items()}


def _sizes(counts: Mapping[str, int], ranks: Mapping[str, int]) -> str:
    rows = [f"| {name} | {ranks[name]} | {ranks[name] * count:,} |" for name, count in counts.items()]
    return "\n".join(["| arm | rank | parameters |", "|---|---|---|", *rows]) + "\n"


def _draw(contests: Mapping[str, Contest], path: Path) -> None:
    with picture(path, 10.4, 6.4) as figure:
        grid = figure.add_gridspec(len(contests), 1)
        for row, (way, contest) in enumerate(contests.items()):
            part = figure.add_subfigure(grid[row])
            part.suptitle(way, fontsize=9)
            draw_contest(contest, part)
