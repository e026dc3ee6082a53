"""What adapters take in memory: a provider counts how many customers fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_tools import FREE, add_random_adapter, datum, lora_engine, prompt, row_bytes, rows_of_adapter, slot_of
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.engine.rows import BEHIND, Line, Rows
from veneer.types import AdamParams, LoraConfig

STEP = AdamParams(learning_rate=1e-2)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 60)), max_size=60))
def test_pieces_never_overlap_and_nothing_is_lost(calls: list[tuple[bool, int]]) -> None:
    """Two customers in one place would answer with each other's behaviour."""
    line, taken = Line(torch.device("cpu")), dict[int, tuple[int, int]]()
    for number, (take, size) in enumerate(calls):
        if take or not taken:
            begin = line.take(size)
            assert not line.tensor[begin : begin + size].any()
            line.tensor[begin : begin + size] = number + 1
            taken[number] = (begin, size)
        else:
            begin, size = taken.pop(sorted(taken)[size % len(taken)])
            line.give(begin, size)
        for key, (begin, size) in taken.items():
            assert (line.tensor[begin : begin + size] == key + 1).all()
    for begin, size in taken.values():
        line.give(begin, size)
    length = len(line.tensor)
    if length:
        assert line.take(length) == 0, "what was given back is one piece again"
        assert len(line.tensor) == length


def test_a_line_that_grows_within_its_room_stays_where_it_is() -> None:
    """A server takes in an adapter a training step; all others were copied for it. Where a matrix lies decides how some libraries sum."""
    line = Line(torch.device("cpu"))
    first = line.take(160)
    where = line.tensor.data_ptr()
    assert where % 64 == 0
    line.tensor[first : first + 160] = 1.0
    for _ in range(50):
        assert not line.tensor[(at := line.take(1600)) : at + 1600].any()
    assert line.tensor.data_ptr() == where
    assert line.tensor.untyped_storage().nbytes() == line.tensor.nbytes, "what counts memory counts the line, not its room"
    line.take(BEHIND)
    assert line.tensor.data_ptr() != where
    assert line.tensor.data_ptr() % 64 == 0
    assert (line.tensor[first : first + 160] == 1.0).all()


def test_an_adapter_takes_its_own_size() -> None:
    """One customer's thick adapter must not make a thousand thin ones as large."""
    engine, config = lora_engine(), LoraConfig(rank=1)
    for i in range(20):
        add_random_adapter(engine, f"thin{i}", config, seed=i)
    rows = engine._stack.rows
    before = len(rows.line.tensor)
    thin = rows.size(slot_of(engine, "thin0"))
    assert before <= 1.5 * 21 * (thin + 16)
    add_random_adapter(engine, "thick", LoraConfig(rank=16), seed=99)
    thick = rows.size(slot_of(engine, "thick"))
    assert thick > 10 * thin
    assert len(rows.line.tensor) <= 1.5 * (before + 2 * (thick + 16)), "a load has the old and the new one for a moment"


def test_who_only_answers_has_no_moments() -> None:
    """Sampling and scoring need the weights alone; a gradient and two moments come with training, and go with the adapter."""
    engine = lora_engine()
    add_random_adapter(engine, "x", LoraConfig(rank=2), seed=1)
    engine.load_state("y", engine.save_state("x", "sampler").result()).result()
    engine.sample(prompt(5), "y", FREE).result()
    scored = engine.forward("y", [datum(9)], "cross_entropy").result()
    rows, slot = engine._stack.rows, slot_of(engine, "y")
    assert slot not in rows.trained
    engine.forward_backward("y", [datum(9)], "cross_entropy").result()
    assert slot in rows.trained
    assert np.array_equal(engine.forward("y", [datum(9)], "cross_entropy").result().logprobs_D[0], scored.logprobs_D[0], equal_nan=True)
    engine.remove_adapter("y")
    assert slot not in rows.trained


def test_published_weights_stay_while_training_goes_on() -> None:
    """What is served changes when it is published, not before."""
    engine = lora_engine()
    add_random_adapter(engine, "x", LoraConfig(rank=2), seed=1)
    before = rows_of_adapter(engine, "x")["published"]
    engine.forward_backward("x", [datum(9)], "cross_entropy")
    engine.optim_step("x", STEP).result()
    kept = rows_of_adapter(engine, "x")
    assert np.array_equal(kept["published"], before)
    assert not np.array_equal(kept["weights"], before)
    engine.publish("x").result()
    kept = rows_of_adapter(engine, "x")
    assert np.array_equal(kept["published"], kept["weights"])


@pytest.mark.parametrize("ranks", [(2, 2, 2, 2), (1, 16, 4, 2)])
def test_coming_and_going_changes_nobody(ranks: tuple[int, ...]) -> None:
    """The line is laid out anew while others are served and trained."""
    engine = lora_engine()
    for i, rank in enumerate(ranks):
        add_random_adapter(engine, f"a{i}", LoraConfig(rank=rank), seed=i)
        engine.forward_backward(f"a{i}", [datum(9, seed=i)], "cross_entropy").result()
    kept = {name: row_bytes(engine, name) for name in ("a1", "a3")}
    tokens = {name: engine.sample(prompt(6), name, FREE).result()[0].logprobs.tobytes() for name in kept}
    for gone in ("a0", "a2"):
        engine.remove_adapter(gone)
    for i, rank in enumerate((16, 1, 3, 15, 1)):
        add_random_adapter(engine, f"late{i}", LoraConfig(rank=rank), seed=50 + i)
    for name, content in kept.items():
        assert row_bytes(engine, name) == content
        assert engine.sample(prompt(6), name, FREE).result()[0].logprobs.tobytes() == tokens[name]


def test_neighbours_are_one_stack() -> None:
    """A batch of equal adapters is one product on a device only if it finds them behind each other, in order."""
    rows = Rows(torch.device("cpu"))
    slots = [rows.claim(37) for _ in range(4)] + [rows.claim(40)]
    for slot in slots:
        rows.published(slot)[:] = slot
    assert rows.neighbours(slots[:4])
    assert rows.neighbours(slots[1:3])
    assert not rows.neighbours([slots[1], slots[0]])
    assert not rows.neighbours([slots[0], slots[2]])
    assert not rows.neighbours(slots[3:])
    stack = rows.stacked(slots[1], 3)
    assert stack.shape == (3, 37)
    assert [row.unique().tolist() for row in stack] == [[1], [2], [3]]
