"""The ways in which a pass is made fast, against transformers with plain attention and PEFT, which are slow and right."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import transformers as hf
from engine_tools import (
    FREE,
    VOCAB,
    add_random_adapter,
    count_passes,
    datum,
    gradients,
    logits_of,
    prompt,
    relative_error,
    slot_of,
    target_logprobs,
)
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from peft import PeftModel

from tiny_models import CONFIGS, SMALL, random_model
from veneer import engine as engine_module
from veneer.engine import Base, LocalEngine, LoraEngine, compiled
from veneer.engine import logprobs as logprobs_module
from veneer.engine.flat import TILE
from veneer.engine.logprobs import target_logprobs as logprobs_of
from veneer.engine.lora import LoraStack
from veneer.engine.rows import Rows
from veneer.store.adapters import write_adapter
from veneer.types import AdamParams, Datum, LoraConfig, Sample, SamplingParams

MORE = {
    "qwen2": lambda: hf.Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen2-untied": lambda: hf.Qwen2Config(**SMALL, tie_word_embeddings=False),
    "qwen2-slides": lambda: hf.Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=16, max_window_layers=1),
    "llama-mha": lambda: hf.LlamaConfig(**SMALL | {"num_key_value_heads": 4}, tie_word_embeddings=True),
    "llama-biases": lambda: hf.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "llama-scaled": lambda: hf.LlamaConfig(
        **SMALL,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "mistral-wide": lambda: hf.MistralConfig(**SMALL, sliding_window=40),
    "mistral-all": lambda: hf.MistralConfig(**SMALL, sliding_window=None),
}
FUSED = ("qwen3", "llama", "mistral", *MORE)
PLAIN = ("gemma", "gemma2", "phi", "gpt_neox")
WAYS = ("compiled", "thick", "torch")
"""Float32 on a CPU runs compiled loops, with adapters from some rank on beside them; what runs on a GPU is torch's, and is held against
the same references here."""
RANDOM_SHAPES = st.lists(st.integers(2, 100), min_size=1, max_size=4)


def fresh_model(kind: str) -> hf.PreTrainedModel:
    """Large weights, biases included, and the plain attention of transformers."""
    torch.manual_seed(0)
    config = (MORE | CONFIGS)[kind]()
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or name.endswith("bias"):
                parameter.normal_(0, 0.2)
    return model


@contextmanager
def going(way: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if way == "torch":
            patch.setattr(compiled, "runs_on", lambda x: False)
        if way == "thick":
            patch.setattr(compiled, "THIN", 3)
        yield


def fast_engine(kind: str) -> LocalEngine:
    engine = LoraEngine(Base(kind, fresh_model(kind), None))
    for i, rank in enumerate((1, 4, 9)):
        add_random_adapter(engine, f"r{rank}", LoraConfig(rank=rank, alpha=8, train_unembed=rank == 4), seed=i)
    return engine


def reference(kind: str, engine: LocalEngine, name: str | None, folder) -> hf.PreTrainedModel | PeftModel:
    """Plain transformers, or stock PEFT over it."""
    model = fresh_model(kind)
    if name is None:
        return model
    write_adapter(folder / name, engine.save_state(name, "sampler").result(), {})
    return PeftModel.from_pretrained(model, folder / name, is_trainable=True).eval()


def grads_of(model: PeftModel, data: Sequence[Datum]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    total = sum((-(torch.from_numpy(row.mask) * target_logprobs(model, row)).sum() for row in data), start=torch.zeros(()))
    total.backward()
    named = ((n.removeprefix("base_model.model.").replace(".default.", "."), p) for n, p in model.named_parameters())
    return {name: parameter.grad for name, parameter in named if parameter.requires_grad}


def assert_close(engine: LocalEngine, name: str, wanted: dict[str, torch.Tensor], limit: float = 1e-5) -> None:
    found = gradients(engine, name)
    assert set(found) == set(wanted)
    whole = torch.sqrt(sum(g.square().sum() for g in wanted.values()))
    for key, gradient in wanted.items():  # a map behind a softmax over one key has a gradient of rounding noise alone
        assert torch.linalg.vector_norm(found[key] - gradient) < limit * max(torch.linalg.vector_norm(gradient), 1e-3 * whole), key


# ---------------------------------------------------------------- against the eager reference


@pytest.mark.parametrize("kind", [*FUSED, *PLAIN])
def test_who_takes_the_fused_way(kind: str) -> None:
    """A model that falls back silently is slow, and one that is fused by mistake is wrong."""
    assert (LoraEngine(Base(kind, fresh_model(kind), None))._stack.fused is not None) == (kind in FUSED)


@pytest.mark.parametrize("kind", [*FUSED, "gemma2"])
def test_logits_are_those_of_plain_attention_past_every_window(kind: str, tmp_path) -> None:
    """The check on loading reads 24 tokens; what is served reads more."""
    engine = fast_engine(kind)
    ids = torch.from_numpy(np.stack([prompt(100, seed) for seed in range(2)]))
    for name in (None, "r1", "r4", "r9"):
        with torch.no_grad():
            wanted = reference(kind, engine, name, tmp_path)(input_ids=ids).logits
        assert (logits_of(engine, None if name is None else slot_of(engine, name), ids) - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("kind", ["qwen3", "llama", "mistral", "mistral-wide", "qwen2", "qwen2-slides", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=3, deadline=None, derandomize=True, phases=[Phase.generate])
@given(lengths=st.lists(st.tuples(st.sampled_from([None, "r1", "r4", "r9"]), RANDOM_SHAPES), min_size=1, max_size=4))
def test_ragged_mixed_passes_are_the_reference_row_by_row(kind: str, way: str, tmp_path_factory, lengths) -> None:
    """Base and adapters of any ranks in one line, scored and trained."""
    folder = tmp_path_factory.mktemp("adapters")
    merged = {name: [n for other, shape in lengths if other == name for n in shape] for name, _ in lengths}
    data = {name: [datum(n, seed=i + n) for i, n in enumerate(shape)] for name, shape in merged.items()}
    with going(way):
        engine = fast_engine(kind)
        futures = {
            name: engine.forward(None, rows, "cross_entropy") if name is None else engine.forward_backward(name, rows, "cross_entropy")
            for name, rows in data.items()
        }
        outputs = {name: future.result() for name, future in futures.items()}
    for name, rows in data.items():
        model = reference(kind, engine, name, folder)
        output = outputs[name]
        for row, found in zip(rows, output.logprobs_D, strict=True):
            wanted = target_logprobs(model, row).detach().numpy()
            assert np.abs(np.where(row.mask != 0, found - wanted, 0)).max() < 1e-5 * max(1, np.abs(wanted).max())
        if name is not None:
            assert_close(engine, name, grads_of(model, rows))


def check_samples(kind: str, engine: LocalEngine, asked: list[tuple[str | None, int]], samples: list[list[Sample]], folder) -> None:
    for (name, n), group in zip(asked, samples, strict=True):
        model = reference(kind, engine, name, folder)
        for sample in group:
            ids = torch.from_numpy(np.concatenate([prompt(n), sample.tokens]))
            with torch.no_grad():
                lp = model(input_ids=ids[None]).logits[0].log_softmax(-1)[n - 1 : -1].gather(1, ids[n:, None])[:, 0].numpy()
            assert np.abs(lp - sample.logprobs).max() < 1e-5 * max(1, np.abs(lp).max())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["qwen3", "mistral-wide", "gemma2", "phi", "llama-biases"])
def test_samples_are_scored_as_the_reference_scores_them(kind: str, way: str, tmp_path) -> None:
    """Rows of many lengths that decode together past windows and banks."""
    asked = [(name, n) for name in (None, "r1", "r4", "r9") for n in (2, 29, 61)]
    with going(way):
        engine = fast_engine(kind)
        futures = [engine.sample(prompt(n), name, SamplingParams(40, stop_token_ids=()), 2) for name, n in asked]
        samples = [future.result() for future in futures]
    check_samples(kind, engine, asked, samples, tmp_path)


@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
def test_a_stack_of_equal_adapters_is_scored_as_the_reference_scores_them(kind: str, tmp_path) -> None:
    """Where no loop is compiled, neighbours of one shape with equally many rows are one batched product."""
    asked = [(name, n) for name in ("a", "b", "c", "d") for n in (20, 33)]
    with going("torch"):
        engine = LoraEngine(Base(kind, fresh_model(kind), None))
        for i, name in enumerate("abcd"):
            add_random_adapter(engine, name, LoraConfig(rank=4, alpha=8), seed=i)
        assert engine._stack.stackable([slot_of(engine, name) for name in "abcd"])
        futures = [engine.sample(prompt(n), name, SamplingParams(10, stop_token_ids=()), 8) for name, n in asked]
        samples = [future.result() for future in futures]
    check_samples(kind, engine, asked, samples, tmp_path)


# ---------------------------------------------------------------- how a batch is cut and kept


def checkpointing(kind: str) -> LocalEngine:
    base = Base(kind, fresh_model(kind), None)
    try:
        return LoraEngine(base, gradient_checkpointing=True)
    except TypeError:
        return engine_module.LocalEngine(base, LoraStack(base, gradient_checkpointing=True))


@pytest.mark.parametrize("kind", ["qwen3", "mistral", "qwen2", "gemma2", "gpt_neox"])
def test_gradient_checkpointing_gives_the_same_gradients(kind: str) -> None:
    """Less memory for more time, and nothing else."""
    saving, keeping = checkpointing(kind), LoraEngine(Base(kind, fresh_model(kind), None))
    for engine in (saving, keeping):
        for name in "xy":
            add_random_adapter(engine, name, LoraConfig(rank=4, alpha=8, train_unembed=name == "x"), seed=1)
        futures = [engine.forward_backward(name, [datum(n, n) for n in (40, 9, 21)], "ppo") for name in "xy"]
        assert len({future.result().metrics["loss:sum"] for future in futures}) == 2
    for name in "xy":
        for key, wanted in gradients(keeping, name).items():
            assert relative_error(gradients(saving, name)[key], wanted) < 1e-6, key


def family(prefix: int, lengths: Sequence[int], seed: int = 0) -> list[Datum]:
    """Completions of one prompt: the same tokens before, no weight on them."""
    head, rows = prompt(prefix + 1, seed), []
    for i, length in enumerate(lengths):
        tail = prompt(length, seed + 1 + i)
        row = np.concatenate([head, tail])
        mask = np.zeros(len(row) - 1, np.float32)
        mask[prefix:] = 1
        rows.append(Datum(row[:-1], row[1:], -4 * mask, mask * (1 + i), mask))
    return rows


def holes(length: int, pattern: Sequence[int], seed: int = 0) -> Datum:
    row = datum(length, seed)
    mask = np.resize(np.array(pattern, np.float32), length)
    return dataclasses.replace(row, mask=mask, logprobs=row.logprobs * mask)


MASKS = {
    "one-prompt": family(30, (12, 3, 25, 1)),
    "two-prompts": family(30, (12, 3)) + family(7, (5, 1, 30), seed=9) + family(30, (4,)),
    "holes": [holes(20, (0, 1, 0, 0, 1)), holes(33, (1, 0), 2), holes(9, (0, 0, 1), 3)],
    "turns": [holes(60, [0] * 10 + [1] * 8 + [0] * 12 + [1] * 5, i) for i in range(3)],
    "from-the-start": [holes(17, [1], 1), holes(40, [1] * 9 + [0] * 31, 2), holes(1, [1], 3)],
    "last-only": [holes(30, [0] * 29 + [1], 1), holes(30, [0] * 29 + [1], 1), holes(12, [0] * 12, 2)],
}


@pytest.mark.parametrize("kind", ["qwen3", "mistral", "gemma2"])
@pytest.mark.parametrize("masks", MASKS)
def test_data_trained_together_is_the_data_trained_one_by_one(masks: str, kind: str, tmp_path) -> None:
    """Prompts that are read once, and turns between which nothing is trained, must give the gradient of plain rows."""
    engine, single = fast_engine(kind), fast_engine(kind)
    data = MASKS[masks]
    output = engine.forward_backward("r4", data, "cross_entropy").result()
    for row, found in zip(data, output.logprobs_D, strict=True):
        one = single.forward_backward("r4", [row], "cross_entropy").result().logprobs_D[0]
        np.testing.assert_allclose(found, one, atol=2e-5, rtol=0)
        assert np.array_equal(np.isnan(found), row.mask == 0)
    assert_close(engine, "r4", gradients(single, "r4"))
    assert_close(engine, "r4", grads_of(reference(kind, engine, "r4", tmp_path), data))


@pytest.mark.parametrize("requests", [1, 3])
def test_a_pass_runs_the_tokens_that_are_needed_and_no_others(requests: int) -> None:
    """Padding is compute that users pay for and get nothing from."""
    engine = fast_engine("qwen3")
    calls = count_passes(engine)
    names = ("r1", "r4", "r9")[:requests]
    futures = [engine.forward_backward(name, MASKS["two-prompts"], "cross_entropy") for name in names]
    assert all(future.result() for future in futures)
    once = 30 + (12 + 3 + 4) + 7 + (5 + 1 + 30)
    assert sum(calls) == requests * once
    calls.clear()
    futures = [engine.sample(prompt(n), name, SamplingParams(3, stop_token_ids=()), 8) for name in names for n in (5, 40)]
    assert all(future.result() for future in futures)
    assert calls[0] == requests * 45
    assert calls[1:] == [TILE * requests] * 2


# ---------------------------------------------------------------- log-probabilities and updates


class CountingHead:
    """A head that notes how many logits it made at a time."""

    def __init__(self, head, sizes: list[int]) -> None:
        self.head, self.sizes = head, sizes
        self.vocab_size, self.frozen_weight = head.vocab_size, head.frozen_weight

    def __call__(self, hidden: torch.Tensor, start: int) -> torch.Tensor:
        logits = self.head(hidden, start)
        self.sizes.append(logits.numel())
        return logits


@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
@pytest.mark.parametrize("adapted", [False, True], ids=["plain-head", "adapted-head"])
def test_logits_in_pieces_give_the_same_values_and_gradients(adapted: bool, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 150,000 words the logits of a pass are larger than the model; they must never be there at once."""
    found, at_once = {}, 20 * VOCAB
    for limit in (at_once, 2**22):
        monkeypatch.setitem(logprobs_module.LOGITS_AT_ONCE, "cpu", limit)
        engine, sizes = LoraEngine(Base(kind, fresh_model(kind), None)), list[int]()
        for name in "xy":
            add_random_adapter(engine, name, LoraConfig(rank=3, alpha=8, train_unembed=adapted), seed=ord(name))
        inner = engine._stack._head
        monkeypatch.setattr(engine._stack, "_head", lambda *args, inner=inner, sizes=sizes: CountingHead(inner(*args), sizes))
        futures = [engine.forward_backward(name, [datum(90, 1), datum(31, 2), datum(7, 3)], "cross_entropy") for name in "xy"]
        values = np.concatenate([lp for future in futures for lp in future.result().logprobs_D])
        scored = engine.sample(prompt(100), "x", FREE, prompt_logprobs=True).result()[0].prompt_logprobs
        found[limit] = values, scored, {name: gradients(engine, name) for name in "xy"}
        assert sum(sizes) > 100 * VOCAB
        assert limit > at_once or max(sizes) <= at_once
    (small, small_scores, small_grads), (large, large_scores, large_grads) = found[at_once], found[2**22]
    np.testing.assert_allclose(small, large, atol=1e-6 * np.nanmax(np.abs(large)), rtol=0)
    np.testing.assert_allclose(small_scores, large_scores, atol=1e-5, rtol=0)
    for name in "xy":
        for key, wanted in large_grads[name].items():
            assert relative_error(small_grads[name][key], wanted) < 2e-6, key


