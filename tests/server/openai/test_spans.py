"""Adapters for a part of one context: what acts where, what it draws, and whose keys are used again."""

from __future__ import annotations

from typing import Any

import numpy as np
import openai
import pytest
from serving import SUM, Serving, random_checkpoint

from veneer.engine import LocalEngine, LoraEngine
from veneer.server.openai.behaviours import Behaviour, Change, Course
from veneer.server.openai.errors import FieldError
from veneer.server.openai.requests import LoraEntry
from veneer.store.adapters import ALORA
from veneer.store.stack import stack_adapters
from veneer.types import Sample, SamplingParams, Switch

SEEDS = {"think": 41, "terse": 42, "third": 43}
END = "</think>"


@pytest.fixture(scope="module", autouse=True)
def adapters(server: Serving) -> None:
    for name, seed in SEEDS.items():
        server.put(name, seed, size=0.05)


def checkpoint(server: Serving, name: str) -> Any:
    return random_checkpoint(server.served, SEEDS[name], size=0.05)


def prompt_of(server: Serving, messages: Any = SUM, **options: Any) -> np.ndarray:
    return server.served.renderer.build_generation_prompt(messages, (), options)


def by_hand(server: Serving, first: str | None, switches: list[Switch], seed: int, prompt: np.ndarray | None = None) -> Sample:
    """The same course given to an engine of its own."""
    engine: LocalEngine = LoraEngine(server.served.engine.base)  # type: ignore[attr-defined]
    for name in SEEDS:
        engine.load_state(name, checkpoint(server, name)).result()
    engine.load_state("both", stack_adapters([(checkpoint(server, "think"), 0.5), (checkpoint(server, "terse"), 1.0)], "both")).result()
    params = SamplingParams(max_tokens=60, seed=seed, stop_token_ids=())
    return engine.sample(prompt_of(server) if prompt is None else prompt, first, params, switches=switches).result()[0]


def ask(client: openai.OpenAI, lora: list[dict[str, Any]], seed: int, messages: Any = SUM, **extra: Any) -> Any:
    body = {"lora": lora, "return_token_ids": True, "ignore_eos": True, **extra}
    return client.chat.completions.create(model="nano", messages=messages, max_tokens=60, seed=seed, extra_body=body, logprobs=True)


def tokens(told: Any) -> list[int]:
    return told.choices[0].model_extra["token_ids"]


def switches(told: Any) -> list[tuple[int, list[str]]]:
    choice = told.choices[0].model_extra
    return [(s["position"], [adapter["name"] for adapter in s["adapters"]]) for s in choice["veneer"]["switches"]]


def seed_with(server: Serving, first: str | None, then: list[Switch]) -> int:
    """One with which the switch comes."""
    return next(seed for seed in range(100) if by_hand(server, first, then, seed).switches)


def test_think_with_one_answer_with_another(server: Serving, client: openai.OpenAI) -> None:
    """The toggle: a reasoning adapter until the thought is closed, then another, or the base."""
    end = tuple(server.served.renderer.encode(END).tolist())
    for then, lora in (
        ("terse", [{"name": "think", "until": END}, {"name": "terse", "from": END}]),
        (None, [{"name": "think", "until": END}]),
    ):
        seed = seed_with(server, "think", [Switch(then, after=end)])
        wanted = by_hand(server, "think", [Switch(then, after=end)], seed)
        told = ask(client, lora, seed)
        assert tokens(told) == wanted.tokens.tolist()
        assert [entry.logprob for entry in told.choices[0].logprobs.content] == pytest.approx(wanted.logprobs.tolist(), abs=0)
        ((position, _),) = wanted.switches
        assert switches(told) == [(position, [] if then is None else [then])]
        assert tokens(told)[position - len(prompt_of(server))] == end[0]
        assert [adapter["name"] for adapter in told.model_extra["veneer"]["adapters"]] == ["think"]


def test_a_stream_tells_the_switches_with_its_end(server: Serving, client: openai.OpenAI) -> None:
    """And the same tokens."""
    end = tuple(server.served.renderer.encode(END).tolist())
    seed = seed_with(server, "think", [Switch(None, after=end)])
    lora = [{"name": "think", "until": END}]
    whole = ask(client, lora, seed)
    body = {"lora": lora, "return_token_ids": True, "ignore_eos": True}
    streamed = list(client.chat.completions.create(model="nano", messages=SUM, max_tokens=60, seed=seed, extra_body=body, stream=True))
    found = [t for chunk in streamed for choice in chunk.choices for t in (choice.model_extra or {}).get("token_ids") or []]
    assert found == tokens(whole)
    last = streamed[-1].choices[0]
    assert last.finish_reason == "length"
    assert last.model_extra is not None
    assert last.model_extra["veneer"] == whole.choices[0].model_extra["veneer"]
    assert all(choice.finish_reason is None for chunk in streamed[:-1] for choice in chunk.choices)


