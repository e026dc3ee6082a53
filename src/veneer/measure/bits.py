"""How much a group of rewards can teach."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence


def reward_bits(rewards_G: Sequence[float]) -> float:
    """Bits that a group's rewards carry: G times the entropy of the rewards' own distribution in the group; 0 if all are equal.

    A plug-in estimate, biased low in small groups, of the bound on what a scalar-advantage policy gradient can learn from
    the group: I <= H(advantage) ("LoRA Without Regret", section on capacity, https://thinkingmachines.ai/blog/lora/).
    """
    total = len(rewards_G)
    return sum(count * math.log2(total / count) for count in Counter(rewards_G).values())
