"""Adapters by name that are loaded and do nothing, or something else: the request fails and says so, and nothing of it is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from serving import SUM, Serving, random_checkpoint, serving

from veneer.engine import LocalEngine
from veneer.measure.canary import canary_tokens, with_canary


@pytest.fixture
def server(tmp_path: Path) -> Generator[Serving, None, None]:
    with serving(tmp_path) as running:
        yield running


@pytest.fixture(params=[True, False], ids=["recorded", "unrecorded"])
def name(request: pytest.FixtureRequest, server: Serving) -> str:
    """An adapter in the registry, with a record of what it does and without one."""
    checkpoint, engine, renderer = random_checkpoint(server.served, 1), engine_of(server), server.served.renderer
    if request.param:
        engine.load_state("maker", checkpoint).result()
        checkpoint = with_canary(engine, "maker", checkpoint, canary_tokens(renderer.vocab_size))
        engine.remove_adapter("maker")
    digests = {"tokenizer_digest": renderer.tokenizer_digest, "template_digest": renderer.template_digest}
    version = server.registry.put("loud", checkpoint, {**digests, "stage": "rl"})
    assert (server.registry.read(f"loud@{version}")[0].canary is not None) == request.param
    return "loud"


def engine_of(server: Serving) -> LocalEngine:
    engine = server.served.engine
    assert isinstance(engine, LocalEngine)
    return engine


def ask(server: Serving, model: str) -> Any:
    return server.client().chat.completions.create(model=model, messages=SUM, max_tokens=8, seed=1)


def test_a_true_adapter_answers(server: Serving, name: str) -> None:
    """No false alarm, on a sum of it either."""
    assert ask(server, name).choices[0].message.content != ask(server, "nano").choices[0].message.content
    lora = [{"name": name, "scale": 0.5}]
    assert server.client().chat.completions.create(model="nano", messages=SUM, max_tokens=8, seed=1, extra_body={"lora": lora}).choices


def test_an_adapter_that_is_not_applied(server: Serving, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """B3, B5. The base goes on answering."""
    monkeypatch.setattr(engine_of(server)._stack.thin, "slots", lambda segments, counts: np.full(sum(counts), -1))
    for model in (name, name):
        with pytest.raises(openai.InternalServerError, match="has no effect here"):
            ask(server, model)
    assert ask(server, "nano").choices


def test_a_load_that_fills_nothing(server: Serving, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """B5. 200 OK, and no module matches."""
    monkeypatch.setattr(engine_of(server), "_fill", lambda slot, checkpoint: None)
    with pytest.raises(openai.InternalServerError, match="the sampler has other weights than the request says"):
        ask(server, name)


def test_a_request_that_loses_the_name(server: Serving, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """B4. Behind the load, which was sound."""
    ask(server, name)
    engine = engine_of(server)
    sample = engine.sample
    monkeypatch.setattr(engine, "sample", lambda prompt, adapter, params, n=1, **more: sample(prompt, None, params, n, **more))
    with pytest.raises(openai.InternalServerError, match="the request lost its adapter on the way"):
        ask(server, name)


def test_another_scale_than_was_saved(server: Serving) -> None:
    """The record is of what was saved: an adapter that acts half as much is another one, whatever its digest says."""
    checkpoint, engine = random_checkpoint(server.served, 1), engine_of(server)
    engine.load_state("maker", checkpoint).result()
    recorded = with_canary(engine, "maker", checkpoint, canary_tokens(server.served.renderer.vocab_size)).canary
    assert recorded is not None
    half = tuple((np.array(recorded.logprobs) + np.array(recorded.base_logprobs)) / 2)
    wrong = dataclasses.replace(checkpoint, canary=dataclasses.replace(recorded, logprobs=half))
    server.registry.put("loud", wrong, {"stage": "rl"})
    with pytest.raises(openai.InternalServerError, match="has another effect here than where it was saved"):
        ask(server, "loud")


def test_a_base_that_has_changed_in_memory(server: Serving, name: str) -> None:
    """B6. Somebody trained it, or a bit flipped; the digest was taken at the start."""
    fused = engine_of(server)._stack.fused
    fused.layers[0].down.weight.add_(0.1)
    if server.registry.read(name)[0].canary is None:
        ask(server, name)  # without a record there is nothing to compare the base with
    else:
        with pytest.raises(openai.InternalServerError, match="the base is not what it was when adapter"):
            ask(server, name)
