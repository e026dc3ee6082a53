"""FLOPs against torch's own counter on models that run, with adapters as PEFT puts them on, and the ratios that are published."""

from __future__ import annotations

from functools import cache

import peft
import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from tiny_models import CONFIGS, random_model
from veneer.engine.base import read_model
from veneer.engine.shapes import count_shape
from veneer.measure.flops import (
    FULL,
    StepWork,
    Trained,
    attention_flops,
    backward_flops,
    break_even_rank,
    formula_ratio,
    forward_flops,
    step_flops,
    train_flops,
)
from veneer.shapes import ModelShape
from veneer.types import LoraConfig

aten = torch.ops.aten
LINEAR = (aten.mm, aten.addmm)
TOKENS, ROWS = 48, 2
LLAMA, SMALL = "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-0.6B"


@cache
def shape_of(name: str) -> ModelShape:
    return count_shape(CONFIGS[name]().to_dict() if name in CONFIGS else name)


def model_of(name: str) -> hf.PreTrainedModel:
    model = read_model(name)[0] if name == "nano" else random_model(name)
    model.set_attn_implementation("eager")  # its products are counted; those of fused kernels in part
    return model.float()


def counted(model: torch.nn.Module) -> tuple[float, float]:
    """By torch: of linear maps, and of attention, in a forward and a backward pass."""
    ids = torch.arange(ROWS * TOKENS).view(ROWS, TOKENS) % 90
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    found = counter.get_flop_counts()["Global"]
    linear = sum(found.get(op, 0) for op in LINEAR)
    return linear, sum(found.values()) - linear


@pytest.mark.parametrize("name", ["nano", "llama", "gemma2", "phi"])
def test_full_fine_tuning_is_counted(name: str) -> None:
    """Three products a map, and the pairs of queries and keys three times."""
    shape, (linear, attention) = shape_of(name), counted(model_of(name))
    assert train_flops(shape, ROWS * TOKENS) == pytest.approx(linear, rel=0.01)
    assert 3 * ROWS * attention_flops(shape, TOKENS, causal=False) == pytest.approx(attention, rel=0.01)
    assert train_flops(shape, 1) == 6 * shape.products


@pytest.mark.parametrize(
    ("name", "rank", "targets"),
    [
        ("nano", 1, "all-linear"),
        ("nano", 32, "all-linear"),
        ("nano", 8, ["gate_proj", "up_proj", "down_proj"]),
        ("nano", 8, ["q_proj", "v_proj"]),
        ("nano", 8, ["down_proj", "lm_head"]),
        ("llama", 4, "all-linear"),
        ("mistral", 2, "all-linear"),
    ],
)
def test_adapters_are_counted(name: str, rank: int, targets: str | list[str]) -> None:
    """What a frozen base saves and what an adapter adds, where it is put and where nothing lies below it."""
    model = model_of(name)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=32, target_modules=targets))
    shape = shape_of(name)
    maps = shape.adapted(LoraConfig(rank, target_modules=() if targets == "all-linear" else tuple(targets)))
    trained = Trained(maps, rank)
    linear, _ = counted(adapted)
    assert train_flops(shape, ROWS * TOKENS, None, trained) == pytest.approx(linear, rel=0.01)


def test_a_forward_pass_is_counted() -> None:
    model, shape = model_of("nano"), shape_of("nano")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(TOKENS)[None], use_cache=False)
    found = counter.get_flop_counts()["Global"]
    assert forward_flops(shape, TOKENS) == pytest.approx(sum(found.get(op, 0) for op in LINEAR), rel=0.01)
    head = shape.maps[-1]
    assert forward_flops(shape, TOKENS) - forward_flops(shape, TOKENS, 0.0) == 2 * TOKENS * head.d_in * head.d_out


def test_checkpointing_is_counted() -> None:
    """Every layer's forward pass again, the head's not; PEFT's own way to run it."""
    model = model_of("llama")
    shape = shape_of("llama")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear")).train()
    model.enable_input_require_grads()  # else nothing is computed again below the first adapter
    trained = Trained(shape.adapted(LoraConfig(4)), 4)
    linear, _ = counted(adapted)
    first = next(m for m in shape.maps if m.stage == 0)
    entry = 2.0 * ROWS * TOKENS * sum((m.products + 4 * m.d_in) for m in shape.maps if m.stage == first.stage)
    assert train_flops(shape, ROWS * TOKENS, None, trained, checkpointing=True) + entry == pytest.approx(linear, rel=0.01)


