"""Canaries: the record is what PEFT computes, and each way of not being what was saved is told apart."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from veneer.assets import NANO_FOLDER
from veneer.engine import FullEngine, LocalEngine, LoraEngine, load_base
from veneer.measure.canary import LENGTH, canary_tokens, check_drawn, check_loaded, judge, with_canary
from veneer.store.adapters import read_adapter, read_manifest, write_adapter
from veneer.types import AttestationError, Checkpoint, LoraConfig, RunError, SamplingParams

ROW = canary_tokens(576)


def engine_of(dtype: torch.dtype = torch.float32) -> LocalEngine:
    return LoraEngine(load_base("nano", "cpu", dtype))


def saved(engine: LocalEngine, config: LoraConfig, scale: float = 0.05) -> Checkpoint:
    """A random adapter with its record, made on this engine under the name "maker"."""
    engine.create_adapter("maker", config)
    fresh = engine.save_state("maker", "sampler").result()
    rng = np.random.default_rng(config.rank)
    weights = {name: rng.normal(0, scale, array.shape).astype(np.float32) for name, array in fresh.weights.items()}
    engine.load_state("maker", dataclasses.replace(fresh, weights=weights)).result()
    return with_canary(engine, "maker", engine.save_state("maker", "sampler").result(), ROW)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return saved(engine_of(), LoraConfig(rank=4, train_unembed=True))


def load(engine: LocalEngine, checkpoint: Checkpoint) -> None:
    engine.load_state("a", checkpoint).result()
    check_loaded(engine, "a", checkpoint, ROW)


def without_record(checkpoint: Checkpoint) -> Checkpoint:
    return dataclasses.replace(checkpoint, canary=None)


@pytest.mark.parametrize("vocab", [97, 384, 50_257, 151_936, 262_144])
def test_the_row_is_spread_over_the_vocabulary(vocab: int) -> None:
    """Tokens of one corner may be ones that the adapter never touches; and the rule must never change."""
    row = canary_tokens(vocab)
    assert len(row) == len(set(row.tolist())) == LENGTH
    assert row.min() >= 0
    assert row.max() < vocab
    assert len(set((row * 4 // vocab).tolist())) == 4
    assert canary_tokens(384)[:4].tolist() == [237, 90, 327, 181]


def test_the_record_is_what_peft_computes(tmp_path: Path, checkpoint: Checkpoint) -> None:
    """Both rows, from a library that we did not write, through the files that users get."""
    write_adapter(tmp_path / "a", checkpoint, {})
    canary = read_adapter(tmp_path / "a")[0].canary
    assert canary == checkpoint.canary
    assert canary is not None
    model: Any = AutoModelForCausalLM.from_pretrained(NANO_FOLDER, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted: Any = PeftModel.from_pretrained(model, str(tmp_path / "a"))
    ids = torch.tensor([canary.tokens])
    with torch.no_grad():
        for logits, recorded in ((adapted(ids).logits, canary.logprobs), (_off(adapted, ids), canary.base_logprobs)):
            wanted = torch.log_softmax(logits[0].double(), -1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
            assert np.abs(wanted.numpy() - np.array(recorded)).max() < 2e-5
    assert np.abs(np.array(canary.logprobs) - np.array(canary.base_logprobs)).max() > 0.1


def _off(adapted: Any, ids: torch.Tensor) -> torch.Tensor:
    with adapted.disable_adapter():
        return adapted(ids).logits


def test_the_record_stands_in_the_manifest_as_plain_numbers(tmp_path: Path, checkpoint: Checkpoint) -> None:
    """Any program can repeat the probe from veneer.json."""
    write_adapter(tmp_path / "a", checkpoint, {})
    record = read_manifest(tmp_path / "a")["canary"]
    assert record["tokens"] == ROW.tolist()
    assert len(record["logprobs"]) == len(record["base_logprobs"]) == LENGTH - 1
    assert (record["digest"], record["dtype"]) == (checkpoint.adapter.digest, "float32")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [1, 16, 17])
def test_a_true_load_passes_whatever_the_dtypes(dtype: torch.dtype, rank: int) -> None:
    """Trained on a GPU in bfloat16, served on a CPU in float32, and the other way round: no false alarm."""
    here = engine_of(dtype)
    load(here, saved(engine_of(), LoraConfig(rank=rank)))
    load(engine_of(), saved(here, LoraConfig(rank=rank)))


def test_full_copies_have_canaries_too() -> None:
    """The comparison arm is held to the same."""
    engine = FullEngine(load_base("nano"))
    engine.create_adapter("maker", None)
    fresh = engine.save_state("maker", "sampler").result()
    weights = {name: array + np.float32(0.01) for name, array in fresh.weights.items()}
    engine.load_state("maker", dataclasses.replace(fresh, weights=weights)).result()
    checkpoint = with_canary(engine, "maker", engine.save_state("maker", "sampler").result(), ROW)
    load(engine, checkpoint)
    load(engine, without_record(checkpoint))


def test_a_fresh_adapter_passes() -> None:
    """B is zero: no effect is the right effect."""
    engine = engine_of()
    engine.create_adapter("maker", LoraConfig(rank=1))
    fresh = with_canary(engine, "maker", engine.save_state("maker", "sampler").result(), ROW)
    assert fresh.canary is not None
    assert fresh.canary.logprobs == fresh.canary.base_logprobs
    load(engine, fresh)
    load(engine, without_record(fresh))


def ignore(engine: LocalEngine) -> None:
    """The sampler draws from the base, whatever it says."""
    stack = engine._stack
    infer = stack.infer
    engine._stack.infer = lambda flat, finish, *, published: infer(
        dataclasses.replace(flat, segments=[dataclasses.replace(s, slot=None) for s in flat.segments]), finish, published=published
    )  # type: ignore[method-assign]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recorded", [True, False])
def test_an_adapter_without_effect_is_told(checkpoint: Checkpoint, dtype: torch.dtype, recorded: bool) -> None:
    engine = engine_of(dtype)
    ignore(engine)
    with pytest.raises(AttestationError, match=r"has no effect here.*loaded and not applied"):
        load(engine, checkpoint if recorded else without_record(checkpoint))


def test_the_smallest_effect_is_missed_where_it_vanishes() -> None:
    """One small step in bfloat16 changes less than engines may differ by, and its absence is told all the same."""
    engine = engine_of(torch.bfloat16)
    small = saved(engine, LoraConfig(rank=1), scale=2e-3)
    assert small.canary is not None
    assert 0 < np.abs(np.array(small.canary.logprobs) - np.array(small.canary.base_logprobs)).max() < 0.5
    load(engine, small)
    ignore(engine)
    with pytest.raises(AttestationError, match="has no effect here"):
        load(engine, small)


def test_another_base_is_told(checkpoint: Checkpoint) -> None:
    """The digest was taken when the base was loaded; it has changed in memory since."""
    engine = engine_of()
    with torch.no_grad():
        for parameter in engine.base.model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=1e-2)
    with pytest.raises(AttestationError, match=r"the base is not what it was when adapter .* without the adapter"):
        load(engine, checkpoint)


@pytest.mark.parametrize("factor", [0.5, 0.95, 1.1])
def test_another_effect_is_told(checkpoint: Checkpoint, factor: float) -> None:
    """A wrong scale is the usual one: alpha taken for alpha / rank, or added twice."""
    engine = engine_of()
    engine.load_state("a", checkpoint).result()
    engine._stack.rows.line.tensor.mul_(factor)  # after the digest was taken
    with pytest.raises(AttestationError, match=r"has another effect here than where it was saved.*recorded is a change by up to"):
        check_loaded(engine, "a", checkpoint, ROW)


def test_a_large_effect_may_round_more() -> None:
    """An adapter that a wild learning rate left behind can be resumed from: in a thousandth of its effect it is the same."""
    wild = saved(engine_of(), LoraConfig(rank=4, train_unembed=True), scale=0.3)
    assert wild.canary is not None
    recorded = np.array(wild.canary.logprobs) - np.array(wild.canary.base_logprobs)
    effect = float(np.abs(recorded).max())
    assert effect > 5
    for share, passes in ((5e-4, True), (2e-3, False)):
        off = tuple(float(value + share * effect) for value in wild.canary.logprobs)
        changed = dataclasses.replace(wild, canary=dataclasses.replace(wild.canary, logprobs=off))
        if passes:
            load(engine_of(), changed)
        else:
            with pytest.raises(AttestationError, match="another effect here"):
                load(engine_of(), changed)


def test_numbers_that_are_not_finite_are_told(checkpoint: Checkpoint) -> None:
    """No comparison with NaN is true; the sampler says it before any is made."""
    engine = engine_of()
    engine.load_state("a", checkpoint).result()
    engine._stack.rows.line.tensor.fill_(float("nan"))
    with pytest.raises(RunError, match="not finite"):
        check_loaded(engine, "a", checkpoint, ROW)
    sound = engine.sample(ROW, None, SamplingParams(max_tokens=0), prompt_logprobs=True).result()[0]
    assert sound.prompt_logprobs is not None
    broken = dataclasses.replace(sound, adapter=checkpoint.adapter, prompt_logprobs=sound.prompt_logprobs * np.float32("nan"))
    assert checkpoint.canary is not None
    with pytest.raises(AttestationError, match="differ by up to nan"):
        judge(checkpoint.canary, sound, broken, "float32")


def test_another_adapter_under_the_name_is_told(checkpoint: Checkpoint) -> None:
    engine = engine_of()
    other = saved(engine, LoraConfig(rank=2))
    engine.load_state("a", other).result()
    with pytest.raises(AttestationError, match=r"a sample comes from adapter 'a'.*asked for was adapter"):
        check_loaded(engine, "a", checkpoint, ROW)


def test_samples_say_what_they_were_drawn_from(checkpoint: Checkpoint) -> None:
    """Four ways for a request to go wrong, and one to go right."""
    engine = engine_of()
    engine.load_state("a", checkpoint).result()
    base = engine.base_digest
    plain, adapted = (engine.sample(ROW, name, SamplingParams(max_tokens=2)).result() for name in (None, "a"))
    check_drawn(plain, None, base)
    check_drawn(adapted, checkpoint.adapter.digest, base)
    with pytest.raises(AttestationError, match=r"from the base alone, asked for was adapter .* lost its adapter"):
        check_drawn(plain, checkpoint.adapter.digest, base)
    with pytest.raises(AttestationError, match=r"from adapter 'a' .* asked for was the base alone"):
        check_drawn(adapted, None, base)
    with pytest.raises(AttestationError, match="asked for was adapter 000000000000"):
        check_drawn(adapted, "0" * 64, base)
    with pytest.raises(AttestationError, match="on base 000000000000"):
        check_drawn(adapted, checkpoint.adapter.digest, "0" * 64)
