"""Adapters that were made with stock PEFT and imported: the engine's logits are those of PEFT's own model; stacks, those of PEFT's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers as hf
from engine_tools import logits_of, slot_of

from tiny_models import random_model
from veneer.assets import NANO_FOLDER
from veneer.engine import Base, LocalEngine, LoraEngine, load_base
from veneer.store.foreign import read_peft
from veneer.store.stack import stack_adapters
from veneer.types import Checkpoint

LINEARS = {
    **dict.fromkeys(("nano", "qwen3", "llama"), ("q_proj", "v_proj", "down_proj")),
    "gpt_neox": ("query_key_value", "dense", "dense_4h_to_h"),
}
LIMIT = 2e-6
"""Of the difference between two logits, as a share of the largest (4 to 5 in the random models, 22 in nano): below 1e-5 in the random
models. PEFT's own logits in float32 are as far from those in float64."""


def model_of(architecture: str) -> hf.PreTrainedModel:
    return hf.AutoModelForCausalLM.from_pretrained(NANO_FOLDER).eval() if architecture == "nano" else random_model(architecture)


def engine_of(architecture: str) -> LocalEngine:
    return LoraEngine(load_base("nano") if architecture == "nano" else Base(architecture, random_model(architecture), None))


def tokens_of(architecture: str) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(4).integers(3, 300 if architecture == "nano" else 97, (3, 21)))


def wrapped(architecture: str, seed: int = 0, name: str = "default", into: Any = None, **options: Any) -> Any:
    """Stock PEFT's model with an adapter whose A and B are random; its update moves the logits visibly."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8, "target_modules": list(LINEARS[architecture]), **options})
    if into is None:
        model = peft.get_peft_model(model_of(architecture), config, adapter_name=name).eval()
    else:
        model = into
        model.add_adapter(name, config)
    torch.manual_seed(seed)
    for key, parameter in model.named_parameters():
        if f"lora_B.{name}" in key:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def imported(folder: Path, engine: LocalEngine) -> Checkpoint:
    return read_peft(folder, folder.name, engine.base_id, engine.base_digest)[0]


def check_same_logits(engine: LocalEngine, checkpoint: Checkpoint, model: Any, architecture: str) -> None:
    engine.load_state("imported", checkpoint).result()
    tokens = tokens_of(architecture)
    with torch.no_grad():
        expected = model(tokens).logits
        with model.disable_adapter():
            base = model(tokens).logits
    limit = LIMIT * float(expected.abs().max())
    assert (expected - base).abs().max() > 1000 * limit, "an adapter that does nothing proves nothing"
    assert (logits_of(engine, slot_of(engine, "imported"), tokens) - expected).abs().max() < limit


def patterns(architecture: str) -> dict[str, Mapping[str, Any]]:
    one, two, three = LINEARS[architecture]
    return {
        "plain": {},
        "rsLoRA": {"use_rslora": True, "lora_alpha": 3},
        "ranks": {"rank_pattern": {one: 1, rf"layers\.1\..*{three}": 8}},
        "alphas": {"alpha_pattern": {rf"layers\.0\..*({one}|{two})": 1, two: 16}},
        "both": {"rank_pattern": {one: 2}, "alpha_pattern": {one: 2, three: 16}},
        "both and rsLoRA": {"use_rslora": True, "rank_pattern": {one: 16}, "alpha_pattern": {two: 2}},
    }


CASES = [(architecture, case) for architecture in LINEARS for case in patterns(architecture)]


@pytest.mark.parametrize(("architecture", "case"), CASES, ids=[f"{a}-{c}" for a, c in CASES])
def test_logits_are_pefts(tmp_path: Path, architecture: str, case: str) -> None:
    """An adapter that was trained elsewhere answers here as it does there, whatever its ranks and scales. (PEFT sorts the keys of its
    patterns when it saves: the folder, read again, is what counts.)"""
    wrapped(architecture, **patterns(architecture)[case]).save_pretrained(tmp_path / "theirs")
    engine, model = engine_of(architecture), peft.PeftModel.from_pretrained(model_of(architecture), tmp_path / "theirs").eval()
    check_same_logits(engine, imported(tmp_path / "theirs", engine), model, architecture)


@pytest.mark.parametrize("architecture", LINEARS)
def test_logits_of_stacks_are_pefts(tmp_path: Path, architecture: str) -> None:
    """Several adapters with scales as one: PEFT's concatenation, with ranks, scales and targets that differ."""
    engine, (one, two, three) = engine_of(architecture), LINEARS[architecture]
    model = wrapped(architecture, 1, "first", r=2, target_modules=[one, two])
    wrapped(architecture, 2, "second", model, r=3, lora_alpha=7, target_modules=[two, three])
    wrapped(architecture, 3, "third", model, use_rslora=True, target_modules=[three])
    model.save_pretrained(tmp_path)
    scales = {"first": 1.0, "second": -0.7, "third": 1.9}
    model.add_weighted_adapter(list(scales), list(scales.values()), "sum", combination_type="cat")
    model.set_adapter("sum")
    stack = stack_adapters([(imported(tmp_path / name, engine), scale) for name, scale in scales.items()], "sum")
    assert stack.config is not None
    assert stack.config.rank == 2 + 3 + 4
    check_same_logits(engine, stack, model, architecture)
