"""Who else is on the engine, and in the batch, must not matter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_tools import (
    FREE,
    add_random_adapter,
    datum,
    gradients,
    lora_engine,
    no_gradients,
    prompt,
    relative_error,
    row_bytes,
    rows_of_adapter,
    slot_of,
    wide_engine,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny_models import ARCHITECTURES
from veneer.engine import LocalEngine
from veneer.types import AdamParams, Datum, LoraConfig

RANKS = (1, 2, 4, 8, 16, 32)
STEP = AdamParams(learning_rate=1e-2, weight_decay=0.1)


def six_adapters() -> LocalEngine:
    engine = wide_engine()
    for rank in RANKS:
        add_random_adapter(engine, f"r{rank}", LoraConfig(rank=rank, alpha=2 * rank), seed=rank)
    return engine


def rows_of(rank: int) -> list[Datum]:
    return [datum(6 + rank % 7, seed=rank), datum(11, seed=100 + rank)]


def test_mixed_batch_is_six_separate_batches() -> None:
    """Merging loops for speed must not change what any of them learns."""
    mixed, alone = six_adapters(), six_adapters()
    futures = {rank: mixed.forward_backward(f"r{rank}", rows_of(rank), "importance_sampling") for rank in RANKS}
    mixed.step()
    assert all(future.done() for future in futures.values()), "all of it was meant to be one batch"
    for rank in RANKS:
        wanted = alone.forward_backward(f"r{rank}", rows_of(rank), "importance_sampling").result()
        found = futures[rank].result()
        for ours, reference in zip(found.logprobs_D, wanted.logprobs_D, strict=True):
            np.testing.assert_allclose(ours, reference, atol=1e-6, rtol=1e-6)
        assert found.metrics == pytest.approx(wanted.metrics, rel=1e-5, abs=1e-5)
        reference_gradients = gradients(alone, f"r{rank}")
        for name, ours in gradients(mixed, f"r{rank}").items():
            assert relative_error(ours, reference_gradients[name]) < 1e-6, (rank, name)


def test_absent_adapters_get_exactly_no_gradient() -> None:
    """One stray gradient in another tenant's rows would leak data between them."""
    engine = six_adapters()
    engine.forward_backward("r4", rows_of(4), "cross_entropy").result()
    engine.forward_backward("r16", rows_of(16), "cross_entropy").result()
    for rank in RANKS:
        assert rows_of_adapter(engine, f"r{rank}")["grad"].any() == (rank in (4, 16))


def test_forward_leaves_no_gradient() -> None:
    """An evaluation between two steps must not train."""
    engine = six_adapters()
    engine.forward("r4", rows_of(4), "cross_entropy").result()
    assert no_gradients(engine)


def test_lower_ranks_leave_the_padding_of_their_rows_at_zero() -> None:
    """Lines above an adapter's rank belong to nobody; a value there would show up in a later, higher-rank tenant."""
    engine = six_adapters()
    futures = [engine.forward_backward(f"r{rank}", rows_of(rank), "cross_entropy") for rank in RANKS]
    assert all(future.result() for future in futures)
    for rank in RANKS:
        own = sum(int((g != 0).sum()) for g in gradients(engine, f"r{rank}").values())
        assert int((rows_of_adapter(engine, f"r{rank}")["grad"] != 0).sum()) == own


def test_step_of_one_leaves_the_others_bitwise() -> None:
    """Training one adapter must not move its neighbours' weights, moments or served version by a single bit."""
    engine = six_adapters()
    for rank in RANKS:  # moments and gradients everywhere
        engine.forward_backward(f"r{rank}", rows_of(rank), "cross_entropy")
        engine.optim_step(f"r{rank}", STEP)
        engine.forward_backward(f"r{rank}", rows_of(rank), "cross_entropy").result()
    before = {rank: row_bytes(engine, f"r{rank}") for rank in RANKS}
    assert all(any(fields["m"]) and any(fields["grad"]) for fields in before.values())
    engine.optim_step("r8", STEP).result()
    engine.publish("r8").result()
    after = {rank: row_bytes(engine, f"r{rank}") for rank in RANKS}
    assert [rank for rank in RANKS if after[rank] != before[rank]] == [8]
    assert [field for field in before[8] if after[8][field] != before[8][field]] == ["weights", "published", "grad", "m", "v"]


