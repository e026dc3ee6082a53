"""Every estimator of advantages: by hand, unbiased where it says so by adding up all that could be sampled, and properties."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.train.advantages import ADVANTAGES, centred, compute_advantages, is_constant, resolve_advantage
from veneer.types import RequestError, Sample, Trajectory, TrajectoryGroup, Transition

REWARDS = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=16)
SHORT = st.lists(st.floats(-10, 10).map(lambda x: round(x, 3)), min_size=1, max_size=7)


def episode(rewards_T: Sequence[float], tokens: int = 1, extra: float = 0.0, error: str | None = None) -> Trajectory:
    """A turn for each reward, of so many sampled tokens each; ``extra``: what a grader of the group added."""
    array = np.zeros(tokens)
    sample = Sample(array.astype(np.int64), array.astype(np.float32), "stop", "base", None)
    turns = [Transition(np.array([1]), sample, {"role": "assistant", "content": ""}, reward) for reward in rewards_T]
    return Trajectory(turns, sum(rewards_T) + extra, error)


def group(rewards_G: Sequence[float], lengths_G: Sequence[int] | None = None) -> TrajectoryGroup:
    """Episodes of one turn."""
    lengths = lengths_G or [1] * len(rewards_G)
    return TrajectoryGroup(0, [episode([r], n) for r, n in zip(rewards_G, lengths, strict=True)])


def advantages(rewards_PG: Sequence[Sequence[float]], name: str, lengths_PG: Sequence[Sequence[int]] | None = None, **config: float):
    """Per group a number for each episode, or None."""
    groups = [group(rewards, lengths_PG[i] if lengths_PG else None) for i, rewards in enumerate(rewards_PG)]
    return [None if found is None else [a for (a,) in found] for found in compute_advantages(groups, name, config)]


# ---------------------------------------------------------------- by hand


def test_group_mean_by_hand() -> None:
    """Mean 1/4. Dividing by the deviation would favour the groups that are nearly all right or all wrong."""
    assert advantages([[1, 0, 0, 0]], "group_mean") == [[0.75, -0.25, -0.25, -0.25]]
    assert compute_advantages([group([1, 0])]) == [[[0.5], [-0.5]]], "the default"


def test_grpo_by_hand() -> None:
    """Mean 1/4, squares 9/16 + 3/16 = 3/4, over n - 1 = 3 is 1/4, deviation 1/2: 0.75 / 0.5001 and -0.25 / 0.5001."""
    assert advantages([[1, 0, 0, 0]], "grpo") == [pytest.approx([0.75 / 0.5001, *[-0.25 / 0.5001] * 3])]


def test_rloo_by_hand() -> None:
    """3 against (0 + 6) / 2 = 3; 0 against 4.5; 6 against 1.5."""
    assert advantages([[3, 0, 6]], "rloo") == [[0.0, -4.5, 4.5]]


def test_rloo_length_by_hand() -> None:
    """Lengths 1, 2, 3: 3 against (0 * 2 + 6 * 3) / 5 = 3.6; 0 against (3 * 1 + 6 * 3) / 4 = 5.25; 6 against (3 * 1) / 3 = 1."""
    assert advantages([[3, 0, 6]], "rloo_length", [[1, 2, 3]]) == [pytest.approx([-0.6, -5.25, 5.0])]


def test_reinforce_compares_with_nothing() -> None:
    """A group that was right throughout is learned from; one that earned nothing is dropped."""
    assert advantages([[1, 0, 0.5], [1, 1], [0, 0]], "reinforce") == [[1, 0, 0.5], [1, 1], None]


def test_reinforce_plus_plus_by_hand() -> None:
    """Tokens: 1 with reward 1, 3 with reward 0, and 4 with reward 1 in another group. Mean 5/8, variance 15/64. A group of one value has
    advantages too: nothing is compared within groups."""
    scale = 1 / math.sqrt(15 / 64)
    found = advantages([[1, 0], [1]], "reinforce_plus_plus", [[1, 3], [4]])
    assert found == [pytest.approx([3 / 8 * scale, -5 / 8 * scale]), pytest.approx([3 / 8 * scale])]


def test_reinforce_plus_plus_baseline_by_hand() -> None:
    """Centred: 1/2 on 1 token, -1/2 on 3, and 0 on 4 in a group of one value. Mean -1/8; variance 1/4 * 4/8 - 1/64 = 7/64."""
    scale = 1 / math.sqrt(7 / 64)
    found = advantages([[1, 0], [5, 5]], "reinforce_plus_plus_baseline", [[1, 3], [2, 2]])
    assert found == [pytest.approx([5 / 8 * scale, -3 / 8 * scale]), pytest.approx([1 / 8 * scale] * 2)]


def test_pass_at_k_by_hand() -> None:
    """n = 4, k = 2, one right: it makes 3 of 6 pairs right that would be wrong without it: 4 * 3/6 = 2. With three right, each makes
    one: 4 * 1/6. With rewards 0, 1, 3 and k = 2: the best gains 3 and 2, the middle 1, times 3 / 3."""
    assert advantages([[0, 1, 0, 0]], "pass_at_k", k=2) == [[0, 2, 0, 0]]
    assert advantages([[1, 1, 0, 1]], "pass_at_k", k=2) == [pytest.approx([4 / 6, 4 / 6, 0, 4 / 6])]
    assert advantages([[1, 0, 3]], "pass_at_k", k=2) == [[1, 0, 5]]


def test_pass_at_k_of_a_group_that_cannot_fail_is_dropped() -> None:
    """Three right of four: with any two others there is a right one already. With two right each makes one of 4 sets right: 4 * 1/4."""
    assert advantages([[1, 1, 1, 0], [1, 1, 0, 0]], "pass_at_k", k=3) == [None, [1, 1, 0, 0]]


def test_pass_at_1_is_rloo() -> None:
    assert advantages([[3, 0, 6]], "pass_at_k", k=1) == [[0.0, -4.5, 4.5]]


def test_pass_at_k_of_fewer_than_k_that_finished_is_of_all_of_them() -> None:
    """Two of four failed; pass@4 of the rest is pass@2: one set, which the right one makes right: 2 * 1."""
    failed = episode([0], error="no")
    found = compute_advantages([TrajectoryGroup(0, [episode([1]), failed, episode([0]), failed])], "pass_at_k", {"k": 4})
    assert found == [[[2.0], [0.0]]]


def test_turn_by_hand() -> None:
    """Discount 1/2. First: rewards 1, 2 and 1 from the grader, at the end: to go 1 + 3/2 = 2.5 and 3. Second: one turn with reward 0.5.
    Third: 0 and 1: to go 0.5 and 1. Means: 3.5 / 3 over all at turn 1, 2 over those that have a turn 2."""
    members = [episode([1, 2], extra=1), episode([0.5]), episode([0, 1])]
    (found,) = compute_advantages([TrajectoryGroup(0, members)], "turn", {"discount": 0.5})
    assert found is not None
    assert found[0] == pytest.approx([2.5 - 3.5 / 3, 1.0])
    assert found[1] == pytest.approx([0.5 - 3.5 / 3])
    assert found[2] == pytest.approx([0.5 - 3.5 / 3, -1.0])


def test_a_turn_that_one_member_has_is_compared_with_nothing() -> None:
    """Its reward counts at the turns before."""
    (found,) = compute_advantages([TrajectoryGroup(0, [episode([0, 4]), episode([0])])], "turn")
    assert found == [[2.0, 0.0], [-2.0]]


def test_turns_that_cancel_still_carry_a_signal() -> None:
    """Both episodes earn 1, in another order: as wholes they are equal, turn by turn they are not."""
    members = [episode([1, 0]), episode([0, 1])]
    assert compute_advantages([TrajectoryGroup(0, members)], "group_mean") == [None]
    assert compute_advantages([TrajectoryGroup(0, members)], "turn") == [[[0.0, -0.5], [0.0, 0.5]]]


def test_one_number_stands_on_every_turn() -> None:
    found = compute_advantages([TrajectoryGroup(0, [episode([1, 1, 1]), episode([1])])], "group_mean")
    assert found == [[[1.0, 1.0, 1.0], [-1.0]]]


@pytest.mark.parametrize("name", ADVANTAGES)
def test_failed_members_take_no_part(name: str) -> None:
    """A crashed grader's 0 must not lower the others' baseline."""
    members = [episode([1], 2), episode([0], 3), episode([0.5], 4)]
    whole = [TrajectoryGroup(0, members), group([1, 0, 0, 0])]
    torn = [TrajectoryGroup(0, [members[0], episode([7], error="no"), *members[1:]]), whole[1]]
    assert compute_advantages(torn, name) == compute_advantages(whole, name)
    assert compute_advantages([TrajectoryGroup(0, [episode([1], error="no")]), *whole], name)[0] is None


# ---------------------------------------------------------------- unbiased


def expected_gradient(name: str, n: int, lengths: Sequence[int], rewards: Sequence[float], **config: float) -> torch.Tensor:
    """E[(1/n) sum_i A_i d log p(x_i) / d logits] over all groups of n draws from three outcomes, exactly."""
    logits = torch.tensor([0.3, -0.4, 0.1], dtype=torch.float64, requires_grad=True)
    log_p = logits.log_softmax(0)
    p = log_p.detach().exp()
    slopes = [torch.autograd.grad(log_p[x], logits, retain_graph=True)[0] for x in range(3)]
    total = torch.zeros(3, dtype=torch.float64)
    for draws in itertools.product(range(3), repeat=n):
        (found,) = advantages([[rewards[x] for x in draws]], name, [[lengths[x] for x in draws]], **config)
        for x, a in zip(draws, found or [0.0] * n, strict=True):
            total += float(p[list(draws)].prod()) * a / n * slopes[x]
    return total


def gradient_of_the_best(k: int, rewards: Sequence[float]) -> torch.Tensor:
    """d E[max of k rewards] / d logits, exactly."""
    logits = torch.tensor([0.3, -0.4, 0.1], dtype=torch.float64, requires_grad=True)
    p = logits.softmax(0)
    total = torch.zeros((), dtype=torch.float64)
    for draws in itertools.product(range(3), repeat=k):
        total = total + p[list(draws)].prod() * max(rewards[x] for x in draws)
    return torch.autograd.grad(total, logits)[0]


@pytest.mark.parametrize(
    ("name", "config", "k", "scale"),
    [
        ("rloo", {}, 1, 1.0),
        ("rloo_length", {}, 1, 1.0),
        ("reinforce", {}, 1, 1.0),
        ("group_mean", {}, 1, 3 / 4),  # the known bias: 1 - 1/n
        *(("pass_at_k", {"k": k}, k, 1.0) for k in (1, 2, 3, 4)),
    ],
)
def test_the_expected_gradient_is_that_of_the_objective(name: str, config: dict, k: int, scale: float) -> None:
    """Over every group of four that could be drawn, of lengths 1, 3 and 2: what the estimator climbs is what it says."""
    rewards, lengths = [0.0, 1.0, 0.25], [1, 3, 2]
    found = expected_gradient(name, 4, lengths, rewards, **config)
    torch.testing.assert_close(found, scale * gradient_of_the_best(k, rewards), atol=1e-12, rtol=1e-12)


# ---------------------------------------------------------------- properties


@given(rewards=REWARDS)
def test_centred_rewards_sum_to_zero_and_keep_the_order(rewards: list[float]) -> None:
    """A group's advantages that do not cancel push all of its answers up or down."""
    found = centred(rewards)
    assert len(found) == len(rewards)
    assert abs(math.fsum(found)) < 1e-9 * max(1, max(map(abs, rewards))) * len(rewards)
    for i in range(len(rewards) - 1):
        low, high = sorted((i, i + 1), key=lambda k: rewards[k])
        assert found[low] <= found[high]


