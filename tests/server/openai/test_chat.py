"""Chat through the public SDK: the same tokens as the engine alone, streamed or whole."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from serving import SORT, SUM, Serving, alone, counts

from veneer.envs.calculator import CALCULATOR
from veneer.render.reading import Reader
from veneer.types import SamplingParams

PRODUCT: list[Any] = [{"role": "user", "content": "47*86=?"}]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_answer_is_the_engines(server: Serving, client: openai.OpenAI, temperature: float) -> None:
    """Nothing between the client and the weights changes a token, a log-probability or a character."""
    params = SamplingParams(max_tokens=64, temperature=temperature, seed=7)
    samples = alone(server, SUM, None, params, 3)
    extra = {"return_token_ids": True}
    told = client.chat.completions.create(
        model="nano", messages=SUM, n=3, seed=7, temperature=temperature, max_tokens=64, logprobs=True, top_logprobs=3, extra_body=extra
    )
    renderer = server.served.renderer
    assert told.model_extra is not None
    assert told.model_extra["prompt_token_ids"] == renderer.build_generation_prompt(SUM).tolist()
    for sample, choice in zip(samples, told.choices, strict=True):
        assert choice.model_extra is not None
        assert choice.model_extra["token_ids"] == sample.tokens.tolist()
        assert choice.finish_reason == sample.stop_reason
        message = renderer.parse_response(sample.tokens, sample.stop_reason == "stop")
        assert choice.message.content == message["content"]
        assert (choice.message.model_extra or {}).get("reasoning_content") == message.get("reasoning_content")
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert [np.float32(entry.logprob) for entry in choice.logprobs.content] == sample.logprobs.tolist()
        assert b"".join(bytes(entry.bytes or []) for entry in choice.logprobs.content).decode() == renderer.decode(sample.tokens)
        assert all(len(entry.top_logprobs) == 3 for entry in choice.logprobs.content)
    assert told.usage is not None
    drawn = sum(len(sample.tokens) for sample in samples)
    assert (told.usage.prompt_tokens, told.usage.completion_tokens) == (len(renderer.build_generation_prompt(SUM)), drawn)
    assert told.usage.total_tokens == told.usage.prompt_tokens + drawn


def joined(chunks: list[Any]) -> dict[int, dict[str, Any]]:
    """What a client that streams has in the end, by choice."""
    told: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            state = told.setdefault(
                choice.index, {"content": "", "reasoning": "", "calls": [], "logprobs": [], "tokens": [], "finish": None}
            )
            state["content"] += choice.delta.content or ""
            state["reasoning"] += (choice.delta.model_extra or {}).get("reasoning_content") or ""
            state["calls"] += [(call.index, call.function.name, call.function.arguments) for call in choice.delta.tool_calls or []]
            state["logprobs"] += [entry.model_dump() for entry in (choice.logprobs.content if choice.logprobs else None) or []]
            state["tokens"] += (choice.model_extra or {}).get("token_ids") or []
            assert state["finish"] is None, "something came behind the end"
            state["finish"] = choice.finish_reason
    return told


def of_whole(choice: Any) -> dict[str, Any]:
    calls = [(i, call.function.name, call.function.arguments) for i, call in enumerate(choice.message.tool_calls or [])]
    return {
        "content": choice.message.content or "",
        "reasoning": (choice.message.model_extra or {}).get("reasoning_content") or "",
        "calls": calls,
        "logprobs": [entry.model_dump() for entry in (choice.logprobs.content if choice.logprobs else None) or []],
        "tokens": (choice.model_extra or {}).get("token_ids") or [],
        "finish": choice.finish_reason,
    }


ASKED: dict[str, dict[str, Any]] = {
    "plain": {},
    "many": {"n": 5},
    "hot": {"n": 4, "temperature": 3.0, "max_tokens": 40},
    "hot and stopped": {"n": 4, "temperature": 3.0, "max_tokens": 40, "stop": ["1", "e", "\n\n", "</think>"]},
    "stopped": {"n": 4, "stop": ["=", "</"]},
    "scored": {"n": 2, "logprobs": True, "top_logprobs": 2, "extra_body": {"return_token_ids": True}},
    "tools": {"n": 8, "tools": [CALCULATOR], "messages": PRODUCT, "logprobs": True},
    "no thinking": {"n": 2, "extra_body": {"chat_template_kwargs": {"enable_thinking": False}}},
    "cut short": {"max_tokens": 3},
    "nucleus": {"n": 3, "top_p": 0.7, "extra_body": {"top_k": 5}},
    "on and on": {"n": 2, "max_tokens": 50, "extra_body": {"ignore_eos": True}},
}


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED.keys())
def test_a_stream_tells_what_the_whole_answer_tells(client: openai.OpenAI, asked: dict[str, Any]) -> None:
    """Text, thinking, calls, log-probabilities, tokens and reasons, to the character."""
    for seed in (1, 2):
        request = {"model": "nano", "messages": SUM, "max_tokens": 200, "seed": seed, **asked}
        whole = client.chat.completions.create(**request)
        chunks = list(client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
        assert joined(chunks) == {choice.index: of_whole(choice) for choice in whole.choices}
        assert chunks[-1].choices == []
        assert counts(chunks[-1]) == counts(whole)
        assert {chunk.system_fingerprint for chunk in chunks} == {whole.system_fingerprint}
        assert len({chunk.id for chunk in chunks}) == 1


def test_stop_texts_are_no_part_of_the_answer(client: openai.OpenAI) -> None:
    """OpenAI's rule; the engine's own is another."""
    for seed in range(50):
        request: dict[str, Any] = {"model": "nano", "messages": SUM, "seed": seed, "max_tokens": 100}
        free = client.chat.completions.create(**request).choices[0].message
        whole = (free.model_extra or {})["reasoning_content"] + free.content
        if len(whole) > 6:
            break
    for stop in (whole[4], whole[2:5]):
        told = client.chat.completions.create(**request, stop=["never", stop]).choices[0]
        assert told.finish_reason == "stop"
        shown = (told.message.model_extra or {})["reasoning_content"] + (told.message.content or "")
        assert shown == whole[: whole.index(stop)]


def test_the_same_seed_gives_the_same_answer(client: openai.OpenAI) -> None:
    """And without one each answer has its own, which is told, so that it can be asked for again."""
    request: dict[str, Any] = {"model": "nano", "messages": SORT, "n": 2, "max_tokens": 60}
    first = client.chat.completions.create(**request)
    again = client.chat.completions.create(**request, seed=first.model_extra["veneer"]["seed"])  # type: ignore[index]
    other = client.chat.completions.create(**request)
    assert [of_whole(c) for c in first.choices] == [of_whole(c) for c in again.choices]
    assert first.model_extra["veneer"]["seed"] != other.model_extra["veneer"]["seed"]  # type: ignore[index]


def test_a_tool_is_called_and_answered(client: openai.OpenAI) -> None:
    """The whole round: call out, result in, in the SDK's own objects, sent back as they came."""
    for seed in range(20):
        request: dict[str, Any] = {"model": "nano", "tools": [CALCULATOR], "max_tokens": 100, "seed": seed}
        told = client.chat.completions.create(**request, messages=PRODUCT)
        if told.choices[0].finish_reason == "tool_calls":
            break
    choice = told.choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert call.id.startswith("call_")
    assert set(json.loads(call.function.arguments)) == {"expression"}
    result = {"role": "tool", "tool_call_id": call.id, "content": "4042"}
    answer = client.chat.completions.create(**request, messages=[*PRODUCT, choice.message, result])  # type: ignore[list-item]
    assert answer.usage is not None
    assert told.usage is not None
    assert answer.usage.prompt_tokens > told.usage.prompt_tokens + told.usage.completion_tokens
    silent = client.chat.completions.create(**request | {"tools": [CALCULATOR]}, messages=PRODUCT, tool_choice="none")
    assert silent.usage is not None
    assert silent.usage.prompt_tokens < told.usage.prompt_tokens
    assert not silent.choices[0].message.tool_calls


