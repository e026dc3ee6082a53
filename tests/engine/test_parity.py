"""The engine against transformers and stock PEFT on the same weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_tools import (
    add_random_adapter,
    datum,
    gradients,
    logits_of,
    lora_engine,
    prompt,
    relative_error,
    sampled_datum,
    slot_of,
    target_logprobs,
)
from peft import PeftModel

from tiny_models import ARCHITECTURES, random_model
from veneer.store.adapters import write_adapter
from veneer.types import Floats, LoraConfig, SamplingParams

CONFIG = LoraConfig(rank=4, alpha=8)
everywhere = pytest.mark.parametrize("architecture", ARCHITECTURES)


def batch(rows: int = 3, length: int = 21) -> torch.Tensor:
    return torch.from_numpy(np.stack([prompt(length, seed) for seed in range(rows)]))


def open_in_peft(architecture: str, engine, name: str, folder, trainable: bool = False) -> PeftModel:
    write_adapter(folder, engine.save_state(name, "sampler").result(), {})
    return PeftModel.from_pretrained(random_model(architecture), folder, is_trainable=trainable).eval()


@everywhere
def test_base_and_fresh_adapter_are_transformers(architecture: str) -> None:
    """Adapters off must give the model that was downloaded, and a fresh adapter the same bits."""
    engine, untouched = lora_engine(architecture), random_model(architecture)
    engine.create_adapter("fresh", CONFIG)
    ids = batch()
    with torch.no_grad():
        wanted = untouched(input_ids=ids).logits
    base = logits_of(engine, None, ids)
    assert (base - wanted).abs().max() < 1e-5
    assert torch.equal(logits_of(engine, slot_of(engine, "fresh"), ids), base)


@everywhere
def test_base_is_bit_for_bit_beside_a_loud_adapter(architecture: str) -> None:
    """Adapter off must mean the base's output also after an adapter has run, and the adapter must do something."""
    engine, alone = lora_engine(architecture), lora_engine(architecture)
    add_random_adapter(engine, "loud", CONFIG, seed=1)
    ids = batch()
    loud = logits_of(engine, slot_of(engine, "loud"), ids)
    base = logits_of(engine, None, ids)
    assert torch.equal(base, logits_of(alone, None, ids))
    assert (loud - base).abs().max() > 0.1


@everywhere
@pytest.mark.parametrize("unembed", [False, True], ids=["body", "unembed"])
def test_written_adapter_opens_in_stock_peft(architecture: str, unembed: bool, tmp_path) -> None:
    """What is trained here must act the same where people serve it."""
    engine = lora_engine(architecture)
    add_random_adapter(engine, "x", LoraConfig(rank=4, alpha=8, train_unembed=unembed), seed=2)
    ids = batch()
    with torch.no_grad():
        wanted = open_in_peft(architecture, engine, "x", tmp_path / "x")(input_ids=ids).logits
        plain = random_model(architecture)(input_ids=ids).logits
    assert 1 < wanted.abs().max() < 20
    assert (wanted - plain).abs().max() > 0.1
    assert (logits_of(engine, slot_of(engine, "x"), ids) - wanted).abs().max() < 1e-5


@everywhere
@pytest.mark.parametrize("loss", ["cross_entropy", "importance_sampling"])
def test_gradients_equal_peft_and_autograd(architecture: str, loss: str, tmp_path) -> None:
    """A wrong gradient still trains a little; only a reference shows it."""
    engine = lora_engine(architecture)
    add_random_adapter(engine, "x", LoraConfig(rank=4, alpha=8, train_unembed=True), seed=3)
    reference = open_in_peft(architecture, engine, "x", tmp_path / "x", trainable=True)
    data = [datum(n, seed=n) for n in (24, 9, 17)]
    total = torch.zeros(())
    for row in data:
        lp, q = target_logprobs(reference, row), torch.from_numpy(row.logprobs)
        w, advantages = torch.from_numpy(row.mask), torch.from_numpy(row.advantages)
        total = total - (w * (lp if loss == "cross_entropy" else (lp - q).exp() * advantages)).sum()
    total.backward()
    output = engine.forward_backward("x", data, loss).result()
    assert output.metrics["loss:sum"] == pytest.approx(float(total.detach()), rel=1e-5)
    found = gradients(engine, "x")
    wanted = {
        name.removeprefix("base_model.model.").replace(".default.", "."): parameter.grad
        for name, parameter in reference.named_parameters()
        if parameter.requires_grad
    }
    assert set(found) == set(wanted)
    for name, gradient in wanted.items():
        assert relative_error(found[name], gradient) < 1e-5, name