@pytest.mark.parametrize(("rewards", "constant"), [([], True), ([1.0], True), ([0.5, 0.5], True), ([0.0, -0.0], True), ([0.0, 1.0], False)])
def test_is_constant(rewards: list[float], constant: bool) -> None:
    """Groups without two different rewards carry no bits."""
    assert is_constant(rewards) is constant


BATCH = st.lists(st.lists(st.tuples(st.floats(-10, 10).map(lambda x: round(x, 3)), st.integers(1, 9)), min_size=1, max_size=6), max_size=4)


@pytest.mark.parametrize("name", ADVANTAGES)
@settings(deadline=None, max_examples=30)
@given(batch=BATCH, data=st.data())
def test_order_and_a_constant_do_not_matter(name: str, batch: list[list[tuple[float, int]]], data: st.DataObject) -> None:
    """Members and groups in another order have the same advantages, and adding a number to every reward changes none, unless rewards are
    compared with nothing."""

    def of(groups: list[list[tuple[float, int]]], shift: float = 0.0) -> list[list[float]]:
        found = advantages([[r + shift for r, _ in g] for g in groups], name, [[n for _, n in g] for g in groups])
        return [[0.0] * len(g) if a is None else a for g, a in zip(groups, found, strict=True)]

    wanted = of(batch)
    order = data.draw(st.permutations(range(len(batch))))
    within = [data.draw(st.permutations(range(len(g)))) for g in batch]
    found = of([[batch[i][j] for j in within[i]] for i in order])
    for at, i in enumerate(order):
        assert found[at] == pytest.approx([wanted[i][j] for j in within[i]], abs=1e-6)
    moved = 2.5 if name == "reinforce" else 0.0
    for ours, theirs in zip(of(batch, 2.5), wanted, strict=True):
        assert ours == pytest.approx([a + moved for a in theirs], abs=1e-6)


