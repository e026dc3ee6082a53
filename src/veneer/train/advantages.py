"""Rewards of groups to advantages, as pure functions in a table.

Every estimator is given the finished members of every group of a batch and gives an advantage for each of their turns:
axes [problem][finished member][turn]. All but ``turn`` give one number to a whole episode. Notation: ``r_i`` the reward of
member i of n, which includes what a grader of the group added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from veneer.train.choices import Settings, resolve
from veneer.types import RequestError, Trajectory, TrajectoryGroup

Group = Sequence[Trajectory]
"""The finished members of one problem."""
Advantages = list[list[list[float]] | None]
"""[problem][finished member][turn]; None: the group carries no signal, as all its advantages are zero, and is dropped."""
Estimator = Callable[[Sequence[Group], Settings], list[list[list[float]]]]

GRPO_EPSILON = 1e-4
"""TRL's, added to the deviation of a group."""
WHITEN_EPSILON = 1e-8
"""OpenRLHF's: the least variance of a batch."""


def is_constant(rewards_G: Sequence[float]) -> bool:
    """Whether a group carries no bits: one value, or fewer than two members."""
    return len(set(rewards_G)) < 2


def centred(rewards_G: Sequence[float]) -> list[float]:
    """r_i - mean(r); exactly 0 if all are the same."""
    if is_constant(rewards_G):
        return [0.0] * len(rewards_G)
    mean = sum(rewards_G) / len(rewards_G)
    return [reward - mean for reward in rewards_G]


def deviation(rewards_G: Sequence[float]) -> float:
    """Of a sample of at least two, with n - 1 below the sum: torch.std's default and TRL's."""
    return math.sqrt(sum(a * a for a in centred(rewards_G)) / (len(rewards_G) - 1))


def leave_one_out(rewards_G: Sequence[float], weights_G: Sequence[float]) -> list[float]:
    """r_i - sum_{j != i} w_j r_j / sum_{j != i} w_j."""
    if is_constant(rewards_G):
        return [0.0] * len(rewards_G)
    whole, total = sum(weights_G), sum(w * r for w, r in zip(weights_G, rewards_G, strict=True))
    return [r - (total - w * r) / (whole - w) for w, r in zip(weights_G, rewards_G, strict=True)]


# ---------------------------------------------------------------- one number an episode, from its group alone


def group_mean(groups: Sequence[Group], settings: Settings) -> list[list[list[float]]]:
    """r_i - mean(r), no division by the standard deviation (Dr. GRPO, https://arxiv.org/abs/2503.20783)."""
    return [_spread(group, centred(_rewards(group))) for group in groups]


def grpo(groups: Sequence[Group], settings: Settings) -> list[list[list[float]]]:
    """(r_i - mean(r)) / (std(r) + 1e-4) (https://arxiv.org/abs/2402.03300). The deviation has n - 1 below its sum, as in
    TRL's ``GRPOTrainer`` with ``scale_rewards="group"`` and in verl; the paper does not say."""

    def scaled(rewards_G: Sequence[float]) -> list[float]:
        return [a / (deviation(rewards_G) + GRPO_EPSILON) for a in centred(rewards_G)] if len(rewards_G) > 1 else [0.0] * len(rewards_G)

    return [_spread(group, scaled(_rewards(group))) for group in groups]


def rloo(groups: Sequence[Group], settings: Settings) -> list[list[list[float]]]:
    """r_i less the mean of the others: n / (n - 1) times ``group_mean`` (https://arxiv.org/abs/2402.14740). Unbiased."""
    return [_spread(group, leave_one_out(_rewards(group), [1.0] * len(group))) for group in groups]


def rloo_length(groups: Sequence[Group], settings: Settings) -> list[list[list[float]]]:
    """r_i less the mean of the others weighted by their lengths: r_i - sum_{j != i} l_j r_j / sum_{j != i} l_j, l the sampled tokens.

    The gradient of a whole episode's log-probability has a variance that grows with its length, so the baseline of least variance is
    E[l r] / E[l] rather than E[r] (OPO, https://arxiv.org/abs/2505.23585). OPO counts the member itself; leaving it out
    keeps the estimate unbiased, as prime-rl does with ``length_weighted_mean`` and ``leave_one_out``. What a token adds to the loss is
    not divided by a length here: that is ``normalise = "sequence_mean"``."""
    return [_spread(group, leave_one_out(_rewards(group), [float(max(1, tokens_of(t))) for t in group])) for group in groups]