def test_added_for_a_while(server: Serving, client: openai.OpenAI) -> None:
    """Entries that act at one place are added, each for its own span."""
    end = tuple(server.served.renderer.encode(END).tolist())
    then = [Switch("terse", after=end)]
    seed = seed_with(server, "both", then)
    told = ask(client, [{"name": "think", "scale": 0.5, "until": END}, {"name": "terse"}], seed)
    assert tokens(told) == by_hand(server, "both", then, seed).tokens.tolist()


def test_activated_from_the_assistants_turn(server: Serving, client: openai.OpenAI) -> None:
    """The prompt is read by the base; the adapter reads what the template puts in front of the turn, and all behind it."""
    renderer = server.served.renderer
    turn = len(prompt_of(server)) - len(renderer.encode("<|im_start|>assistant\n"))
    assert renderer.turn_start(SUM) == turn
    wanted = by_hand(server, None, [Switch("think", at=turn)], 5)
    told = ask(client, [{"name": "think", "activated": True}], 5)
    assert tokens(told) == wanted.tokens.tolist()
    assert switches(told) == [(turn, ["think"])]
    assert tokens(told) != tokens(ask(client, [{"name": "think"}], 5))


def test_activated_uses_the_bases_cache(server: Serving, client: openai.OpenAI) -> None:
    """What the base has read is not read again for an activated adapter, and its log-probabilities there are the base's to the bit."""
    long: list[Any] = [{"role": "user", "content": "27+94+38=? " * 12}]
    base = client.chat.completions.create(model="nano", messages=long, max_tokens=1)
    told = ask(client, [{"name": "think", "activated": True}], 5, long)
    plain = ask(client, [{"name": "think"}], 5, long)
    assert base.usage is not None
    cached = told.usage.prompt_tokens_details.cached_tokens
    assert base.usage.prompt_tokens - 40 < cached < base.usage.prompt_tokens
    assert plain.usage.prompt_tokens_details.cached_tokens == 0, "an adapter that reads the prompt cannot use the base's keys"
    turn = server.served.renderer.turn_start(long)
    wanted = by_hand(server, None, [Switch("think", at=turn)], 5, prompt_of(server, long))
    assert tokens(told) == wanted.tokens.tolist(), "found keys and computed ones give the same bits"
    again = ask(client, [{"name": "think"}], 6, long)
    assert again.usage.prompt_tokens_details.cached_tokens > 0
    other = ask(client, [{"name": "think", "scale": 0.9}], 6, long)
    assert other.usage.prompt_tokens_details.cached_tokens == 0, "the scale is part of what has read it"


def test_scores_before_an_activation_are_the_bases(server: Serving, client: openai.OpenAI) -> None:
    """To the bit: echo of a completion whose adapter acts from the middle of the prompt on."""
    text = "<|im_start|>user\n27+94+38=?<|im_end|>\n<|im_start|>assistant\n<think>\n27+94=121\n"

    def scores(**extra: Any) -> list[float]:
        told = client.completions.create(model="nano", prompt=text, echo=True, logprobs=0, max_tokens=0, extra_body=extra)
        return told.choices[0].logprobs.token_logprobs  # type: ignore[union-attr, return-value]

    base, think = scores(), scores(lora=[{"name": "think"}])
    half = scores(lora=[{"name": "think", "activated": "<|im_start|>assistant"}])
    encoded = server.served.renderer.encode(text).tolist()
    at = len(encoded) - len(server.served.renderer.encode("<|im_start|>assistant\n<think>\n27+94=121\n"))
    assert half[: at + 1] == base[: at + 1]
    assert all(a != b for a, b in zip(half[at + 1 : at + 6], base[at + 1 : at + 6], strict=True))
    assert half[at + 1 :] != think[at + 1 :]


def test_a_manifest_that_says_where(server: Serving, client: openai.OpenAI) -> None:
    """Adapters that PEFT trained as activated ones act from their invocation tokens on, unless the request says otherwise."""
    invocation = server.served.renderer.encode("<|im_start|>assistant").tolist()
    server.put("alora", SEEDS["think"], size=0.05, **{ALORA: invocation})
    by_name = client.chat.completions.create(
        model="alora", messages=SUM, max_tokens=60, seed=5, extra_body={"return_token_ids": True, "ignore_eos": True}
    )
    assert tokens(by_name) == tokens(ask(client, [{"name": "think", "activated": True}], 5))
    assert tokens(ask(client, [{"name": "alora", "activated": False}], 5)) == tokens(ask(client, [{"name": "think"}], 5))
    with pytest.raises(openai.BadRequestError, match="by which alora@1 is activated, is not in the prompt"):
        client.completions.create(model="alora", prompt="27+94")