@pytest.mark.parametrize("name", ["group_mean", "grpo", "rloo", "turn"])
@settings(deadline=None)
@given(rewards=SHORT)
def test_advantages_of_a_group_cancel(name: str, rewards: list[float]) -> None:
    (found,) = advantages([rewards], name)
    assert found is None or abs(math.fsum(found)) < 1e-6


@pytest.mark.parametrize("name", ["reinforce_plus_plus", "reinforce_plus_plus_baseline"])
@settings(deadline=None)
@given(batch=BATCH)
def test_a_whitened_batch_has_mean_0_and_variance_1_over_tokens(name: str, batch: list[list[tuple[float, int]]]) -> None:
    found = advantages([[r for r, _ in g] for g in batch], name, [[n for _, n in g] for g in batch])
    values = [(a, n) for g, row in zip(batch, found, strict=True) for (_, n), a in zip(g, row or [0.0] * len(g), strict=True)]
    tokens = sum(n for _, n in values)
    assert abs(sum(a * n for a, n in values)) < 1e-6
    if any(a for a, _ in values):
        assert sum(a * a * n for a, n in values) == pytest.approx(tokens, rel=1e-3)


@settings(deadline=None)
@given(rewards=SHORT, k=st.integers(2, 5))
def test_pass_at_k_is_the_mean_over_all_sets(rewards: list[float], k: int) -> None:
    """The closed form against the definition, set by set."""
    n, k = len(rewards), min(k, len(rewards))
    if k < 2:
        return
    wanted = [
        n
        / math.comb(n, k)
        * sum(max(rewards[j] for j in s) - max(rewards[j] for j in s if j != i) for s in itertools.combinations(range(n), k) if i in s)
        for i in range(n)
    ]
    (found,) = advantages([rewards], "pass_at_k", k=k)
    assert (found or [0.0] * n) == pytest.approx(wanted, abs=1e-9)


