"""Prompts that begin alike: what is found has the bits that reading it again would give, and is never another's."""

from __future__ import annotations

import asyncio
import dataclasses

import numpy as np
import pytest
import torch
import transformers as hf
from engine_tools import (
    FREE,
    POISON,
    VOCAB,
    add_random_adapter,
    at_rest,
    break_passes,
    count_passes,
    datum,
    finish,
    full_engine,
    lora_engine,
    prompt,
    scrambled,
)
from hypothesis import event, given, settings
from hypothesis import strategies as st

from tiny_models import SMALL
from veneer.engine import Base, LocalEngine, LoraEngine, load_base
from veneer.engine import prefixes as prefixes_module
from veneer.engine.attention import Ragged, Row, Score
from veneer.engine.prefixes import BLOCK, grain, longest_sum
from veneer.types import AdamParams, AdapterError, LoraConfig, Sample, SamplingParams, Switch

RANKS = {"x": 4, "y": 1, "z": 24}
"""z is thick: its update is a product over the rows of a pass."""


def long_model(kind: str) -> hf.PreTrainedModel:
    """With a context of 2,048, and a window of 256 for mistral."""
    torch.manual_seed(0)
    sizes = SMALL | {"max_position_embeddings": 2048}
    config = {
        "qwen3": lambda: hf.Qwen3Config(**sizes, head_dim=16, tie_word_embeddings=True),
        "llama": lambda: hf.LlamaConfig(**sizes),
        "mistral": lambda: hf.MistralConfig(**sizes, sliding_window=256),
    }[kind]()
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return model


def engine_of(kind: str) -> LocalEngine:
    engine = LoraEngine(load_base("nano", "cpu") if kind == "nano" else Base(kind, long_model(kind), None))
    for i, (name, rank) in enumerate(RANKS.items()):
        add_random_adapter(engine, name, LoraConfig(rank=rank, alpha=8, train_attn=rank < 16), seed=i)
    return engine


def no_cache(engine: LocalEngine) -> LocalEngine:
    """One that finds nothing."""
    engine._sampler.prefixes._begin(0)
    return engine


def told(samples: list[Sample]) -> list[tuple]:
    """All but how many tokens were there already."""
    return [(s.tokens.tolist(), s.logprobs.tobytes(), s.stop_reason, s.adapter, s.switches) for s in samples]


def ask(engine: LocalEngine, ids: np.ndarray, name: str | None = None, budget: int = 3, n: int = 2, **kwargs):
    return engine.sample(ids, name, SamplingParams(budget, stop_token_ids=()), n, **kwargs)


def cached(samples: list[Sample]) -> int:
    (count,) = {s.cached_tokens for s in samples}
    return count


# ---------------------------------------------------------------- what is found


def test_a_prompt_that_begins_alike_reads_the_rest_alone() -> None:
    """A system prompt for everybody, a conversation that goes on: what was read once is not read again."""
    engine = engine_of("qwen3")
    calls, ids = count_passes(engine), prompt(80)
    first = ask(engine, ids).result()
    assert cached(first) == 0
    assert calls[0] == 80
    calls.clear()
    again = ask(engine, ids).result()
    assert cached(again) == 64, "the last token is read anyway, for what comes behind it"
    assert calls[0] == 16
    assert told(again) == told(first)
    calls.clear()
    turn = np.concatenate([ids, first[0].tokens, prompt(20, 7)])
    assert cached(ask(engine, turn).result()) == 80
    assert calls[0] == 23
    assert cached(ask(engine, np.concatenate([ids[:50], prompt(30, 8)])).result()) == 48
    assert cached(ask(engine, np.concatenate([[4 if ids[0] == 3 else 3], ids[1:]])).result()) == 0
    assert cached(ask(engine, ids[:17]).result()) == 16
    assert cached(ask(engine, ids[:16]).result()) == 0


def test_prompts_are_found_while_others_still_read_them() -> None:
    """Requests of one conversation come while the last is still being answered."""
    engine, ids = engine_of("qwen3"), prompt(60)
    long = ask(engine, ids, budget=60)
    engine.step()
    assert cached(ask(engine, ids).result()) == 48
    assert not long.done()


