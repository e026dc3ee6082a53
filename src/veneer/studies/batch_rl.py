"""Do adapters bear large batches of episodes less well than full fine-tuning? Batches of 32 and of 256, as many episodes in all.

What "LoRA Without Regret" finds of batches it finds in supervised training (https://thinkingmachines.ai/blog/lora/, figure 3; the study
``batch``), and nobody says so of reinforcement learning. Every arm has a learning rate of its own at both sizes, and plays as many
episodes: a larger batch makes fewer steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from veneer.studies.batches import Sizes, hold_contests
from veneer.studies.contest import Arm, Terms
from veneer.studies.lab import Lab
from veneer.studies.result import Result

QUESTION = "Do adapters bear large batches of episodes less well than full fine-tuning?"
CLAIMS = (13,)
EPISODES, GROUP = 2560, 8
SHARED: Mapping[str, Any] = {"env": {"name": "arithmetic"}, "eval": {"problems": 512, "every": 10**6}}


def work(batch: int) -> Mapping[str, Any]:
    """A batch is a step."""
    once = {"epochs": 1, "minibatches": 1, "refill": 0.0}
    return {"rl": {"groups_per_batch": batch // GROUP, "group_size": GROUP, "steps": EPISODES // batch, **once}}


SIZES = Sizes(
    batches=(32, 256),
    of="episodes",
    work=work,
    ranks=(8,),
    lora_rates=tuple(3.75e-4 * 2**k for k in range(6)),
    full_rates=tuple(3.75e-5 * 2**k for k in range(6)),
    margin=0.03,
    losses=False,
)


def arms() -> Sequence[Arm]:
    """In the smaller batches."""
    return SIZES.arms(SIZES.batches[0])


async def conduct(lab: Lab, terms: Terms) -> Result:
    """Raises:
    ConfigError: an override that cannot be applied, or is of what the study itself decides.
    Interrupted, VeneerError: as ``Lab.run``.
    """
    return await hold_contests(lab, SIZES, SHARED, terms)