def test_a_conversation_is_rendered_as_the_trainer_renders_it(server: Serving, client: openai.OpenAI) -> None:
    """Parts, developers, results of tools and earlier thoughts: the tokens are those of the chat template."""
    call = {"id": "call_1", "type": "function", "function": {"name": "calculator", "arguments": '{"expression": "12*34"}'}}
    sent: list[Any] = [
        {"role": "developer", "content": "Be terse."},
        {"role": "user", "content": [{"type": "text", "text": "12*"}, {"type": "text", "text": "34=?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "annotations": []},
        {"role": "tool", "tool_call_id": "call_1", "content": "408"},
        {"role": "assistant", "content": "408", "reasoning_content": "easy"},
        {"role": "user", "content": "sure?", "name": "ann"},
    ]
    messages: list[Any] = [
        {"role": "system", "content": "Be terse."},
        {"role": "user", "content": "12*34=?"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "calculator", "arguments": {"expression": "12*34"}}]},
        {"role": "tool", "content": "408"},
        {"role": "assistant", "content": "408", "reasoning_content": "easy"},
        {"role": "user", "content": "sure?"},
    ]
    extra = {"return_token_ids": True}
    told = client.chat.completions.create(model="nano", messages=sent, tools=[CALCULATOR], max_tokens=1, extra_body=extra)  # type: ignore[list-item]
    wanted = server.served.renderer.build_generation_prompt(messages, [CALCULATOR])
    assert told.model_extra is not None
    assert told.model_extra["prompt_token_ids"] == wanted.tolist()


def test_tokens_up_to_the_contexts_end(server: Serving, client: openai.OpenAI) -> None:
    """Without a limit an answer may fill the context, and no more."""
    words = [{"role": "user", "content": "7" * 1990}]
    told = client.chat.completions.create(model="nano", messages=words, extra_body={"ignore_eos": True})  # type: ignore[arg-type]
    assert told.usage is not None
    assert told.usage.total_tokens == server.served.engine.context_length
    assert told.choices[0].finish_reason == "length"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="nano", messages=[{"role": "user", "content": "7" * 3000}])
    assert caught.value.code == "context_length_exceeded"


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "penalty": ({"frequency_penalty": 0.5}, "frequency_penalty", "does not act on it"),
    "bias": ({"logit_bias": {"1": 5}}, "logit_bias", "does not act on it"),
    "format": ({"response_format": {"type": "json_object"}}, "response_format", "does not act on it"),
    "forced tool": ({"tools": [CALCULATOR], "tool_choice": "required"}, "tool_choice", "does not act on it"),
    "named tool": (
        {"tools": [CALCULATOR], "tool_choice": {"type": "function", "function": {"name": "calculator"}}},
        "tool_choice",
        "does not act on it",
    ),
    "strict tool": ({"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}, "tools.0", "strict"),
    "one call only": ({"parallel_tool_calls": False}, "parallel_tool_calls", "does not act on it"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages.0.content",
        "text",
    ),
    "audio": ({"modalities": ["text", "audio"]}, "modalities", "does not act on it"),
    "stops": ({"stop": [1, 2]}, "stop", "a text or a list of texts"),
    "empty stop": ({"stop": [""]}, "stop", "1 to 1024 characters"),
    "no answers": ({"n": 0}, "n", "greater than or equal to 1"),
    "too many": ({"n": 10_000}, "n", "less than or equal to 1024"),
    "cold": ({"temperature": -1}, "temperature", "greater than or equal to 0"),
    "nearly frozen": ({"temperature": 1e-30}, "temperature", "at least"),
    "top": ({"top_logprobs": 3}, "", "top_logprobs needs logprobs"),
    "typo": ({"extra_body": {"max_token": 5}}, "max_token", "no such parameter"),
    "template": ({"extra_body": {"chat_template_kwargs": {"tokenize": True}}}, "chat_template_kwargs", "no option 'tokenize'"),
    "effort": ({"reasoning_effort": "high"}, "reasoning_effort", "no option 'reasoning_effort'"),
    "arguments": (
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "["}}]}]},
        "messages.0.tool_calls.0.function.arguments",
        "JSON object",
    ),
    "no messages": ({"messages": []}, "messages", "at least 1"),
    "usage of no stream": ({"stream_options": {"include_usage": True}}, "", "set stream"),
}


