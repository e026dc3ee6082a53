"""Do adapters bear large batches less well than full fine-tuning? Batches of 8, 32 and 128 demonstrations, each for as many epochs.

"LoRA Without Regret" finds that the loss of adapters falls behind that of full fine-tuning as batches grow, whatever the rank
(https://thinkingmachines.ai/blog/lora/, figure 3); others find the best batch not always to be small (https://arxiv.org/abs/2602.09492).
Every arm has a learning rate of its own at every batch size, and all read each demonstration as often: a larger batch makes fewer steps.
Reinforcement learning is the study ``batch_rl``'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from veneer.studies.batches import Sizes, hold_contests
from veneer.studies.contest import Arm, Terms
from veneer.studies.demonstrations import write_demonstrations
from veneer.studies.lab import Lab
from veneer.studies.result import Result

QUESTION = "Do adapters bear large batches less well than full fine-tuning?"
CLAIMS = (13,)
COARSE = "every second learning rate, the outermost batches"
EPOCHS, ROWS, HELD_OUT = 6, 640, 0.2
SHARED: Mapping[str, Any] = {"kind": "sft", "eval": {"every": 10**6}}


def work(batch: int) -> Mapping[str, Any]:
    steps = round(EPOCHS * ROWS * (1 - HELD_OUT) / batch)
    return {"sft": {"batch_size": batch, "steps": steps, "held_out": HELD_OUT}}


SIZES = Sizes(
    batches=(8, 32, 128),
    of="demonstrations",
    work=work,
    ranks=(8, 64),
    lora_rates=tuple(5e-4 * 2**k for k in range(6)),
    full_rates=tuple(5e-5 * 2**k for k in range(6)),
    margin=0.02,
    losses=True,
)


def arms() -> Sequence[Arm]:
    """In the smallest batches."""
    return SIZES.arms(SIZES.batches[0])


async def conduct(lab: Lab, terms: Terms) -> Result:
    """Raises:
    ConfigError: an override that cannot be applied, or is of what the study itself decides.
    Interrupted, VeneerError: as ``Lab.run``.
    """
    data = write_demonstrations(lab.folder.parent / "data", ROWS, seed=0)
    return await hold_contests(lab, SIZES, {**SHARED, "sft": {"data": str(data)}}, terms)
