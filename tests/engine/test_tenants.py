"""What one tenant gets wrong is told to that tenant, and changes no bit of the others."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from engine_tools import add_random_adapter, count_passes, datum, row_bytes, wide_engine

from veneer.engine import LocalEngine
from veneer.types import AdamParams, DataError, Datum, LoraConfig, RequestError

STEP = AdamParams(learning_rate=1e-2, weight_decay=0.1)
NAMES = ("a", "bad", "b", "c")
PER_TOKEN = ("clip_high_threshold", "sequence_ratio_mask")


def engine_of_four() -> LocalEngine:
    engine = wide_engine()
    for i, name in enumerate(NAMES):
        add_random_adapter(engine, name, LoraConfig(rank=2 * i + 2), seed=i)
    return engine


def state_bytes(engine: LocalEngine, name: str) -> dict[str, bytes]:
    """Weights, moments and Adam's step."""
    state = engine.save_state(name).result()
    return {key: array.tobytes() for part in (state.weights, state.optimizer) for key, array in part.items()}


# ---------------------------------------------------------------- numbers in the data


def filled(width: int) -> dict[str, np.ndarray]:
    """All arrays of a datum of nine positions, [9] or [9, width]; the first three have no weight."""
    row, shape = datum(9), (9, width) if width else (9,)
    names = ("targets", "logprobs", "advantages", "mask")
    arrays = {name: np.repeat(getattr(row, name), width or 1).reshape(shape) for name in names}
    return {"tokens": row.tokens} | arrays | {name: np.ones(shape, np.float32) for name in PER_TOKEN}


def datum_of(arrays: dict[str, np.ndarray]) -> Datum:
    own = {name: arrays[name] for name in PER_TOKEN}
    return Datum(**{name: array for name, array in arrays.items() if name not in PER_TOKEN}, per_token=own)


@pytest.mark.parametrize("width", [0, 3], ids=["N", "NxK"])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["advantages", "logprobs", "mask", *PER_TOKEN])
def test_numbers_that_are_not_finite_are_refused_on_arrival(field: str, poison: float, width: int) -> None:
    """One line that names datum, array and place, before anything is queued."""
    engine, arrays = engine_of_four(), filled(width)
    arrays[field][5] = poison
    for call in (engine.forward, engine.forward_backward):
        with pytest.raises(DataError, match=rf"datum 1: {field} must be finite .*; {poison} is at \[5") as caught:
            call("bad", [datum(4), datum_of(arrays)], "gspo")
        assert "\n" not in str(caught.value)
    assert engine.step() == 0


@pytest.mark.parametrize("width", [0, 3], ids=["N", "NxK"])
def test_what_no_loss_reads_may_hold_anything(width: int) -> None:
    """Log-probabilities that ``forward`` gave come back with their NaNs where nothing was asked for."""
    arrays = filled(width)
    arrays["sequence_ratio_mask"][:2] = 0
    clean, holed = (engine_of_four() for _ in range(2))
    wanted = clean.forward_backward("a", [datum_of(arrays)], "gspo", everywhere=True).result()
    for field in ("advantages", "logprobs", "clip_high_threshold"):
        arrays[field][:2] = math.nan
    assert holed.forward_backward("a", [datum_of(arrays)], "gspo", everywhere=True).result().metrics == wanted.metrics
    assert row_bytes(holed, "a") == row_bytes(clean, "a")


def test_a_negative_ratio_mask_is_refused() -> None:
    """A mean with negative weights can divide by zero."""
    arrays = filled(0)
    arrays["sequence_ratio_mask"][4] = -1
    with pytest.raises(DataError, match="datum 0: sequence_ratio_mask must not be negative; -1"):
        engine_of_four().forward("bad", [datum_of(arrays)], "gspo")


# ---------------------------------------------------------------- steps


BAD_STEPS = {
    "rate": {"learning_rate": 1e30},
    "overflowing-rate": {"learning_rate": 1e300},
    "decay": {"weight_decay": 1e30},
    "just-too-large": {"learning_rate": 2e6},
    "nothing-by-nothing": {"eps": 0.0},
}