def test_higher_ranks_and_more_slots_leave_everything_as_it_was() -> None:
    """A newcomer makes the engine lay its rows out anew; adapters in training must not notice."""
    engine, alone = wide_engine(), wide_engine()
    digest = engine.base_digest
    for e in (engine, alone):
        for rank in (2, 4):
            add_random_adapter(e, f"r{rank}", LoraConfig(rank=rank), seed=rank)
            e.forward_backward(f"r{rank}", rows_of(rank), "cross_entropy")
            e.optim_step(f"r{rank}", STEP)
            e.forward_backward(f"r{rank}", rows_of(rank), "cross_entropy").result()
    states = {rank: engine.save_state(f"r{rank}").result() for rank in (2, 4)}
    waiting = {rank: gradients(engine, f"r{rank}") for rank in (2, 4)}
    for i in range(7):
        add_random_adapter(engine, f"late{i}", LoraConfig(rank=(8, 1, 32, 2, 16, 4, 8)[i]), seed=50 + i)
    for rank in (2, 4):
        state = engine.save_state(f"r{rank}").result()
        assert state.adapter == states[rank].adapter
        for key, array in states[rank].optimizer.items():
            assert np.array_equal(state.optimizer[key], array), key
        for key, gradient in gradients(engine, f"r{rank}").items():
            assert torch.equal(gradient, waiting[rank][key])
        ids = prompt(9, rank)
        ours, theirs = (e.sample(ids, f"r{rank}", FREE).result()[0] for e in (engine, alone))
        assert ours.tokens.tolist() == theirs.tokens.tolist()
        for e in (engine, alone):
            e.forward_backward(f"r{rank}", rows_of(rank), "cross_entropy")
            e.optim_step(f"r{rank}", STEP)
        digests = [e.publish(f"r{rank}").result().digest for e in (engine, alone)]
        assert digests[0] == digests[1]
    assert engine.base_digest == engine.measure_base_digest() == digest


def test_a_reused_slot_starts_clean() -> None:
    """A removed tenant's weights, moments and gradients must be gone for whoever gets the slot next."""
    engine, alone = wide_engine(), wide_engine()
    engine.create_adapter("old", LoraConfig(rank=8))
    engine.forward_backward("old", rows_of(8), "cross_entropy")
    engine.optim_step("old", STEP)
    engine.forward_backward("old", rows_of(8), "cross_entropy").result()
    slot = slot_of(engine, "old")
    engine.remove_adapter("old")
    for e in (engine, alone):
        e.create_adapter("new", LoraConfig(rank=8, seed=5))
    assert slot_of(engine, "new") == slot
    for e in (engine, alone):
        e.forward_backward("new", rows_of(8), "cross_entropy")
        e.optim_step("new", STEP)
    ours, theirs = (e.save_state("new").result() for e in (engine, alone))
    assert ours.adapter == theirs.adapter
    assert ours.adapter.version == 1
    for key, array in theirs.optimizer.items():
        assert np.array_equal(ours.optimizer[key], array), key


def test_base_digest_survives_a_whole_life() -> None:
    """Promise one: the base is bit for bit the same after sampling, training, publishing, saving and removing."""
    engine = six_adapters()
    digest, untouched = engine.base_digest, wide_engine().base_digest
    for rank in RANKS:
        engine.sample(prompt(5), f"r{rank}", FREE)
        engine.forward_backward(f"r{rank}", rows_of(rank), "ppo")
        engine.optim_step(f"r{rank}", STEP)
        engine.publish(f"r{rank}").result()
    state = engine.save_state("r2").result()
    engine.remove_adapter("r2")
    engine.load_state("again", state).result()
    assert engine.measure_base_digest() == digest == untouched


