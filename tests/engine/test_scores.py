"""Likeliest tokens and log-probabilities of a prompt, held against transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_tools import VOCAB, add_random_adapter, lora_engine, prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TopKLogitsWarper, TopPLogitsWarper

from tiny_models import random_model
from veneer.engine import LocalEngine
from veneer.engine import scores as scores_module
from veneer.engine.draws import Chooser
from veneer.types import DataError, LoraConfig, Piece, RequestError, Sample, SamplingParams, TopLogprobs


def reference_logits(architecture: str, tokens: np.ndarray) -> torch.Tensor:
    """transformers' [len(tokens), vocab]."""
    with torch.no_grad():
        return random_model(architecture)(input_ids=torch.from_numpy(tokens)[None]).logits[0].float()


def expect_likeliest(found: TopLogprobs, logits: torch.Tensor, k: int) -> None:
    """The k likeliest of the distributions with these logits [places, vocab]."""
    logprobs = logits.log_softmax(-1)
    assert found.tokens.shape == found.logprobs.shape == (len(logits), k)
    assert found.tokens.dtype == np.int64
    assert found.logprobs.dtype == np.float32
    wanted = logprobs.topk(k).values.numpy()
    np.testing.assert_allclose(found.logprobs, wanted, atol=1e-5, rtol=0)
    there = np.isfinite(wanted)
    own = logprobs.gather(1, torch.from_numpy(found.tokens)).numpy()
    np.testing.assert_allclose(found.logprobs[there], own[there], atol=1e-5, rtol=0)
    assert not found.tokens[~there].any(), "what is impossible is token 0"
    for row, possible in zip(found.tokens, there, strict=True):
        assert len(set(row[possible].tolist())) == possible.sum()


SHAPES = [
    {},
    {"temperature": 0.5},
    {"temperature": 0.0},
    {"temperature": 0.0, "top_k": 3, "top_p": 0.5},
    {"top_k": 5},
    {"temperature": 1.4, "top_k": 30, "top_p": 0.7},
]


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda p: "-".join(f"{k}={v}" for k, v in p.items()) or "plain")
def test_likeliest_tokens_are_those_of_the_distribution_that_was_sampled(shape: dict, architecture: str) -> None:
    """Whoever reads the alternatives wants those that the draw chose between."""
    ids, k = prompt(7), 9
    params = SamplingParams(max_tokens=6, stop_token_ids=(), **shape)
    for sample in lora_engine(architecture).sample(ids, None, params, n=3, top_logprobs=k).result():
        logits = reference_logits(architecture, np.concatenate([ids, sample.tokens]))[len(ids) - 1 : -1]
        if params.temperature > 0:
            logits = logits / params.temperature
            logits = TopKLogitsWarper(params.top_k)(None, logits) if params.top_k else logits
            logits = TopPLogitsWarper(params.top_p)(None, logits) if params.top_p < 1 else logits
        assert sample.top_logprobs is not None
        expect_likeliest(sample.top_logprobs, logits, k)
        for place, (token, logprob) in enumerate(zip(sample.tokens, sample.logprobs, strict=True)):
            mine = sample.top_logprobs.tokens[place] == token
            if mine.any() and logprob > -np.inf:
                assert sample.top_logprobs.logprobs[place][mine].max() == logprob, "one number for one thing"


@pytest.mark.parametrize("device_way", [False, True], ids=["compiled", "torch"])
def test_rows_ask_for_different_numbers_of_tokens(device_way: bool) -> None:
    """Each gets its own; who asks for none gets none. The same on the way that a GPU takes (float64 has no compiled loop)."""
    torch.manual_seed(1)
    logits = torch.randn(6, VOCAB, dtype=torch.float64 if device_way else torch.float32) * 3
    params = [
        SamplingParams(top_k=4),
        SamplingParams(),
        SamplingParams(temperature=0),
        SamplingParams(temperature=2),
        *[SamplingParams()] * 2,
    ]
    wants = [6, 0, 2, 6, VOCAB, 0]
    choose = Chooser(params, torch.device("cpu"), wants)
    drawn = choose.draw(logits, torch.rand(6))
    found = {row: (t, lp) for part in drawn.likeliest for row, t, lp in zip(part.rows, part.tokens, part.logprobs, strict=True)}
    assert {row: len(t) for row, (t, _) in found.items()} == {0: 6, 2: 2, 3: 6, 4: VOCAB}
    shaped = logits.clone()
    shaped[0] = TopKLogitsWarper(4)(None, logits[:1])[0]
    shaped[3] /= 2
    for row, (tokens, logprobs) in found.items():
        expect_likeliest(TopLogprobs(tokens[None], logprobs[None].astype(np.float32)), shaped[row : row + 1], wants[row])
    assert np.isneginf(found[0][1][4:]).all()
    assert not found[0][0][4:].any()