def test_a_thought_that_the_template_closes(server: Serving, client: openai.OpenAI) -> None:
    """With thinking switched off the template writes the end of the thought itself; there the adapter for thoughts ends."""
    told = ask(client, [{"name": "think", "until": END}], 3, chat_template_kwargs={"enable_thinking": False})
    prompt = prompt_of(server, enable_thinking=False)
    at = int(np.flatnonzero(prompt == server.served.renderer.encode(END)[0])[-1])
    assert switches(told) == [(at, [])]
    assert tokens(told) == by_hand(server, "think", [Switch(None, at=at)], 3, prompt).tokens.tolist()


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ([{"name": "think", "activated": "nowhere"}], "is not in the prompt"),
        ([{"name": "think", "activated": True, "from": END}], "contradict each other"),
        ([{"name": "think", "from": END, "until": END}], "contradict each other"),
        ([{"name": "terse", "until": END}, {"name": "think", "from": "=", "until": END}], "until comes before from"),
        ([{"name": "think", "until": ""}], "at least 1 character"),
        ([{"name": "think", "since": END}], "no such parameter"),
        ([{"name": "think", "scale": "x"}], "valid number"),
        ([{"name": "think", "scale": 1e9}], "less than or equal to 1000"),
        ([{"name": "think", "scale": 1e-9}], "must be 0"),
        ([{"name": "think"}] * 17, "at most 16"),
    ],
)
def test_spans_that_make_no_sense(client: openai.OpenAI, lora: list[dict[str, Any]], words: str) -> None:
    """Each is refused before anything is drawn."""
    with pytest.raises(openai.BadRequestError, match=words):
        ask(client, lora, 1)


# ---------------------------------------------------------------- courses, without a model


def behaviour(server: Serving, *items: dict[str, Any]) -> Behaviour:
    entry = server.registry.resolve("think")
    return Behaviour(server.served, tuple((LoraEntry.model_validate({"name": "think", **item}), entry) for item in items))


def shown(course: Course) -> list[tuple[int | None, tuple[int, ...], list[float]]]:
    changes = [Change(course.first), *course.changes]
    return [(change.at, change.after, [part.scale for part in change.phase]) for change in changes]


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([{}], [(None, (), [1.0])]),
        ([], [(None, (), [])]),
        ([{"scale": 0}], [(None, (), [])]),
        ([{"scale": 2}, {"scale": -2}], [(None, (), [])]),
        ([{"scale": 0.5}, {"scale": 0.5}], [(None, (), [1.0])]),
        ([{"activated": True}], [(None, (), []), (6, (), [1.0])]),
        ([{"activated": "a"}], [(None, (), []), (4, (), [1.0])]),
        ([{"activated": "a"}, {"activated": "a", "scale": 2}], [(None, (), []), (4, (), [3.0])]),
        ([{"scale": 2}, {"activated": True}], [(None, (), [2.0]), (6, (), [3.0])]),
        ([{"until": "c"}], [(None, (), [1.0]), (None, (2,), [])]),
        ([{"until": "b"}], [(None, (), [1.0]), (7, (), [])]),
        ([{"from": "b", "until": "c"}], [(None, (), []), (7, (), [1.0]), (None, (2,), [])]),
        ([{"until": "c"}, {"scale": 3, "from": "c"}], [(None, (), [1.0]), (None, (2,), [3.0])]),
        ([{"until": "c"}, {"scale": 3, "from": "d"}], [(None, (), [1.0]), (None, (2,), []), (None, (3,), [3.0])]),
        ([{"scale": 0, "until": "c"}, {"scale": 3, "from": "d"}], [(None, (), []), (None, (3,), [3.0])]),
    ],
)
def test_courses(server: Serving, items: list[dict[str, Any]], expected: list[Any]) -> None:
    """Prompt a b a b a b | d b: where the turn begins stands |, and what stands before it is an earlier turn."""
    encode = server.served.renderer.encode
    a, b, c, d = (int(encode(letter)[0]) for letter in "abcd")
    names = {a: 0, b: 1, c: 2, d: 3}
    course = behaviour(server, *items).course(np.array([a, b, a, b, a, b, d, b]), 6)
    found = [(at, tuple(names[token] for token in after), scales) for at, after, scales in shown(course)]
    assert found == expected


def test_a_completion_is_activated_by_its_last_token(server: Serving) -> None:
    """Otherwise it would decide no token but from the second on."""
    encode = server.served.renderer.encode
    prompt = encode("27+94")
    assert shown(behaviour(server, {"activated": True}).course(prompt, len(prompt)))[-1][:2] == (len(prompt) - 1, ())
    with pytest.raises(FieldError, match="not in the prompt"):
        behaviour(server, {"activated": "x" * 50}).course(prompt, len(prompt))
