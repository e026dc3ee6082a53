"""A bfloat16 base under float32 adapters, on a CPU everywhere and on a GPU where there is one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_tools import FREE, VOCAB, add_random_adapter, datum, gradients, logits_of, prompt, row_bytes, sampled_datum, slot_of
from peft import PeftModel

from tiny_models import ARCHITECTURES, random_model
from veneer.engine import Base, LocalEngine, LoraEngine
from veneer.store.adapters import write_adapter
from veneer.types import AdamParams, LoraConfig, SamplingParams

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: parity on a GPU is not checked here")
pytestmark = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=no_gpu)])
CONFIG = LoraConfig(rank=4, alpha=8)


def model_on(device: str, architecture: str, dtype: torch.dtype):
    """Weights in ``dtype``; buffers, such as rotary frequencies, stay float32 as from_pretrained leaves them."""
    model = random_model(architecture).to(device)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def engine_on(device: str, architecture: str, dtype: torch.dtype = torch.bfloat16) -> LocalEngine:
    return LoraEngine(Base(architecture, model_on(device, architecture, dtype), None))


def batch(device: str) -> torch.Tensor:
    return torch.from_numpy(np.stack([prompt(21, seed) for seed in range(3)])).to(device)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fresh_adapter_is_the_base_bit_for_bit(device: str, architecture: str) -> None:
    """In bfloat16 too an adapter of zeros adds exactly nothing, and the base is transformers' within its rounding."""
    engine = engine_on(device, architecture)
    engine.create_adapter("fresh", CONFIG)
    ids = batch(device)
    with torch.no_grad():
        wanted = model_on(device, architecture, torch.bfloat16)(input_ids=ids).logits.float()
    base = logits_of(engine, None, ids)
    assert torch.equal(logits_of(engine, slot_of(engine, "fresh"), ids), base)
    assert (base - wanted).abs().max() < 0.05 * wanted.abs().max()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_float32_equals_peft(device: str, architecture: str, tmp_path) -> None:
    """Without bfloat16's rounding a GPU must agree with stock PEFT nearly as closely as the CPU does."""
    engine = engine_on(device, architecture, torch.float32)
    add_random_adapter(engine, "x", CONFIG, seed=2)
    write_adapter(tmp_path / "x", engine.save_state("x", "sampler").result(), {})
    reference = PeftModel.from_pretrained(model_on(device, architecture, torch.float32), tmp_path / "x").eval()
    ids = batch(device)
    with torch.no_grad():
        wanted = reference(input_ids=ids).logits
    assert (logits_of(engine, slot_of(engine, "x"), ids) - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("entropy_coef", [0.0, 100.0], ids=["loss", "entropy"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bfloat16_gradients_point_where_float32s_do(device: str, architecture: str, entropy_coef: float) -> None:
    """Rounding of the base may blur the gradient (bfloat16 has 8 bits), not turn it; that of an entropy bonus neither."""
    flat = []
    loss = ("importance_sampling", {"entropy_coef": entropy_coef}) if entropy_coef else ("cross_entropy", None)
    for dtype in (torch.bfloat16, torch.float32):
        engine = engine_on(device, architecture, dtype)
        add_random_adapter(engine, "x", CONFIG, seed=3)
        engine.forward_backward("x", [datum(n, seed=n) for n in (24, 9, 17)], *loss).result()
        found = gradients(engine, "x")
        assert all(g.dtype == torch.float32 for g in found.values())
        flat.append(torch.cat([found[key].reshape(-1) for key in sorted(found)]))
    assert torch.nn.functional.cosine_similarity(flat[0], flat[1], dim=0) > 0.98
    assert 0.9 < flat[0].norm() / flat[1].norm() < 1.1


def test_a_life_in_bfloat16(device: str) -> None:
    """Sample, train, publish, sample: logprobs agree within bfloat16, the base's digest stays, neighbours stay bitwise."""
    engine = engine_on(device, "qwen3")
    digest = engine.base_digest
    for i, name in enumerate("xy"):
        add_random_adapter(engine, name, CONFIG, seed=i)
    samples = engine.sample(prompt(9), "x", SamplingParams(max_tokens=16, stop_token_ids=()), n=4).result()
    assert all(s.tokens.min() >= 0 and s.tokens.max() < VOCAB for s in samples)
    data = [sampled_datum(prompt(9), s.tokens, s.logprobs, s.adapter) for s in samples]
    output = engine.forward_backward("x", data, "importance_sampling").result()
    assert output.metrics["ratio:mean"] == pytest.approx(1, abs=0.03)
    kept = row_bytes(engine, "y")
    engine.optim_step("x", AdamParams(1e-2)).result()
    published = engine.publish("x").result()
    assert engine.sample(prompt(9), "x", FREE).result()[0].adapter == published
    assert row_bytes(engine, "y") == kept
    assert engine.measure_base_digest() == digest


def test_loading_in_bfloat16_is_what_transformers_loads(device: str) -> None:
    """The bundled base in bfloat16 gives transformers' own bfloat16 logits, and keeps its identity: adapters made in float32 fit."""
    from transformers import AutoModelForCausalLM

    from veneer.assets import NANO_FOLDER
    from veneer.engine import load_base

    base = load_base("nano", device, torch.bfloat16)
    wanted = AutoModelForCausalLM.from_pretrained(NANO_FOLDER, dtype=torch.bfloat16).to(device).eval()
    for name, parameter in wanted.named_parameters():
        assert torch.equal(base.model.get_parameter(name), parameter), name
    for name, buffer in wanted.named_buffers():
        assert torch.equal(base.model.get_buffer(name), buffer), name
    assert base.digest == load_base("nano", "cpu").digest
    assert base.measure_digest() != base.digest