def test_each_weights_have_their_own() -> None:
    """An adapter's keys are not the base's, nor another's; spans have what their spans read."""
    engine, ids = engine_of("qwen3"), prompt(70)
    asked: list[tuple[str | None, list[Switch]]] = [(name, []) for name in (None, "x", "y", "z")]
    asked += [(None, [Switch("x", at=at)]) for at in (0, 5, 6, 40, 41)] + [("y", [Switch("x", at=40)]), (None, [Switch("y", at=40)])]
    for name, switches in asked:
        wanted = told(ask(no_cache(engine_of("qwen3")), ids, name, switches=switches).result())
        assert told(ask(engine, ids, name, switches=switches).result()) == wanted
    expected = [64, 64, 64, 64, 64, 64, 64, 64, 64, 64, 64]
    assert [cached(ask(engine, ids, name, switches=switches).result()) for name, switches in asked] == expected
    fresh = engine_of("qwen3")
    ask(fresh, ids).result()
    found = [cached(ask(fresh, ids, name, switches=switches).result()) for name, switches in asked]
    assert found == [64, 0, 0, 0, 64, 0, 0, 32, 32, 32, 32], "x from the first position on is x; before a span begins it is who acts there"


def test_who_wants_a_prompt_scored_has_it_read() -> None:
    """Log-probabilities of positions that are not computed would be somebody's memory of them."""
    engine, ids = engine_of("qwen3"), prompt(60)
    ask(engine, ids).result()
    for wish in ({"prompt_logprobs": True}, {"prompt_top_logprobs": 2}, {"prompt_targets": np.zeros((59, 1), np.int64)}):
        scored, plain = ask(engine, ids, **wish), ask(engine, ids)
        assert cached(scored.result()) == cached(plain.result()) == 0, "they start as one"
        assert told(scored.result()) == told(ask(no_cache(engine_of("qwen3")), ids, **wish).result())
    assert cached(ask(engine, ids, top_logprobs=3).result()) == 48


# ---------------------------------------------------------------- bits


BANDS = ((1, 60), (120, 200), (250, 330), (430, 520), (690, 780), (1000, 1300))
"""Lengths on both sides of those at which attention takes a row in other pieces."""