def bits(sample: Sample) -> list:
    tops = [t for top in (sample.top_logprobs, sample.prompt_top_logprobs) if top for t in (top.tokens.tobytes(), top.logprobs.tobytes())]
    arrays = (sample.tokens, sample.logprobs, sample.prompt_logprobs, sample.prompt_target_logprobs)
    return [None if a is None else a.tobytes() for a in arrays] + tops


ASKED: list[dict] = [
    {},
    {"top_logprobs": 3},
    {"top_logprobs": 20, "prompt_top_logprobs": 4},
    {"prompt_logprobs": True},
    {"prompt_top_logprobs": 2, "prompt_targets": True},
]


REQUESTS = st.tuples(st.integers(1, 60), st.integers(0, 12), st.integers(1, 3), st.sampled_from(ASKED), st.sampled_from([None, "x", "y"]))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(company=st.lists(REQUESTS, min_size=2, max_size=6))
def test_what_others_ask_for_changes_no_bit(company: list[tuple]) -> None:
    """Neither one's numbers nor what one is told may depend on what a neighbour, or a stranger with the same prompt, wants to know."""

    def engine() -> LocalEngine:
        made = lora_engine()
        add_random_adapter(made, "x", LoraConfig(rank=4, alpha=8), seed=1)
        add_random_adapter(made, "y", LoraConfig(rank=2, alpha=8, train_unembed=True), seed=2)
        return made

    def ask(e: LocalEngine, length: int, budget: int, n: int, wish: dict, name: str | None):
        if "prompt_targets" in wish:
            wish = wish | {"prompt_targets": np.random.default_rng(length).integers(-1, VOCAB, (length - 1, 3))}
        return e.sample(prompt(length), name, SamplingParams(budget, stop_token_ids=()), n, **wish)

    shared = engine()
    futures = [ask(shared, *request) for request in company]
    for request, future in zip(company, futures, strict=True):
        alone = ask(engine(), *request).result()
        assert [bits(s) for s in future.result()] == [bits(s) for s in alone]


