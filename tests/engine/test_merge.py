"""Merging: the weights are those of PEFT's own merge, and whatever is not base plus adapter is refused."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from engine_tools import lora_engine, scrambled
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model

from tiny_models import ARCHITECTURES, random_model
from veneer.engine import FullEngine, LocalEngine, LoraEngine, load_base, merge
from veneer.engine.merge import Expected, add_update, expect, verify_merged, write_merged
from veneer.engine.stock import stock_logprobs
from veneer.types import AdapterError, AttestationError, Checkpoint, LoraConfig

START = np.arange(3, 19)


def random_adapter(engine: LocalEngine, config: LoraConfig, scale: float = 0.1, seed: int = 0) -> Checkpoint:
    engine.create_adapter("a", config)
    made = scrambled(engine.save_state("a", "sampler").result(), seed, scale)
    engine.load_state("a", made).result()
    return engine.save_state("a", "sampler").result()


def peft_merged(architecture: str, checkpoint: Checkpoint) -> Any:
    """The same update, merged by PEFT."""
    assert checkpoint.config is not None
    modules = sorted({key.rsplit(".lora_", 1)[0] for key in checkpoint.weights})
    config = PeftConfig(r=checkpoint.config.rank, lora_alpha=checkpoint.config.alpha, target_modules=modules, ensure_weight_tying=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = get_peft_model(random_model(architecture), config)
    assert isinstance(model, PeftModel)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".lora_" in key:
                name = key.removeprefix("base_model.model.").replace(".default.", ".")
                parameter.copy_(torch.from_numpy(checkpoint.weights[name]))
    return model.merge_and_unload()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_weights_are_pefts(architecture: str) -> None:
    """Every parameter of the model, on every family, against PEFT's merge_and_unload."""
    checkpoint = random_adapter(lora_engine(architecture), LoraConfig(rank=3, alpha=5.0))
    model = random_model(architecture)
    rounding = add_update(model, checkpoint)
    wanted = dict(peft_merged(architecture, checkpoint).named_parameters())
    found = dict(model.named_parameters())
    assert set(found) == set(wanted)
    for name, parameter in found.items():
        assert (parameter - wanted[name]).abs().max() < 1e-6, name
    plain = dict(random_model(architecture).named_parameters())
    moved = [name for name, parameter in found.items() if not torch.equal(parameter, plain[name])]
    assert len(moved) == rounding.modules == len(checkpoint.weights) // 2
    assert rounding.lost < 1e-6
    assert rounding.changed > 0.99


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_an_adapted_unembedding_gets_a_matrix_of_its_own(architecture: str, tmp_path: Path) -> None:
    """Where it was tied to the embedding, the embedding must stay as it was, in the files as well."""
    engine = lora_engine(architecture)
    checkpoint = random_adapter(engine, LoraConfig(rank=2, train_unembed=True))
    expected = expect(engine, "a", START)
    model = random_model(architecture)
    embedding = model.get_input_embeddings().weight.clone()
    assert add_update(model, checkpoint).untied == (architecture == "qwen3")
    model.save_pretrained(tmp_path)
    assert not json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"]
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.get_input_embeddings().weight, embedding)
    assert not torch.equal(loaded.get_output_embeddings().weight, embedding)
    gaps = verify_merged(tmp_path, expected, "float32")
    assert gaps.adapter < 1e-4
    assert gaps.base > 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_whole_folder(dtype: str, tmp_path: Path) -> None:
    """Written, read back by stock transformers, with tokenizer and template; the sum is rounded once, to the nearest."""
    engine = LoraEngine(load_base("nano"))
    checkpoint = random_adapter(engine, LoraConfig(rank=8), scale=0.05)
    expected = expect(engine, "a", START)
    rounding = write_merged("nano", checkpoint, tmp_path, dtype)
    gaps = verify_merged(tmp_path, expected, rounding.dtype)
    assert rounding.dtype == dtype
    assert gaps.adapter_rms < gaps.base_rms / 4
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "1+1=?"}], tokenize=False)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    name = "model.layers.1.mlp.down_proj"
    a, b = (checkpoint.weights[f"{name}.lora_{side}.weight"].astype(np.float64) for side in "AB")
    exact = load_base("nano").model.get_parameter(f"{name}.weight").double() + torch.from_numpy(4.0 * b @ a)
    assert torch.equal(loaded.get_parameter(f"{name}.weight"), exact.to(getattr(torch, dtype)))