def reinforce(groups: Sequence[Group], settings: Settings) -> list[list[list[float]]]:
    """r_i itself, compared with nothing (Williams 1992, https://doi.org/10.1007/BF00992696, with a baseline of 0). Unbiased, of the largest
    variance. With rewards 1 and 0 it learns from right answers alone: the "1-0 Reinforce" of RL's Razor
    (https://arxiv.org/abs/2509.04259)."""
    return [_spread(group, _rewards(group)) for group in groups]


def pass_at_k(groups: Sequence[Group], settings: Settings) -> list[list[list[float]]]:
    """What member i adds to the best of k: PKPO's s^(loo-1), times n as the loss is a mean over episodes.

    A_i = n / C(n, k) * sum over sets I of k members with i in it of (max_I r - max_{I without i} r): an unbiased estimate of the
    gradient of E[max of k rewards], with a baseline (https://arxiv.org/abs/2505.15201, "leave-one-out minus one"). For rewards 0 and 1
    this is pass@k: with c right, a right member has n C(n - c, k - 1) / C(n, k) and a wrong one 0. Never negative. Where fewer than k - 1
    are wrong, any others hold a right one, and there is nothing to gain. k = 1, which has no others to compare with, is ``rloo``. Of a
    group in which fewer than k finished all are one set."""
    k = int(settings["k"])
    if k != settings["k"] or k < 1:
        raise RequestError(f"advantage 'pass_at_k': setting 'k' must be a whole number from 1, and is {settings['k']:g}")
    return [_spread(group, _best_of(_rewards(group), min(k, len(group)))) for group in groups]


def _best_of(rewards_G: Sequence[float], k: int) -> list[float]:
    """With members sorted from worst to best, i gains r_i - r_j from every set in which j is the best of the others: C(j, k - 2) sets
    for the j-th (from 0) below i."""
    if k < 2:
        return leave_one_out(rewards_G, [1.0] * len(rewards_G))
    n = len(rewards_G)
    order = sorted(range(n), key=lambda i: rewards_G[i])
    found = [0.0] * n
    for at, i in enumerate(order):
        gains = (math.comb(j, k - 2) * (rewards_G[i] - rewards_G[order[j]]) for j in range(k - 2, at))
        found[i] = n / math.comb(n, k) * math.fsum(gains)
    return found


# ---------------------------------------------------------------- one number an episode, from the whole batch


def reinforce_plus_plus(groups: Sequence[Group], settings: Settings) -> list[list[list[float]]]:
    """(r - mean) / std over the whole batch, no group (https://arxiv.org/abs/2501.03262). Mean and variance are over sampled
    tokens, of which a longer episode has more, with the count below the sum and a variance of at least 1e-8, as in OpenRLHF; verl has
    the count less one. The paper's KL term is the penalty in the reward with discount 1."""
    return whitened(groups, [_rewards(group) for group in groups])


def reinforce_plus_plus_baseline(groups: Sequence[Group], settings: Settings) -> list[list[list[float]]]:
    """``group_mean``, then (A - mean) / std over the whole batch as in ``reinforce_plus_plus`` (REINFORCE++-baseline, same paper).
    Groups of one value have -mean / std, which is 0 where lengths do not go with rewards."""
    return whitened(groups, [centred(_rewards(group)) for group in groups])


def whitened(groups: Sequence[Group], values_PG: Sequence[Sequence[float]]) -> list[list[list[float]]]:
    """(v - mean) / std over the sampled tokens of the batch; 0 if all are the same."""
    counted = [(v, tokens_of(t)) for group, values in zip(groups, values_PG, strict=True) for v, t in zip(values, group, strict=True)]
    tokens = sum(count for _, count in counted)
    if is_constant([v for v, _ in counted]) or not tokens:
        return [_spread(group, [0.0] * len(group)) for group in groups]
    mean = math.fsum(v * count for v, count in counted) / tokens
    variance = math.fsum((v - mean) ** 2 * count for v, count in counted) / tokens
    scale = 1 / math.sqrt(max(variance, WHITEN_EPSILON))
    return [_spread(group, [(v - mean) * scale for v in values]) for group, values in zip(groups, values_PG, strict=True)]


