"""Several adapters as one. (Their logits beside PEFT's: tests/engine/test_foreign_adapters.py.)"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_tools import make

from veneer.digest import digest_adapter
from veneer.store.stack import stack_adapters
from veneer.types import Adapter, AdapterError, Checkpoint, LoraConfig


def adapter(modules: list[int], rank: int, alpha: float, seed: int) -> Checkpoint:
    """Random A and B of the maps ``layers.I``, each [5 + I, 4]."""
    rng, weights = np.random.default_rng(seed), {}
    for module in modules:
        weights[f"layers.{module}.lora_A.weight"] = rng.normal(size=(rank, 4)).astype(np.float32)
        weights[f"layers.{module}.lora_B.weight"] = rng.normal(size=(5 + module, rank)).astype(np.float32)
    lora = LoraConfig(rank, alpha)
    return Checkpoint("sampler", Adapter(f"a{seed}", seed, digest_adapter(weights, lora), "nano", "b" * 64), lora, weights)


def update(checkpoint: Checkpoint, module: int) -> np.ndarray:
    """(alpha / r) B A in float64; zeros where there is none."""
    assert checkpoint.config is not None
    if f"layers.{module}.lora_A.weight" not in checkpoint.weights:
        return np.zeros((5 + module, 4))
    a, b = (checkpoint.weights[f"layers.{module}.lora_{side}.weight"].astype(np.float64) for side in "AB")
    return checkpoint.config.alpha / checkpoint.config.rank * b @ a


PARTS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True),
        st.integers(1, 5),
        st.floats(0.1, 100),
        st.floats(-4, 4, allow_subnormal=False),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=100, deadline=None)
@given(PARTS)
def test_a_stack_is_the_sum(parts: list[tuple[list[int], int, float, float]]) -> None:
    """Whatever the ranks, alphas, modules and scales."""
    made = [(adapter(modules, rank, alpha, i), scale) for i, (modules, rank, alpha, scale) in enumerate(parts)]
    stack = stack_adapters(made, "sum")
    assert stack.config is not None
    assert stack.config.rank == sum(rank for _, rank, _, _ in parts)
    assert stack.adapter.digest == digest_adapter(stack.weights, stack.config)
    assert {a.shape[0] for k, a in stack.weights.items() if "lora_A" in k} == {stack.config.rank}
    for module in range(4):
        terms = [scale * update(checkpoint, module) for checkpoint, scale in made]
        size = max(1.0, max(float(np.abs(term).max()) for term in terms))
        np.testing.assert_allclose(update(stack, module), sum(terms), atol=1e-6 * size)


@pytest.mark.parametrize(("rank", "alpha"), [(1, 32.0), (3, 7.3), (8, 45.254833995939045)])
def test_one_adapter_alone_is_itself(rank: int, alpha: float) -> None:
    """A stack of one, unscaled, does what the adapter does, and says so by its digest."""
    one = make(rank=rank, alpha=alpha)
    stack = stack_adapters([(one, 1.0)], "x")
    assert stack.adapter.digest == one.adapter.digest
    assert {k: v.tobytes() for k, v in stack.weights.items()} == {k: v.tobytes() for k, v in one.weights.items()}


def test_stacks_that_cannot_be() -> None:
    """Each in a line."""
    one = make()
    full = dataclasses.replace(one, config=None)
    other = dataclasses.replace(one, adapter=dataclasses.replace(one.adapter, name="other", base_digest="c" * 64))
    refused = (([], "at least one"), ([(one, 1.0), (full, 1.0)], "fully fine-tuned"), ([(one, 1.0), (other, 1.0)], "one base"))
    for parts, words in (*refused, ([(one, float("nan"))], "scale nan"), ([(one, float("inf"))], "scale inf")):
        with pytest.raises(AdapterError, match=words):
            stack_adapters(parts, "sum")