@pytest.mark.parametrize(
    ("name", "rank", "ratio"), [(LLAMA, 1, 0.667), (LLAMA, 32, 0.679), (LLAMA, 256, 0.763), (SMALL, 32, 0.713), (SMALL, 256, 1.03)]
)
def test_published_ratios(name: str, rank: int, ratio: float) -> None:
    """ "A third fewer" holds for thin adapters of wide models alone. The layers' maps, without the head, as the formula has it."""
    maps = shape_of(name).adapted(LoraConfig(1))
    assert formula_ratio(maps, maps, rank) == pytest.approx(ratio, abs=0.0051 if ratio > 1 else 0.00051)


def test_the_formula_is_the_count_of_a_deep_model() -> None:
    """The first layer's inputs, which the formula forgets, are one in eighty layers of three maps."""
    shape = shape_of("meta-llama/Llama-3.3-70B-Instruct")
    maps = shape.adapted(LoraConfig(8))
    exact = train_flops(shape, 1.0, None, Trained(maps, 8)) / train_flops(shape, 1.0)
    assert exact == pytest.approx(formula_ratio(shape.maps, maps, 8), rel=0.002)


def test_break_even() -> None:
    """At that rank an adapter saves nothing; for square matrices it is N / 6."""
    maps = shape_of(SMALL).adapted(LoraConfig(1))
    assert formula_ratio(maps, maps, 1) < 1
    edge = break_even_rank(maps, maps)
    assert formula_ratio(maps, maps, int(edge)) <= 1 < formula_ratio(maps, maps, int(edge) + 1)
    square = [m for m in shape_of(LLAMA).maps if m.name.endswith("q_proj")]
    assert break_even_rank(square, square) == pytest.approx(4096 / 6)


@pytest.mark.parametrize(("old", "ratio"), [(False, 0.75), (True, 0.80)])
def test_a_whole_step_saves_less(old: bool, ratio: float) -> None:
    """(1 + 2) / (1 + 3) with sampling, (2 + 2) / (2 + 3) with the log-probabilities again: no third."""
    shape = shape_of(LLAMA)
    work = StepWork(8, 16, 0.0, 1000.0, 1000.0, old)
    mine, full = (step_flops(shape, work, what) for what in (Trained(shape.adapted(LoraConfig(1)), 1), FULL))
    assert mine.linear / full.linear == pytest.approx(ratio, rel=0.02)
    assert mine.attention == full.attention


def test_checkpointing_saves_a_quarter() -> None:
    """(2 + 2) / (2 + 3) would be .8; with the forward pass twice it is (1 + 1 + 1) / (1 + 1 + 2)."""
    shape = shape_of(LLAMA)
    trained = Trained(shape.adapted(LoraConfig(1)), 1)
    ratio = train_flops(shape, 1.0, None, trained, checkpointing=True) / train_flops(shape, 1.0, checkpointing=True)
    assert ratio == pytest.approx(0.75, rel=0.02)


@given(st.integers(1, 300), st.integers(0, 100))
def test_attention_adds_up(length: int, more: int) -> None:
    """Causal pairs are half of all and the diagonal; a window caps what each sees; tokens one by one are the same pairs."""
    shape = shape_of("nano")
    causal, dense = attention_flops(shape, length), attention_flops(shape, length, causal=False)
    assert causal == pytest.approx(dense * (length + 1) / (2 * length))
    sliding = shape_of("mistral")
    (layers,) = sliding.attention
    pairs = sum(min(i + 1, 16) for i in range(length + more))
    assert attention_flops(sliding, length + more) == 2 * layers.layers * layers.heads * 2 * layers.qk_dim * pairs


def test_nothing_below_the_first_adapter_is_trained() -> None:
    """An adapter on the head alone needs no backward pass through the layers."""
    shape = shape_of("nano")
    head = shape.adapted(LoraConfig(1, target_modules=("lm_head",)))
    assert backward_flops(shape, 1.0, None, Trained(head, 1)) == 2 * (2 * 576 + 128)