def test_stock_logprobs_are_the_engines(tmp_path: Path) -> None:
    """The reference and the engine agree before any adapter comes in."""
    engine = lora_engine("llama")
    random_adapter(engine, LoraConfig(rank=1))
    expected = expect(engine, "a", START)
    found = stock_logprobs(random_model("llama"), expected.rows)
    assert max(np.abs(f - b).max() for f, b in zip(found, expected.base, strict=True)) < 1e-4


# ---------------------------------------------------------------- what must not get through (verl#7285, prime-rl#1707)


@pytest.fixture(scope="module")
def nano() -> tuple[Checkpoint, Expected]:
    engine = LoraEngine(load_base("nano"))
    checkpoint = random_adapter(engine, LoraConfig(rank=2), scale=0.05)
    return checkpoint, expect(engine, "a", START)


def test_a_merge_that_leaves_the_base_is_told(nano: tuple[Checkpoint, Expected], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop over modules finds nothing, and the base's weights are written under the adapter's name."""
    checkpoint, expected = nano
    monkeypatch.setattr(merge, "_updates", lambda weights: {})
    monkeypatch.setattr(merge, "add_update", lambda model, *rest: model)
    write_merged("nano", checkpoint, tmp_path, None)
    with pytest.raises(AttestationError, match="says what the base says: the update is not in its weights"):
        verify_merged(tmp_path, expected, "float32")


@pytest.mark.parametrize("fault", ["half of the modules", "no scale", "twice"])
def test_a_merge_of_something_else_is_told(nano: tuple[Checkpoint, Expected], tmp_path: Path, fault: str) -> None:
    checkpoint, expected = nano
    assert checkpoint.config is not None
    weights, config = dict(checkpoint.weights), checkpoint.config
    if fault == "half of the modules":
        weights = {key: array for key, array in weights.items() if "mlp" not in key}
    config = dataclasses.replace(config, alpha={"no scale": 2.0, "twice": 64.0}.get(fault, config.alpha))
    write_merged("nano", dataclasses.replace(checkpoint, weights=weights, config=config), tmp_path, None)
    with pytest.raises(AttestationError, match=r"is not base and adapter \(it is off by up to"):
        verify_merged(tmp_path, expected, "float32")


def test_an_update_that_rounding_swallows_is_told(tmp_path: Path) -> None:
    """After a few steps most of an update lies below the last bit of a bfloat16 weight."""
    engine = LoraEngine(load_base("nano"))
    checkpoint = random_adapter(engine, LoraConfig(rank=1), scale=5e-4)
    expected = expect(engine, "a", START)
    rounding = write_merged("nano", checkpoint, tmp_path, "bfloat16")
    assert rounding.lost > 0.9
    with pytest.raises(AttestationError, match=r"If rounding to bfloat16 loses it, merge with --dtype float32, or serve the adapter"):
        verify_merged(tmp_path, expected, rounding.dtype)


def test_an_adapter_without_effect_is_not_merged() -> None:
    engine = lora_engine("llama")
    engine.create_adapter("a", LoraConfig(rank=1))
    with pytest.raises(AttestationError, match="changes no log-probability: merged, it would be the base again"):
        expect(engine, "a", START)


def test_what_cannot_be_merged_is_refused(nano: tuple[Checkpoint, Expected], tmp_path: Path) -> None:
    """Another base, a module that is not there, a shape that does not fit, a full copy."""
    checkpoint, _ = nano
    first = {key: array for key, array in checkpoint.weights.items() if "layers.0.mlp.down_proj" in key}
    other = dataclasses.replace(checkpoint, adapter=dataclasses.replace(checkpoint.adapter, base_digest="0" * 64))
    with pytest.raises(AdapterError, match="was made for base 'nano' \\(000000000000\\)"):
        write_merged("nano", other, tmp_path, None)
    with pytest.raises(AdapterError, match=r"adapts model.layers.0.mlp.down_proj, which is no linear map of this base"):
        add_update(random_model("gpt_neox"), checkpoint)
    with pytest.raises(AdapterError, match=r"down_proj is \(32, 48\), its update \(128, 512\)"):
        add_update(random_model("llama"), dataclasses.replace(checkpoint, weights=first))
    full = FullEngine(load_base("nano"))
    full.create_adapter("copy", None)
    with pytest.raises(AdapterError, match="fully fine-tuned copy"):
        add_update(random_model("llama"), full.save_state("copy", "sampler").result())