@st.composite
def conversations(draw: st.DrawFn) -> list[list[tuple]]:
    """Rounds of requests: how much of which common text, what follows, who reads it, where others begin."""
    bands, readers, rounds = draw(st.lists(st.sampled_from(BANDS), min_size=1, max_size=2)), draw(st.permutations([None, *RANKS])), []
    for _ in range(draw(st.integers(2, 4))):
        asked = []
        for _ in range(draw(st.integers(1, 3))):
            length = draw(st.integers(*draw(st.sampled_from(bands))))
            shared = draw(st.one_of(st.just(length), st.integers(length // 2, length)))
            places = draw(st.one_of(st.just(set()), st.sets(st.integers(length // 2, length - 1), max_size=2)))
            names = [readers[draw(st.integers(0, 1))], *draw(st.permutations(readers))[:2]]
            asked.append((length, draw(st.integers(0, 1)), shared, sorted(places), names, draw(st.integers(0, 9))))
        rounds.append(asked)
    return rounds


def play(engine: LocalEngine, rounds: list[list[tuple]], vocab: int) -> tuple[list, int]:
    """What was told, and how many tokens were there already."""
    found, known = [], 0
    for asked in rounds:
        futures = []
        for length, text, shared, places, names, seed in asked:
            common, own = (
                np.random.default_rng(text).integers(3, vocab, 1400),
                np.random.default_rng([seed, length]).integers(3, vocab, 1400),
            )
            ids = np.concatenate([common[:shared], own[: length - shared]])
            switches = [Switch(name, at=at) for name, at in zip(names[1:], places, strict=False)]
            futures.append(ask(engine, ids, names[0], budget=2, n=1, switches=switches))
        for future in futures:
            samples = future.result()
            found.append(told(samples))
            known += samples[0].cached_tokens
    return found, known


@settings(max_examples=14, deadline=None, derandomize=True)
@given(rounds=conversations())
@pytest.mark.parametrize("kind", ["qwen3", "nano", "mistral"])
def test_a_hit_changes_no_bit(kind: str, rounds: list[list[tuple]]) -> None:
    """Across the lengths at which attention takes rows in other pieces, for spans, thin and thick adapters and the base: whether
    somebody has asked something alike before does not show."""
    vocab = 576 if kind == "nano" else VOCAB
    found, known = play(engine_of(kind), rounds, vocab)
    event("hits" if known else "no hit")
    wanted, none = play(no_cache(engine_of(kind)), rounds, vocab)
    assert none == 0
    assert found == wanted


@pytest.mark.parametrize("kind", ["qwen3", "nano", "mistral"])
@pytest.mark.parametrize("name", [None, "x", "z"])
def test_one_text_at_all_lengths_changes_no_bit(kind: str, name: str | None) -> None:
    """One text, cut at lengths on both sides of every border, longest first and shortest first, one after the other."""
    text = np.random.default_rng(3).integers(3, VOCAB, 1500)
    lengths = [17, 33, 64, 160, 161, 192, 193, 256, 257, 300, 321, 385, 448, 449, 500, 513, 600, 704, 705, 768, 769, 1025, 1290]
    plain = no_cache(engine_of(kind))
    wanted = {n: told(ask(plain, text[:n], name, 2).result()) for n in lengths}
    for order in (lengths, lengths[::-1]):
        engine, known = engine_of(kind), 0
        for n in order:
            samples = ask(engine, text[:n], name, 2).result()
            known += cached(samples)
            assert told(samples) == wanted[n], n
        assert known > (500 if kind == "mistral" else 5000)


@pytest.mark.parametrize("dim", [8, 16, 32, 64, 128])
def test_rows_of_one_grain_have_the_same_bits(dim: int) -> None:
    """Every multiple of 32 up to 1,400, with what is padded too, where the engine itself tries out some."""
    longest = longest_sum(dim, 2048)
    assert longest is not None
    q, k, v = (torch.randn(1400, heads, dim, generator=torch.Generator().manual_seed(heads)) for heads in (2, 1, 1))
    first: dict[tuple, torch.Tensor] = {}
    for n in sorted({*range(32, 1401, 96), 31, 100, 190, 191, 300, 450, 500, 767, 769, 1281}):
        out = Ragged([Row(0, n)], q.device, None).attend(q[:n], k[:n], v[:n], Score(0, 0.2))
        for start in range(0, n - BLOCK + 1, BLOCK):
            here = out[start : start + BLOCK]
            assert torch.equal(first.setdefault((start, grain(n, start + BLOCK, None, longest)), here), here), (n, start)


def test_a_machine_whose_kernels_cut_sums_otherwise_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slower is better than other numbers."""
    monkeypatch.setattr(prefixes_module, "SUMS", (1024,))  # as if longer sums were one piece
    longest_sum.cache_clear()
    try:
        assert longest_sum(16, 2048) is None
        engine, ids = engine_of("qwen3"), prompt(60)
        ask(engine, ids).result()
        assert cached(ask(engine, ids).result()) == 0
    finally:
        longest_sum.cache_clear()


def test_two_threads_find_what_either_read() -> None:
    """Crews on two threads keep at the same time; rows of one crew find what the other read."""
    torch.set_num_threads(2)
    try:
        engine, plain = engine_of("qwen3"), no_cache(engine_of("qwen3"))
        text = prompt(90)
        asked = [(np.concatenate([text[: 16 * (i % 5)], prompt(20 + i, i)]), [None, *RANKS][i % 4]) for i in range(16)]
        for turn in range(3):
            futures, wanted = ([ask(e, *request, budget=6, n=10) for request in asked] for e in (engine, plain))
            engine.step()
            assert [len(crew.rows) > 20 for crew in engine._sampler.crews] == [True, True]
            assert [told(f.result()) for f in futures] == [told(f.result()) for f in wanted]
            if turn:
                known = [(len(ids) - 1) // BLOCK * BLOCK for ids, _ in asked]
                assert [{s.cached_tokens for s in f.result()} for f in futures] == [{count} for count in known]
    finally:
        torch.set_num_threads(1)


# ---------------------------------------------------------------- what is dropped


def changed(engine: LocalEngine, name: str, how: str) -> None:
    """Other weights under the same name."""
    if how == "publish":
        engine.forward_backward(name, [datum(30)], "cross_entropy").result()
        engine.optim_step(name, AdamParams(1e-2)).result()
        engine.publish(name).result()
        return
    state = scrambled(engine.save_state(name, "sampler").result(), 77)
    if how == "removed":
        engine.remove_adapter(name)
    engine.load_state(name, state).result()


@pytest.mark.parametrize("how", ["publish", "load", "removed"])
def test_other_weights_under_the_same_name_find_nothing(how: str) -> None:
    """The bug that gives the answers of yesterday's adapter: https://github.com/vllm-project/vllm/issues/42125."""
    engine, ids = engine_of("qwen3"), prompt(60)
    spans = {"switches": [Switch("x", at=20)]}
    before = [told(ask(engine, ids, "x").result()), told(ask(engine, ids, None, **spans).result())]
    changed(engine, "x", how)
    plain = no_cache(engine_of("qwen3"))
    changed(plain, "x", how)
    for name, kwargs, known, old in (("x", {}, 0, before[0]), (None, spans, 16, before[1])):
        samples = ask(engine, ids, name, **kwargs).result()
        assert cached(samples) == known
        assert told(samples) == told(ask(plain, ids, name, **kwargs).result())
        assert [row[1] for row in told(samples)] != [row[1] for row in old]


def test_what_belongs_to_a_removed_adapter_is_gone_at_once() -> None:
    """A customer who leaves leaves nothing behind; what the base read before stays."""
    engine, ids = engine_of("qwen3"), prompt(64)
    cache = engine._sampler.prefixes
    ask(engine, ids, "x").result()
    ask(engine, ids, None, switches=[Switch("x", at=32)]).result()
    ask(engine, ids, None, switches=[Switch("x", at=32), Switch("y", at=48)]).result()
    assert len(cache._blocks) == 4 + 4 + 1
    digest = engine.publish("x").result().digest
    assert len(cache._blocks) == 9, "publishing the same weights again changes nothing"
    engine.remove_adapter("x")
    assert len(cache._blocks) == cache.bank.used == 2
    assert not any(digest in block.digests for block in cache._blocks.values())
    assert cached(ask(engine, ids).result()) == 32


def test_copies_under_other_names_share_and_outlive_each_other() -> None:
    """The digest is the identity, not the name."""
    engine, ids = engine_of("qwen3"), prompt(60)
    engine.load_state("copy", engine.save_state("x", "sampler").result()).result()
    first = ask(engine, ids, "x").result()
    again = ask(engine, ids, "copy").result()
    assert cached(again) == 48
    assert [row[:2] for row in told(again)] == [row[:2] for row in told(first)]
    engine.remove_adapter("x")
    assert cached(ask(engine, ids, "copy").result()) == 48
    with pytest.raises(AdapterError):
        ask(engine, ids, "x")


def test_least_recently_used_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within its bytes, and never a parent before its child, which nobody would find again."""
    monkeypatch.setattr(prefixes_module, "KEPT", 10 * BLOCK * 4 * lora_engine().base.cache_numbers)
    engine = lora_engine()
    cache = engine._sampler.prefixes
    assert cache.most == 10
    texts = [prompt(64, seed) for seed in range(5)]
    for text in texts[:2]:
        ask(engine, text).result()
    assert len(cache._blocks) == 8
    assert cached(ask(engine, texts[0]).result()) == 48
    ask(engine, texts[2]).result()
    assert [cached(ask(engine, text[:40]).result()) for text in texts[:3]] == [32, 32, 32], "the ends of the second went first"
    assert cached(ask(engine, np.append(texts[1], 5)).result()) < 64
    ask(engine, prompt(120, 9)).result()
    assert cache.bank.bytes <= prefixes_module.KEPT
    assert len(cache._blocks) <= 10
    for block in cache._blocks.values():
        parents = {b.serial: list(cache._blocks).index(key) for key, b in cache._blocks.items()}
        if block.key[0] is not None:
            assert parents[block.key[0]] > parents[block.serial]


def test_a_prompt_longer_than_the_cache_leaves_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    """It must not push itself out while it comes in."""
    monkeypatch.setattr(prefixes_module, "KEPT", 3 * BLOCK * 4 * lora_engine().base.cache_numbers)
    engine, ids = lora_engine(), prompt(100)
    for _ in range(2):
        first = ask(engine, ids).result()
    assert cached(first) == 48
    assert told(first) == told(ask(no_cache(lora_engine()), ids).result())
    assert len(engine._sampler.prefixes._blocks) == 3


def test_many_rounds_of_changing_prompts_and_adapters_hold_no_more() -> None:
    """Training publishes every step: what nobody can find again must not stay."""
    engine, ids = lora_engine(), [prompt(40, seed) for seed in range(6)]
    add_random_adapter(engine, "x", LoraConfig(rank=2), seed=0)
    cache, sizes = engine._sampler.prefixes, []
    for turn in range(12):
        changed(engine, "x", "publish")
        for i, text in enumerate(ids):
            text[0] = 3 + turn
            ask(engine, text, "x" if i % 2 else None, n=1).result()
        sizes.append((sum(len(b.digests) > 0 for b in cache._blocks.values()), cache.bank.used == len(cache._blocks)))
    assert sizes == [(6, True)] * 12


# ---------------------------------------------------------------- trouble


def test_cancelled_and_failed_requests_spoil_nothing() -> None:
    """What a request read before it was given up is right, and what did not come to its end is not kept."""
    engine, plain = lora_engine(), no_cache(lora_engine())
    break_passes(engine, lambda flat: ValueError("choked") if bool((flat.tokens == POISON).any()) else None)
    text = prompt(80)
    text[text == POISON] = 5
    bad = ask(engine, np.append(text[:48], POISON))
    gone = ask(engine, text, budget=40)
    engine.step()
    gone.cancel()
    finish(engine, [bad, gone])
    for end in (30, 60, 80):
        assert told(ask(engine, text[:end]).result()) == told(ask(plain, text[:end]).result())
    with pytest.raises(asyncio.CancelledError):
        gone.result()
    assert at_rest(engine)


def test_numbers_that_are_none_are_not_kept() -> None:
    """The base's part of a prompt whose end an adapter poisoned must not be found by others."""
    engine, ids = engine_of("qwen3"), prompt(64)
    state = engine.save_state("x", "sampler").result()
    weights = {name: np.full_like(array, 1e30) for name, array in state.weights.items()}
    engine.load_state("bad", dataclasses.replace(state, weights=weights)).result()
    bad = ask(engine, ids, None, switches=[Switch("bad", at=40)])
    finish(engine, [bad])
    assert bad._error is not None
    samples = ask(engine, ids).result()
    assert cached(samples) == 0
    assert told(samples) == told(ask(no_cache(engine_of("qwen3")), ids).result())


def test_no_memory_for_more_is_no_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is a convenience: where it cannot grow it begins anew, smaller, and requests do not notice."""
    engine, plain, texts = lora_engine(), no_cache(lora_engine()), [prompt(64, seed) for seed in range(6)]
    inner = type(engine._sampler.prefixes.bank).claim

    def tight(bank, count: int):
        if bank is engine._sampler.prefixes.bank and bank.used + count > 9:
            raise torch.OutOfMemoryError("can't allocate memory")
        return inner(bank, count)

    monkeypatch.setattr(type(engine._sampler.prefixes.bank), "claim", tight)
    for text in [*texts, *texts]:
        assert told(ask(engine, text).result()) == told(ask(plain, text).result())
    assert engine._sampler.prefixes.most == 4
    assert cached(ask(engine, texts[-1]).result()) == 48


@pytest.mark.parametrize("make", [full_engine, lambda: lora_engine("gemma2"), lambda: lora_engine("phi")], ids=["full", "gemma2", "phi"])
def test_elsewhere_nothing_is_kept(make) -> None:
    """Models that run through transformers' modules read every prompt whole, as their attention may cut it in other ways."""
    engine, ids = make(), prompt(60)
    first = engine.sample(ids, None, FREE).result()
    again = engine.sample(ids, None, FREE).result()
    assert again[0].cached_tokens == 0
    assert told(first) == told(again)
    assert not engine._sampler.prefixes._blocks