@pytest.mark.parametrize(("asked", "param", "words"), WRONG.values(), ids=WRONG.keys())
def test_what_cannot_be_done_is_refused_by_name(client: openai.OpenAI, asked: dict[str, Any], param: str, words: str) -> None:
    """A parameter that is ignored is an answer to another question."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "nano", "messages": SUM, "max_tokens": 1, **asked})
    error = caught.value
    assert error.status_code == 400
    assert words in error.message
    assert "\n" not in error.message
    assert set(error.body) == {"message", "type", "param", "code"}  # type: ignore[arg-type]
    assert error.type == "invalid_request_error"
    if param:
        assert error.param == param


def test_what_changes_nothing_is_taken(client: openai.OpenAI) -> None:
    """Clients send defaults, and things that are for OpenAI's books."""
    told = client.chat.completions.create(
        **{"model": "nano", "messages": SUM, "max_tokens": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}},
        **{"response_format": {"type": "text"}, "user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"},
        **{"tool_choice": "auto", "tools": [CALCULATOR], "parallel_tool_calls": True, "modalities": ["text"], "stop": None},
        **{"temperature": None, "top_p": None, "n": None, "seed": None, "logprobs": None, "max_completion_tokens": 2},
        extra_body={"min_p": 0, "repetition_penalty": 1.0, "top_k": -1},
    )
    assert told.usage is not None
    assert told.usage.completion_tokens == 2


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b'{"model": "nano", "messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        (b'{"model": "nano", "messages": "x"}', 400),
        (b'{"model": "nano", "seed": 1e400, "messages": [{"role": "user", "content": "x"}]}', 400),
        (b'{"model": "nano", "max_tokens": 1, "tools": ' + b'[{"a":' * 5000 + b"1" + b"}]" * 5000 + b', "messages": []}', 400),
        (b'{"model": "nano", "temperature": NaN, "messages": [{"role": "user", "content": "x"}]}', 400),
        (b"\xff\xfe", 400),
    ],
)
def test_garbage_is_one_line(server: Serving, body: bytes, status: int) -> None:
    """Whatever comes, the client gets OpenAI's shape of an error, and the server goes on."""
    told = httpx2.post(f"{server.url}/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert told.status_code == status, told.text
    assert set(told.json()["error"]) == {"message", "type", "param", "code"}
    assert "\n" not in told.json()["error"]["message"]


def test_unknown_routes_have_openais_shape(server: Serving) -> None:
    """404 and 405 too."""
    for told, status in ((httpx2.get(f"{server.url}/v1/nothing"), 404), (httpx2.get(f"{server.url}/v1/chat/completions"), 405)):
        assert told.status_code == status
        assert told.json()["error"]["message"]


def test_the_openapi_document_is_honest(server: Serving) -> None:
    """It is what others generate their clients from: names that are taken stand in it, and no reference leads nowhere."""
    document = httpx2.get(f"{server.url}/openapi.json").json()
    chat = document["components"]["schemas"]["ChatRequest"]
    assert chat["additionalProperties"] is False
    assert {"messages", "lora", "return_token_ids", "chat_template_kwargs"} <= set(chat["properties"])
    text = json.dumps({path: value for path, value in document["paths"].items() if path.startswith("/v1")})
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in document["components"]["schemas"]
    assert "#/$defs/" not in text


def test_parsing_is_the_renderers(server: Serving) -> None:
    """What environments see while an adapter is trained is what clients see when it serves."""
    renderer = server.served.renderer
    for seed in range(12):
        (sample,) = alone(server, PRODUCT, None, SamplingParams(max_tokens=60, seed=seed, temperature=1.5))
        stopped = sample.stop_reason == "stop"
        message = renderer.parse_response(sample.tokens, stopped)
        text = renderer.decode(sample.tokens[:-1] if stopped else sample.tokens)
        if not ("</think>" in text and not text.startswith("<think>")):
            parts = Reader(thinking=False, calls=True).feed(text, last=True)
            assert "".join(part.content for part in parts) == message["content"]
