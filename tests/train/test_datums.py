"""Trajectories to datums, and what weighs them: where off-by-one errors would live."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.train.datums import groups_to_data, supervised_data, trajectory_to_data
from veneer.types import Adapter, DataError, Datum, Sample, Trajectory, TrajectoryGroup, Transition

ADAPTER = Adapter("a", 1, "d" * 64, "base", "b" * 64)


def turn(
    prompt: Sequence[int], sampled: Sequence[int], logprobs: Sequence[float] | None = None, adapter: Adapter | None = ADAPTER
) -> Transition:
    floats = np.array([-0.01 * t for t in sampled] if logprobs is None else logprobs, np.float32)
    sample = Sample(np.array(sampled, np.int64), floats, "stop", "base", adapter)
    return Transition(np.array(prompt, np.int64), sample, {"role": "assistant", "content": ""}, 0.0)


def check_row(datum: Datum, whole: Sequence[int], sampled: dict[int, float], advantage: float) -> None:
    """``sampled``: position in ``whole`` -> log-probability. Targets are the tokens one to the right."""
    assert datum.tokens.tolist() == list(whole[:-1])
    assert datum.targets.tolist() == list(whole[1:])
    for i in range(len(whole) - 1):
        hit = i + 1 in sampled
        assert datum.mask[i] == (1.0 if hit else 0.0)
        assert datum.advantages[i] == (np.float32(advantage) if hit else 0.0)
        assert datum.logprobs[i] == (np.float32(sampled[i + 1]) if hit else 0.0)
    assert (datum.tokens.dtype, datum.targets.dtype) == (np.int64, np.int64)
    assert {datum.logprobs.dtype, datum.advantages.dtype, datum.mask.dtype} == {np.dtype(np.float32)}


def test_one_turn() -> None:
    """The one-token shift, by hand: the last prompt token predicts the first sampled one."""
    (datum,) = trajectory_to_data(Trajectory([turn([5, 6, 7], [8, 9], [-0.5, -0.25])], 1.0), [0.75])
    assert datum.tokens.tolist() == [5, 6, 7, 8]
    assert datum.targets.tolist() == [6, 7, 8, 9]
    assert datum.mask.tolist() == [0, 0, 1, 1]
    assert datum.logprobs.tolist() == [0, 0, -0.5, -0.25]
    assert datum.advantages.tolist() == [0, 0, 0.75, 0.75]
    assert datum.adapter == ADAPTER


TOKENS = st.lists(st.integers(1, 90), min_size=1, max_size=6)


@settings(deadline=None)
@given(first=TOKENS, turns=st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=4), advantage=st.floats(-5, 5, width=32))
def test_turns_that_extend_are_one_row(first: list[int], turns: list[tuple[list[int], list[int]]], advantage: float) -> None:
    """Each sampled token is trained once, at its place, and nothing that the environment said is."""
    whole, transitions, sampled = list(first), [], {}
    for said, answered in turns:
        step = turn(whole, said)
        sampled |= {len(whole) + i: float(p) for i, p in enumerate(step.sample.logprobs)}
        transitions.append(step)
        whole += said
        end = len(whole)
        whole += answered
    (datum,) = trajectory_to_data(Trajectory(transitions, 1.0), [advantage] * len(transitions))
    check_row(datum, whole[:end], sampled, advantage)
    assert datum.mask.sum() == sum(len(said) for said, _ in turns)


@settings(deadline=None)
@given(first=TOKENS, said=TOKENS, answered=TOKENS, again=TOKENS, at=st.integers(0, 10))
def test_turns_that_do_not_extend_are_two_rows(first: list[int], said: list[int], answered: list[int], again: list[int], at: int) -> None:
    """A history that was written anew is another text; its tokens must not be glued to the old ones."""
    changed = [*first, *said, *answered]
    changed[at % (len(first) + len(said))] = 95
    one, two = turn(first, said), turn(changed, again)
    data = trajectory_to_data(Trajectory([one, two], 1.0), [0.5, 0.5])
    assert len(data) == 2
    check_row(data[0], first + said, {len(first) + i: float(p) for i, p in enumerate(one.sample.logprobs)}, 0.5)
    check_row(data[1], changed + again, {len(changed) + i: float(p) for i, p in enumerate(two.sample.logprobs)}, 0.5)


def test_a_shorter_prompt_is_a_new_row() -> None:
    """A history that was cut off does not extend."""
    assert len(trajectory_to_data(Trajectory([turn([1, 2, 3], [4]), turn([1, 2], [5])], 1.0), [1.0, 1.0])) == 2


def test_versions_do_not_share_a_row() -> None:
    """A row names one version of one adapter; a turn of another must not hide in it."""
    newer = Adapter("a", 2, "e" * 64, "base", "b" * 64)
    data = trajectory_to_data(Trajectory([turn([1], [2]), turn([1, 2, 3], [4], adapter=newer)], 1.0), [1.0, 1.0])
    assert [d.adapter for d in data] == [ADAPTER, newer]
    assert [d.mask.sum() for d in data] == [1, 1]


def test_each_turn_has_its_own_advantage() -> None:
    """Credit that lands on another turn teaches the wrong thing. Behind the shift, turn 1's two tokens are targets 1 and 2, turn 2's
    one token is target 4."""
    first, second = turn([1, 2], [3, 4]), turn([1, 2, 3, 4, 5], [6])
    (datum,) = trajectory_to_data(Trajectory([first, second], 1.0), [0.5, -2.0])
    assert datum.targets.tolist() == [2, 3, 4, 5, 6]
    assert datum.advantages.tolist() == [0, 0.5, 0.5, 0, -2]
    assert datum.mask.tolist() == [0, 1, 1, 0, 1]


def test_an_advantage_of_zero_keeps_its_weight() -> None:
    """A turn that is neither good nor bad still has a KL and an entropy, and counts as length."""
    (datum,) = trajectory_to_data(Trajectory([turn([1], [2, 3])], 1.0), [0.0])
    assert datum.mask.tolist() == [1, 1]


def test_advantages_of_other_turns_are_refused() -> None:
    """One too few would leave the last turn out without a word."""
    with pytest.raises(ValueError, match="shorter"):
        trajectory_to_data(Trajectory([turn([1], [2]), turn([1, 2], [3])], 1.0), [1.0])


@pytest.mark.parametrize("mask_truncated", [False, True])
def test_groups_to_data_by_hand(mask_truncated: bool) -> None:
    """Two problems: the first has an episode that failed and one that was cut off, the second carries no signal."""
    good, cut = Trajectory([turn([1], [2])], 1.0), Trajectory([turn([1], [3, 4])], 0.0, truncated=True)
    failed, same = Trajectory([turn([1], [5])], 0.0, error="no"), Trajectory([turn([9], [8])], 0.0)
    groups = [TrajectoryGroup(0, [good, failed, cut]), TrajectoryGroup(1, [same, same])]
    data_ED = groups_to_data(groups, [[[0.5], [-0.5]], None], mask_truncated=mask_truncated)
    assert [[d.targets.tolist() for d in data_D] for data_D in data_ED] == [[[2]], [] if mask_truncated else [[3, 4]]]
    assert data_ED[0][0].advantages.tolist() == [0.5]


def test_no_turns_no_data() -> None:
    """An episode that never began has nothing to train."""
    assert trajectory_to_data(Trajectory([], 0.0), []) == []


@given(prompt=TOKENS, answer=TOKENS)
def test_supervised_loss_is_on_the_answer_alone(prompt: list[int], answer: list[int]) -> None:
    """A model that is trained on questions learns to ask them."""
    (datum,) = supervised_data([(np.array(prompt, np.int64), np.array(answer, np.int64))])
    assert datum.tokens.tolist() == (prompt + answer)[:-1]
    assert datum.targets[datum.mask == 1].tolist() == answer
    assert datum.mask.sum() == len(answer)
    assert datum.adapter is None


@given(turns=st.lists(st.tuples(TOKENS, TOKENS, st.booleans()), min_size=1, max_size=6))
def test_every_answer_is_trained_behind_its_own_prompt(turns: list[tuple[list[int], list[int], bool]]) -> None:
    """Whatever a template does to the past: each answer once, behind exactly the tokens that it would be sampled behind."""
    conversation: list[tuple[list[int], list[int]]] = []
    for more, answer, extends in turns:
        past = [*conversation[-1][0], *conversation[-1][1]] if conversation else []
        conversation.append(((past if extends else [99]) + more, answer))
    data = supervised_data([(np.array(p, np.int64), np.array(a, np.int64)) for p, a in conversation])
    rows = [[*d.tokens.tolist(), int(d.targets[-1])] for d in data]
    assert sum(int(d.mask.sum()) for d in data) == sum(len(answer) for _, answer in conversation)
    at = 0
    for prompt, answer in conversation:
        matching = [i for i in range(at, len(rows)) if rows[i][: len(prompt) + len(answer)] == prompt + answer]
        assert matching
        at = matching[0]
        first = len(prompt) - 1
        assert data[at].mask[first : first + len(answer)].all()


def test_datum_refuses_ragged_arrays() -> None:
    """Arrays of different lengths would be padded into nonsense."""
    i, f = np.zeros(3, np.int64), np.zeros(3, np.float32)
    with pytest.raises(DataError, match="one shape"):
        Datum(i, i, f, f, f[:2])
    with pytest.raises(DataError, match="at least one entry"):
        Datum(i[:0], i[:0], f[:0], f[:0], f[:0])