@pytest.mark.parametrize("names", [("a", "bad", "b"), ("bad", "c"), ("c", "bad")], ids=["in-the-middle", "apart", "last"])
@pytest.mark.parametrize("kind", BAD_STEPS)
def test_a_step_that_ruins_its_weights_changes_nothing(kind: str, names: tuple[str, ...]) -> None:
    """Whoever asks for a learning rate of 1e30 hears it in one line; that adapter and those updated with it stay sound, to the bit."""
    engine, alone, good = engine_of_four(), engine_of_four(), [name for name in names if name != "bad"]
    for e in (engine, alone):
        for name in names:
            e.forward_backward(name, [datum(20, 1), datum(9, 2)], "cross_entropy").result()
            e.optim_step(name, STEP).result()
    before, version = row_bytes(engine, "bad"), engine.save_state("bad").result().adapter.version
    for name in names:
        engine.forward_backward(name, [datum(30, 3)], "cross_entropy")
    for name in good:
        alone.forward_backward(name, [datum(30, 3)], "cross_entropy")
    wrong = dataclasses.replace(STEP, **BAD_STEPS[kind])
    steps = {name: engine.optim_step(name, wrong if name == "bad" else STEP) for name in names}
    wanted = {name: alone.optim_step(name, STEP).result() for name in good}
    assert {name: steps[name].result() for name in good} == wanted
    with pytest.raises(RequestError, match=r"nothing was changed but the gradient dropped\. (Lower|Give)") as caught:
        steps["bad"].result()
    assert "\n" not in str(caught.value)
    assert row_bytes(engine, "bad") == before
    assert engine.save_state("bad").result().adapter.version == version
    for e in (engine, alone):  # and all go on as if it had not been
        for name in names:
            e.forward_backward(name, [datum(12, 4)], "cross_entropy").result()
            e.optim_step(name, STEP).result()
    for name in names:
        assert state_bytes(engine, name) == state_bytes(alone, name), name


def test_a_gradient_that_overflows_stays_with_its_adapter() -> None:
    """Finite advantages can make an infinite gradient: in one pass and one update with it the others keep every bit."""
    engine, alone = engine_of_four(), engine_of_four()
    before = state_bytes(alone, "bad")
    wild = dataclasses.replace(datum(18), advantages=np.full(18, 3e38, np.float32))
    calls = count_passes(engine)
    bad = engine.forward_backward("bad", [wild], "importance_sampling")
    good = engine.forward_backward("a", [datum(19), datum(8)], "importance_sampling")
    engine.step()
    assert len(calls) == 1, "they were meant to share a pass"
    assert not math.isfinite(bad.result().metrics["loss:sum"])
    wanted = alone.forward_backward("a", [datum(19), datum(8)], "importance_sampling").result()
    assert good.result().metrics == wanted.metrics
    failed, kept = engine.optim_step("bad", STEP), engine.optim_step("a", STEP)
    assert kept.result() == alone.optim_step("a", STEP).result()
    with pytest.raises(RequestError, match="gradient is not finite"):
        failed.result()
    assert state_bytes(engine, "a") == state_bytes(alone, "a")
    assert state_bytes(engine, "bad") == before


def test_enormous_weights_of_one_adapter_leave_the_others_their_bits() -> None:
    """Weights as large as a step may leave them ruin their owner's passes, and nobody else's."""
    engine, alone = engine_of_four(), engine_of_four()
    checkpoint = engine.save_state("bad", "sampler").result()
    huge = {name: np.full_like(array, 1e6) for name, array in checkpoint.weights.items()}
    engine.load_state("bad", dataclasses.replace(checkpoint, weights=huge)).result()
    calls = count_passes(engine)
    for name in ("bad", "a"):
        engine.forward_backward(name, [datum(19), datum(8)], "importance_sampling", everywhere=True)
    engine.step()
    assert len(calls) == 1
    alone.forward_backward("a", [datum(19), datum(8)], "importance_sampling", everywhere=True).result()
    for e in (engine, alone):
        e.optim_step("a", STEP).result()
    assert state_bytes(engine, "a") == state_bytes(alone, "a")