@everywhere
def test_sampled_logprobs_are_those_of_forward(architecture: str) -> None:
    """Importance ratios are 1 only if the sampler, with its cache and padding, scores as the trainer does."""
    engine = lora_engine(architecture)
    for i, rank in enumerate((2, 4)):
        add_random_adapter(engine, f"a{i}", LoraConfig(rank=rank, alpha=8), seed=10 + i)
    params = SamplingParams(max_tokens=12, stop_token_ids=())
    asked = [(name, prompt(length, length)) for name in ("a0", None, "a1") for length in (3, 11, 26)]
    futures = [engine.sample(ids, name, params, n=2) for name, ids in asked]
    compared: list[float] = []
    for (name, ids), future in zip(asked, futures, strict=True):
        samples = future.result()
        data = [sampled_datum(ids, s.tokens, s.logprobs, s.adapter) for s in samples]
        output = engine.forward(name, data, "importance_sampling").result()
        for sample, scored in zip(samples, output.logprobs_D, strict=True):
            compared.append(float(np.abs(scored[len(ids) - 1 :] - sample.logprobs).max()))
            assert sample.logprobs.min() < -0.5, "sure tokens prove nothing"
    assert len(compared) == 18
    assert max(compared) < 1e-5


@everywhere
def test_fresh_samples_have_ratio_one(architecture: str) -> None:
    """`kl_sample_train` is the gauge users watch; on fresh samples it must read zero."""
    engine = lora_engine(architecture)
    add_random_adapter(engine, "x", CONFIG, seed=4)
    ids = prompt(9)
    samples = engine.sample(ids, "x", SamplingParams(max_tokens=16, stop_token_ids=()), n=4).result()
    data = [sampled_datum(ids, s.tokens, s.logprobs, s.adapter) for s in samples]
    metrics = engine.forward_backward("x", data, "importance_sampling").result().metrics
    assert metrics["tokens:sum"] == 64
    assert metrics["ratio:mean"] == pytest.approx(1, abs=1e-5)
    assert abs(metrics["kl_sample_train_v1:mean"]) < 1e-5
    assert 0 <= metrics["kl_sample_train_v2:mean"] < 1e-9
    assert metrics["loss:sum"] == pytest.approx(-64, rel=1e-5)


@everywhere
@pytest.mark.parametrize("adapter", ["x", None], ids=["adapter", "base"])
def test_prompt_logprobs_are_transformers_log_softmax(architecture: str, adapter: str | None, tmp_path) -> None:
    """Scoring a prompt must not depend on temperature or on what is sampled after it."""
    engine = lora_engine(architecture)
    add_random_adapter(engine, "x", CONFIG, seed=5)
    reference = random_model(architecture) if adapter is None else open_in_peft(architecture, engine, "x", tmp_path / "x")
    params = SamplingParams(max_tokens=2, temperature=0.5, top_k=3)
    futures = {n: engine.sample(prompt(n, n), adapter, params, prompt_logprobs=True) for n in (1, 5, 22)}
    for length, future in futures.items():
        (sample,) = future.result()
        scores: Floats | None = sample.prompt_logprobs
        assert scores is not None
        assert scores.shape == (length,)
        assert np.isnan(scores[0])
        ids = torch.from_numpy(prompt(length, length))
        with torch.no_grad():
            wanted = reference(input_ids=ids[None]).logits[0].log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
        np.testing.assert_allclose(scores[1:], wanted.numpy(), atol=1e-5, rtol=0)


@everywhere
@pytest.mark.parametrize("adapter", ["x", None], ids=["adapter", "base"])
def test_greedy_sampling_is_transformers_generate(architecture: str, adapter: str | None, tmp_path) -> None:
    """Evaluations at temperature 0 must be those of the model that users load elsewhere."""
    engine = lora_engine(architecture)
    add_random_adapter(engine, "x", CONFIG, seed=6)
    reference = random_model(architecture) if adapter is None else open_in_peft(architecture, engine, "x", tmp_path / "x")
    lengths = (2, 9, 30)  # shorter and longer than the sliding windows, and one batch
    futures = [engine.sample(prompt(n, n), adapter, SamplingParams(max_tokens=12, temperature=0.0)) for n in lengths]
    for length, future in zip(lengths, futures, strict=True):
        ids = torch.from_numpy(prompt(length, length))[None]
        wanted = reference.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert future.result()[0].tokens.tolist() == wanted[0, length:].tolist()