# ---------------------------------------------------------------- a number for every turn


def turn(groups: Sequence[Group], settings: Settings) -> list[list[list[float]]]:
    """What came after: G_t = sum_{s >= t} discount^(s - t) r_s over the rewards of an episode's turns, less its mean over the members
    of the group that have a turn t. What the group's grader added counts at the last turn. A turn that only one member has is compared
    with nothing and gets 0. With discount 1, a reward at the end alone and as many turns in all members this is ``group_mean``.

    REINFORCE with a baseline for each time (Sutton and Barto, http://incompleteideas.net/book/the-book-2nd.html, section 13.4), over
    groups as in GRPO. Credit by turns for agents that call tools: https://arxiv.org/abs/2505.11821, whose own estimate is another."""
    discount = settings["discount"]
    if not 0 <= discount <= 1:
        raise RequestError(f"advantage 'turn': setting 'discount' must be from 0 to 1, and is {discount:g}")
    return [_by_turn([_to_go(t, discount) for t in group]) for group in groups]


def _to_go(trajectory: Trajectory, discount: float) -> list[float]:
    rewards_T = [turn.reward for turn in trajectory.transitions]
    after = trajectory.reward - sum(rewards_T)
    found: list[float] = []
    for reward in reversed(rewards_T):
        after = reward + after * (discount if found else 1.0)
        found.append(after)
    return found[::-1]


def _by_turn(values_GT: Sequence[Sequence[float]]) -> list[list[float]]:
    found: list[list[float]] = [[] for _ in values_GT]
    for t in range(max(map(len, values_GT), default=0)):
        have = [i for i, values in enumerate(values_GT) if t < len(values)]
        for i, advantage in zip(have, centred([values_GT[i][t] for i in have]), strict=True):
            found[i].append(advantage)
    return found


# ---------------------------------------------------------------- the table


ADVANTAGES: dict[str, tuple[Estimator, Settings]] = {
    "group_mean": (group_mean, {}),
    "grpo": (grpo, {}),
    "rloo": (rloo, {}),
    "rloo_length": (rloo_length, {}),
    "reinforce": (reinforce, {}),
    "reinforce_plus_plus": (reinforce_plus_plus, {}),
    "reinforce_plus_plus_baseline": (reinforce_plus_plus_baseline, {}),
    "pass_at_k": (pass_at_k, {"k": 4}),
    "turn": (turn, {"discount": 1.0}),
}
"""name -> (function, its settings with their defaults)."""


def resolve_advantage(name: str, config: Settings | None = None) -> tuple[Estimator, dict[str, float]]:
    """The function and its full settings.

    Raises:
        RequestError: an unknown estimator or setting, or a value that it cannot have.
    """
    function, settings = resolve("advantage", ADVANTAGES, name, config)
    function([], settings)  # says what is wrong with a setting
    return function, settings


def compute_advantages(groups_P: Sequence[TrajectoryGroup], name: str = "group_mean", config: Settings | None = None) -> Advantages:
    """Per group the advantages of its finished members; None for a group without signal, which is dropped.

    Raises:
        RequestError: as ``resolve_advantage``.
    """
    function, settings = resolve_advantage(name, config)
    found = function([[t for t in group.trajectories_G if t.error is None] for group in groups_P], settings)
    return [advantages if any(a for turns in advantages for a in turns) else None for advantages in found]


def tokens_of(trajectory: Trajectory) -> int:
    """How many were sampled."""
    return sum(len(turn.sample.tokens) for turn in trajectory.transitions)


def _rewards(group: Group) -> list[float]:
    return [trajectory.reward for trajectory in group]


def _spread(group: Group, advantages_G: Sequence[float]) -> list[list[float]]:
    """The same for every turn of a member."""
    return [[advantage] * len(t.transitions) for t, advantage in zip(group, advantages_G, strict=True)]