def test_changing_one_weight_of_the_base_changes_its_digest() -> None:
    """The digest is only worth something if it moves."""
    engine = wide_engine()
    with torch.no_grad():
        engine.base.model.get_parameter("model.layers.1.mlp.up_proj.weight")[0, 0] += 1e-3
    assert engine.measure_base_digest() != engine.base_digest


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_seeded_samples_are_the_same_in_company(architecture: str) -> None:
    """A rollout that is to be reproduced must not depend on what other users asked at that moment."""
    engine = lora_engine(architecture)
    for name, rank in (("a", 2), ("b", 4)):
        add_random_adapter(engine, name, LoraConfig(rank=rank, alpha=8), seed=rank)
    asked = [(name, prompt(length, length)) for name in ("b", None, "a") for length in (4, 19, 30)]
    alone = [engine.sample(ids, name, FREE, n=2).result() for name, ids in asked]
    futures = [engine.sample(ids, name, FREE, n=2) for name, ids in asked]
    for expected, future in zip(alone, futures, strict=True):
        for one, other in zip(expected, future.result(), strict=True):
            assert one.tokens.tolist() == other.tokens.tolist()
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5, rtol=0)
    assert len({tuple(s.tokens.tolist()) for group in alone for s in group}) > 9, "the prompts were meant to differ"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_unembedding_adapters_mix(architecture: str) -> None:
    """With lm_head adapted, and on models whose head is not plain, a mixed batch must still be the separate ones."""
    mixed, alone = lora_engine(architecture), lora_engine(architecture)
    config = LoraConfig(rank=4, alpha=8, train_unembed=True)
    for engine in (mixed, alone):
        add_random_adapter(engine, "a", config, seed=1)
        add_random_adapter(engine, "b", LoraConfig(rank=2, alpha=8, train_attn=False, train_mlp=False, train_unembed=True), seed=2)
    futures = {name: mixed.forward_backward(name, [datum(9, i), datum(5, i)], "cross_entropy") for i, name in enumerate("ab")}
    base = mixed.forward(None, [datum(7, 3)], "cross_entropy")
    wanted_base = alone.forward(None, [datum(7, 3)], "cross_entropy").result()
    for i, name in enumerate("ab"):
        wanted = alone.forward_backward(name, [datum(9, i), datum(5, i)], "cross_entropy").result()
        for ours, reference in zip(futures[name].result().logprobs_D, wanted.logprobs_D, strict=True):
            np.testing.assert_allclose(ours, reference, atol=2e-6, rtol=0)
        reference_gradients = gradients(alone, name)
        for key, ours in gradients(mixed, name).items():
            assert relative_error(ours, reference_gradients[key]) < 2e-6, key
    np.testing.assert_allclose(base.result().logprobs_D[0], wanted_base.logprobs_D[0], atol=2e-6, rtol=0)


ENDINGS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head", "layers.0.mlp.up_proj")
CONFIGS = st.builds(
    LoraConfig,
    rank=st.integers(1, 32),
    alpha=st.sampled_from([1.0, 8.0, 32.0]),
    target_modules=st.lists(st.sampled_from(ENDINGS), min_size=1, max_size=4, unique=True).map(tuple),
)
TENANTS = st.lists(st.tuples(CONFIGS, st.lists(st.integers(1, 14), min_size=1, max_size=3)), min_size=2, max_size=5)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(tenants=TENANTS)
def test_any_mixed_batch_is_the_separate_ones(tenants: list[tuple[LoraConfig, list[int]]]) -> None:
    """Ranks, targets and row counts that nobody thought of."""
    mixed, alone = wide_engine(), wide_engine()
    data = [[datum(length, seed=10 * i + j) for j, length in enumerate(lengths)] for i, (_, lengths) in enumerate(tenants)]
    for i, (config, _) in enumerate(tenants):
        for engine in (mixed, alone):
            add_random_adapter(engine, f"t{i}", config, seed=i)
    futures = [mixed.forward_backward(f"t{i}", rows, "importance_sampling") for i, rows in enumerate(data)]
    for i, rows in enumerate(data):
        wanted = alone.forward_backward(f"t{i}", rows, "importance_sampling").result()
        for ours, reference in zip(futures[i].result().logprobs_D, wanted.logprobs_D, strict=True):
            np.testing.assert_allclose(ours, reference, atol=3e-6, rtol=0)
        reference_gradients = gradients(alone, f"t{i}")
        for key, ours in gradients(mixed, f"t{i}").items():
            if not reference_gradients[key].any():  # a single token attends to itself alone: q_proj and k_proj get no gradient
                assert ours.abs().max() < 1e-6
                continue
            assert torch.linalg.vector_norm(ours - reference_gradients[key]) < 1e-6 + 3e-6 * torch.linalg.vector_norm(
                reference_gradients[key]
            )
