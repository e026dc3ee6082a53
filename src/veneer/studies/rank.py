"""How much rank does reinforcement learning need? Full fine-tuning beside adapters of rank 1, 4 and 32, on sums.

"LoRA Without Regret" finds that rank 1 reaches what full fine-tuning reaches, if each has the learning rate that suits it
(https://thinkingmachines.ai/blog/lora/, figure 6), and that this rate is about ten times as large; others, who gave all arms one learning
rate, find that it does not reach it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from veneer.studies.contest import Arm, Contest, Terms, hold_contest
from veneer.studies.contest_page import contest_result
from veneer.studies.lab import Lab
from veneer.studies.result import Finding, Result

QUESTION = "Does an adapter of rank 1 reach by reinforcement learning what full fine-tuning reaches?"
CLAIMS = (9, 11)
MARGIN = 0.03
RANKS = (1, 4, 32)
LORA_RATES = (3.75e-4, 7.5e-4, 1.5e-3, 3e-3, 6e-3)
FULL_RATES = (3.75e-5, 7.5e-5, 1.5e-4, 3e-4, 6e-4)
SHARED: Mapping[str, Any] = {
    "env": {"name": "arithmetic"},
    "rl": {"steps": 40, "groups_per_batch": 8, "group_size": 8},
    "eval": {"problems": 512, "every": 40},
}
"""40 steps of 64 episodes for every arm, and the same held-out problems."""


def arms() -> Sequence[Arm]:
    full = Arm("full", {"weights": "full"}, FULL_RATES)
    return [full, *(Arm(f"rank {rank}", {"lora": {"rank": rank}}, LORA_RATES) for rank in RANKS)]


async def conduct(lab: Lab, terms: Terms) -> Result:
    contest = await hold_contest(lab, SHARED, arms(), MARGIN, terms)
    return contest_result(contest, "{arm} beside {reference}, each at its best learning rate", _ratios(contest))


def _ratios(contest: Contest) -> list[Finding]:
    """The ratio of learning rates, as far as the grid can tell: a cell to either side."""
    full = contest.reference.sweep
    found = []
    for entrant in contest.entrants[1:]:
        ratio, factor = entrant.sweep.best / full.best, entrant.arm.rates[1] / entrant.arm.rates[0]
        edge = entrant.sweep.edge or full.edge
        cell = f"from {ratio / factor:.3g} to {ratio * factor:.3g} by the grid"
        cell += "; one of the two is the last that was tried" if edge else ""
        found.append(Finding(f"best learning rate of {entrant.arm.name} over that of full", f"{ratio:.3g}", cell))
    return found