@settings(max_examples=15, deadline=None, derandomize=True)
@given(rows=st.integers(1, 70), at_once=st.integers(16, 40), seed=st.integers(0, 99))
def test_gradients_through_pieces_of_logits_are_autograds(rows: int, at_once: int, seed: int) -> None:
    """The gradient that is known in the forward pass must be the one that autograd finds."""
    base = Base("llama", random_model("llama"), None)
    rng = torch.Generator().manual_seed(seed)
    hidden, weights = torch.randn(rows, 32, generator=rng), torch.randn(rows, generator=rng)
    targets = torch.randint(0, VOCAB, (rows,), generator=rng)
    plain, ours = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    wanted = base.head(plain).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (wanted * weights).sum().backward()
    before = logprobs_module.LOGITS_AT_ONCE["cpu"]
    logprobs_module.LOGITS_AT_ONCE["cpu"] = at_once * VOCAB
    try:
        found = logprobs_of(ours, targets, engine_module.base.PlainHead(base))
    finally:
        logprobs_module.LOGITS_AT_ONCE["cpu"] = before
    (found * weights).sum().backward()
    assert (found - wanted).abs().max() < 1e-5
    assert relative_error(ours.grad, plain.grad) < 1e-5


@settings(max_examples=12, deadline=None, derandomize=True)
@given(slots=st.lists(st.integers(0, 5), min_size=1, max_size=6, unique=True), steps=st.integers(1, 3), seed=st.integers(0, 99))
def test_one_update_of_many_rows_is_an_update_of_each(slots: list[int], steps: int, seed: int) -> None:
    """Optimizer steps that are due together run together, each with its own settings, and as torch's AdamW would."""
    rng = np.random.default_rng(seed)
    sizes = [int(rng.integers(1, 200)) for _ in range(6)]
    params = {
        s: AdamParams(float(rng.choice([1e-3, 1e-1])), eps=1e-8, weight_decay=float(rng.choice([0, 0.1])), grad_clip_norm=float(s % 2))
        for s in slots
    }
    many, single = Rows(torch.device("cpu")), Rows(torch.device("cpu"))
    start = {}
    for rows in (many, single):
        for i, size in enumerate(sizes):
            assert rows.claim(size) == i
            start[i] = torch.from_numpy(np.random.default_rng([seed, i]).normal(0, 1, size).astype(np.float32))
            rows.open(i).weights[:] = start[i]
    models = {s: torch.nn.Parameter(start[s].clone()) for s in slots}
    optimizers = {
        s: torch.optim.AdamW([models[s]], lr=p.learning_rate, betas=(p.beta1, p.beta2), eps=p.eps, weight_decay=p.weight_decay)
        for s, p in params.items()
    }
    for _ in range(steps):
        for s in slots:
            g = torch.from_numpy(rng.normal(0, 1, sizes[s]).astype(np.float32))
            many.open(s).grad[:] = single.open(s).grad[:] = g
            norm = float(torch.linalg.vector_norm(g))
            models[s].grad = g / norm if params[s].grad_clip_norm and norm > 1 else g
            optimizers[s].step()
        assert many.adam(slots, [params[s] for s in slots]) == [single.adam([s], [params[s]])[0] for s in slots]
    for s in range(6):
        for field in ("weights", "m", "v", "grad"):
            assert torch.equal(getattr(many.open(s), field), getattr(single.open(s), field)), field
    for s in slots:
        assert (many.training(s) - models[s].detach()).abs().max() < 1e-6 * max(1, models[s].detach().abs().max())