@settings(deadline=None)
@given(rewards=SHORT, turns=st.integers(1, 4))
def test_turns_with_a_reward_at_the_end_are_group_mean(rewards: list[float], turns: int) -> None:
    """Where there is nothing to tell apart, credit by turns is what it was."""
    members = TrajectoryGroup(0, [episode([0.0] * (turns - 1) + [r]) for r in rewards])
    found, wanted = (compute_advantages([members], name) for name in ("turn", "group_mean"))
    assert found == wanted


@pytest.mark.parametrize("name", ADVANTAGES)
def test_a_batch_of_one_reward_carries_nothing(name: str) -> None:
    """0.1 + 0.1 + 0.1 is not 0.3: rounding must not be a signal. Where nothing is compared the reward is."""
    none = [None, None] if name != "reinforce" else [[0.1] * 3, [0.1] * 6]
    assert advantages([[0.1] * 3, [0.1] * 6], name) == none
    assert compute_advantages([], name) == []


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("gae", None, "unknown advantage 'gae'; there are group_mean, grpo"),
        ("rloo", {"k": 2}, "advantage 'rloo' has no setting 'k'; it has none"),
        ("pass_at_k", {"K": 2}, "has no setting 'K'; it has k"),
        ("pass_at_k", {"k": 2.5}, "'k' must be a whole number from 1, and is 2.5"),
        ("pass_at_k", {"k": 0}, "'k' must be a whole number from 1, and is 0"),
        ("turn", {"discount": 1.5}, "'discount' must be from 0 to 1, and is 1.5"),
        ("turn", {"discount": math.nan}, "'discount' must be a finite number, and is nan"),
    ],
)
def test_wrong_choices_are_told_in_one_line(name: str, config: dict | None, words: str) -> None:
    """Before anything is sampled, as the loop resolves them first."""
    with pytest.raises(RequestError, match=words) as caught:
        resolve_advantage(name, config)
    assert "\n" not in str(caught.value)
