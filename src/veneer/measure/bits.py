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


def corrected_bits(rewards_G: Sequence[float]) -> float:
    """The same with less bias: G times Zhang's estimate of the entropy, the sum over values v of n_v / G times
    1 / n_v + 1 / (n_v + 1) + ... + 1 / (G - 1) nats (Zhang 2012, "Entropy estimation in Turing's perspective", Neural Computation
    24(5), taken up in https://doi.org/10.3390/e15061999).

    In the mean the entropy is missed by sum_v p_v sum_{k >= G} (1 - p_v)^k / k nats. That is less than Miller's correction of 1955,
    (values - 1) / 2 G nats, leaves of pass or fail; and still much where rewards are rarer than one in G: such a group mostly has
    one value.
    """
    total = len(rewards_G)
    nats = sum(count * math.fsum(1 / k for k in range(count, total)) for count in Counter(rewards_G).values())
    return nats / math.log(2)


# ---------------------------------------------------------------- pass or fail, from the chance of a reward


def entropy_bits(chance: float) -> float:
    """H(p): what a reward that is 1 with this chance and 0 otherwise can tell at most. 0 at p = 0 and 1, 1 at p = 1/2.

    Raises:
        ValueError: no chance.
    """
    if not 0 <= chance <= 1:
        raise ValueError(f"a chance of {chance}; it must be from 0 to 1")
    return -sum(p * math.log2(p) for p in (chance, 1 - chance) if p > 0) + 0.0  # no -0


def expected_reward_bits(chance: float, group_size: int) -> float:
    """The mean of ``reward_bits`` over groups whose members are each rewarded with this chance, exactly: the sum over the binomial
    distribution. Less than ``group_size`` H(p)."""
    rewards = ([1.0] * solved + [0.0] * (group_size - solved) for solved in range(group_size + 1))
    return math.fsum(_binomial(group_size, solved, chance) * reward_bits(group) for solved, group in enumerate(rewards))


def advantage_bits(chance: float, group_size: int) -> float:
    """The entropy of a group's centred advantages: G H(p) - s H(p^G / s), with s = p^G + (1 - p)^G the chance of a group without
    signal. Centring loses nothing but which of the two constant groups it was, so this is what a policy gradient can be told."""
    alike = [p for p in (chance**group_size, (1 - chance) ** group_size) if p > 0]
    return group_size * entropy_bits(chance) - sum(p * (math.log2(sum(alike)) - math.log2(p)) for p in alike)


def _binomial(trials: int, successes: int, chance: float) -> float:
    return math.comb(trials, successes) * chance**successes * (1 - chance) ** (trials - successes)