@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize("architecture", ["qwen3", "gemma2"])
def test_a_prompt_is_scored_as_transformers_scores_it(architecture: str, chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Perplexities, distillation targets and multiple choice are read off a prompt; in chunks or in one piece."""
    if chunk is not None:
        monkeypatch.setitem(scores_module.LOGITS_AT_ONCE, "cpu", chunk * VOCAB)
    ids = prompt(50)
    targets = np.random.default_rng(0).integers(-1, VOCAB, (49, 4))
    targets[:, 0] = ids[1:]
    params = SamplingParams(max_tokens=2, temperature=0.3, top_k=2, stop_token_ids=())
    wish = {"prompt_logprobs": True, "prompt_top_logprobs": 5, "prompt_targets": targets}
    (sample,) = lora_engine(architecture).sample(ids, None, params, **wish).result()
    logits = reference_logits(architecture, ids)[:-1]
    logprobs = logits.log_softmax(-1).numpy()
    assert sample.prompt_top_logprobs is not None
    assert not sample.prompt_top_logprobs.tokens[0].any()
    assert np.isnan(sample.prompt_top_logprobs.logprobs[0]).all()
    rest = TopLogprobs(sample.prompt_top_logprobs.tokens[1:], sample.prompt_top_logprobs.logprobs[1:])
    expect_likeliest(rest, logits, 5)
    found = sample.prompt_target_logprobs
    assert found is not None
    assert found.shape == targets.shape
    assert found.dtype == np.float32
    assert np.array_equal(np.isnan(found), targets == -1)
    wanted = np.take_along_axis(logprobs, np.maximum(targets, 0), 1)
    np.testing.assert_allclose(found[targets >= 0], wanted[targets >= 0], atol=1e-5, rtol=0)
    assert sample.prompt_logprobs is not None
    assert np.array_equal(found[:, 0], sample.prompt_logprobs[1:])


def test_each_span_of_a_head_adapter_scores_its_own_places() -> None:
    """An adapter on the unembedding sees the wanted places only; chunks must count them as it does."""
    engine = lora_engine("llama")
    add_random_adapter(engine, "x", LoraConfig(rank=3, alpha=8, train_unembed=True), seed=1)
    ids = prompt(40)
    alone = engine.sample(ids, "x", SamplingParams(1), prompt_top_logprobs=3).result()[0]
    beside = [engine.sample(prompt(20, 5), None, SamplingParams(1), prompt_logprobs=True)]
    beside.append(engine.sample(ids, "x", SamplingParams(1), prompt_top_logprobs=3, top_logprobs=4))
    assert beside[1].result()[0].prompt_top_logprobs.logprobs.tobytes() == alone.prompt_top_logprobs.logprobs.tobytes()


def test_a_prompt_of_one_token_has_nothing_to_tell() -> None:
    """The shapes hold at the edge."""
    wish = {"prompt_logprobs": True, "prompt_top_logprobs": 3, "prompt_targets": np.zeros((0, 2), np.int64)}
    (sample,) = lora_engine().sample(prompt(1), None, SamplingParams(0), top_logprobs=2, **wish).result()
    assert np.isnan(sample.prompt_logprobs).all()
    assert sample.prompt_logprobs.shape == (1,)
    assert sample.prompt_top_logprobs.tokens.shape == (1, 3)
    assert sample.prompt_target_logprobs.shape == (0, 2)
    assert sample.top_logprobs.tokens.shape == sample.top_logprobs.logprobs.shape == (0, 2)


def test_pieces_carry_the_likeliest_tokens() -> None:
    """A stream with alternatives: the pieces' rows make up the sample's."""
    parts: list[Piece] = []
    future = lora_engine().sample(prompt(5), None, SamplingParams(30, stop_token_ids=(2,)), top_logprobs=4, on_piece=parts.append)
    (sample,) = future.result()
    assert len(parts) > 1
    assert all(len(p.top_logprobs.tokens) == len(p.tokens) for p in parts)
    for name in ("tokens", "logprobs"):
        whole = np.concatenate([getattr(p.top_logprobs, name) for p in parts])
        assert whole.tobytes() == getattr(sample.top_logprobs, name).tobytes()


def test_who_asks_for_nothing_is_told_nothing() -> None:
    """Fields that nobody asked for stay empty, also beside somebody with the same prompt who asked for all."""
    engine = lora_engine()
    plain = engine.sample(prompt(5), None, SamplingParams(3))
    engine.sample(prompt(5), None, SamplingParams(3), top_logprobs=2, prompt_logprobs=True, prompt_top_logprobs=2)
    (sample,) = plain.result()
    fields = ("prompt_logprobs", "top_logprobs", "prompt_top_logprobs", "prompt_target_logprobs")
    assert [getattr(sample, name) for name in fields] == [None] * 4


@pytest.mark.parametrize(
    ("wish", "error", "words"),
    [
        ({"top_logprobs": -1}, RequestError, "top_logprobs is -1.*0 to 97"),
        ({"top_logprobs": 98}, RequestError, "top_logprobs is 98"),
        ({"prompt_top_logprobs": 98}, RequestError, "prompt_top_logprobs is 98"),
        ({"prompt_targets": np.zeros((5, 2), np.int64)}, DataError, r"\[5, 2\].*\[4, K\]"),
        ({"prompt_targets": np.zeros(4, np.int64)}, DataError, r"\[4\].*\[4, K\]"),
        ({"prompt_targets": np.full((4, 1), 97)}, DataError, "0 to 96"),
        ({"prompt_targets": np.full((4, 1), -2)}, DataError, "0 to 96"),
    ],
)
def test_nonsense_is_refused_on_arrival(wish: dict, error: type[Exception], words: str) -> None:
    """The one who asked hears of it in one line; nobody else does."""
    engine = lora_engine()
    with pytest.raises(error, match=words) as caught:
        engine.sample(prompt(5), None, SamplingParams(1), **wish)
    assert "\n" not in str(caught.value)
    assert engine.step() == 0
