"""The counters against products whose size is known, and against PyTorch's own graph where it can be told by hand."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tiny_models import CONFIGS
from veneer.engine.counting import Bench, count_flops, peak_bytes
from veneer.types import AdamParams, BaseError, Datum, LoraConfig

SIZES = st.integers(1, 9)


@given(SIZES, SIZES, SIZES)
def test_products_are_counted(n: int, k: int, m: int) -> None:
    """Into something new, with something added, and in place."""
    a, b, c = torch.ones(n, k), torch.ones(k, m), torch.ones(n, m)
    for work in (lambda: a @ b, lambda: torch.mm(a, b, out=c), lambda: torch.addmm(c, a, b), lambda: c.addmm_(a, b)):
        found = count_flops(work)
        assert found.linear == found.total == 2 * n * k * m


@given(SIZES, SIZES, SIZES, SIZES)
def test_attention_is_counted_apart(heads: int, queries: int, keys: int, dim: int) -> None:
    """All pairs, twice: queries with keys, weights with values; backward the weights once more, and two products for each of the two."""
    q, k, v = (torch.randn(1, heads, length, 8 * dim, requires_grad=True) for length in (queries, keys, keys))
    forward = 2 * heads * queries * keys * 2 * 8 * dim
    with torch.no_grad():
        found = count_flops(lambda: F.scaled_dot_product_attention(q, k, v))
    assert (found.linear, found.total) == (0, forward)
    both = count_flops(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward())
    assert both.total == pytest.approx(forward + 2.5 * forward)


def test_the_number_of_threads_is_left_as_it_was() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        count_flops(lambda: 1 // 0)
    assert torch.get_num_threads() == before


def test_the_peak_is_of_what_is_alive_together() -> None:
    """Not of all that was ever made, and views are none."""

    def one_after_the_other() -> None:
        for _ in range(5):
            torch.zeros(1000).view(10, 100).t()

    def all_together() -> object:
        return [torch.zeros(1000) for _ in range(5)]

    assert peak_bytes(one_after_the_other) in (4000, 8000)  # the old one goes when the new one has come
    assert peak_bytes(all_together) == 20000


def rows(count: int, length: int) -> list[Datum]:
    rng, ones = np.random.default_rng(0), np.ones(length, np.float32)
    tokens = rng.integers(3, 90, (count, length + 1))
    return [Datum(row[:-1], row[1:], np.zeros(length, np.float32), ones, ones) for row in tokens]


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gemma2"])
@pytest.mark.parametrize("weights", ["lora", "full"])
def test_whatever_is_opened_computes_where_the_counter_looks(architecture: str, weights: str) -> None:
    """On the thread that asks: a full training pass of it makes six FLOPs a product, an adapter's at least four."""
    opened = Bench().open(CONFIGS[architecture]().to_dict(), "lora" if weights == "lora" else "full")
    opened.engine.create_adapter("x", LoraConfig(1) if weights == "lora" else None)
    found = count_flops(lambda: opened.engine.forward_backward("x", rows(4, 16), "cross_entropy").result())
    products = 64 * opened.shape.products
    assert found.linear == 6 * products if weights == "full" else 3.5 * products < found.linear < 4.5 * products
    assert opened.written_out == (weights == "lora" and architecture != "gemma2")
    assert opened.unseen_rank == (16 if weights == "lora" else 0)
    assert opened.base_bytes == 4 * opened.shape.parameters


@pytest.mark.parametrize("source", ["nano", CONFIGS["llama"]().to_dict()], ids=["nano", "llama"])
def test_the_same_model_runs_through_modules(source: Any) -> None:
    """To the weights, and with the same log-probabilities on another way."""
    plain, modules = Bench().open(source, "lora"), Bench().open(source, "lora", as_modules=True)
    assert (plain.written_out, modules.written_out) == (True, False)
    assert plain.shape == modules.shape
    assert plain.engine.base_digest == modules.engine.base_digest
    one, other = (opened.engine.forward(None, rows(2, 16), "cross_entropy").result().logprobs_D for opened in (plain, modules))
    np.testing.assert_allclose(one, other, atol=1e-4)


def test_random_weights_leave_torch_as_it_was() -> None:
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    Bench().open(CONFIGS["llama"]().to_dict(), "lora")
    assert torch.equal(torch.rand(3), wanted)


def test_a_step_on_what_is_opened_is_a_step() -> None:
    """It trains, and is timed until it has."""
    bench = Bench()
    engine = bench.open(CONFIGS["qwen3"]().to_dict(), "lora").engine
    engine.create_adapter("x", LoraConfig(2))
    before = engine.save_state("x", "sampler").result().adapter.digest

    async def step() -> None:
        engine.forward_backward("x", rows(4, 16), "cross_entropy")
        await engine.optim_step("x", AdamParams())

    assert bench.seconds(lambda: asyncio.run(step())) > 0
    assert engine.save_state("x", "sampler").result().adapter.digest != before


def test_what_is_not_there_is_said() -> None:
    with pytest.raises(BaseError, match="cannot be loaded"):
        Bench().open("nobody/has-this-model", "lora")
    assert Bench().shape_of("meta-llama/Llama-3.1-8B").layers == 32
