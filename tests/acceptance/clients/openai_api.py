"""The OpenAI SDK: chat and completions, whole and in streams, of the base, of adapters by name and version, and of sums of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import tinker
from adapters import ANSWERS, QUESTIONS
from checks import BASE, END, OTHER_NAME, close, prompt_of, run_checks, tokenizer_of, tokens_of
from tinker import types

client = openai.OpenAI(max_retries=0, timeout=120)
ADAPTER = "told"
"""The name under which the parent has put the three versions into the registry."""
SUM = [{"role": "user", "content": QUESTIONS[0]}]
CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluate an arithmetic expression.",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    },
}


def chat(model: str = BASE, messages: Any = SUM, **params: Any) -> Any:
    return client.chat.completions.create(model=model, messages=messages, **{"max_tokens": 64, **params})


def said(model: str, **params: Any) -> str:
    return chat(model, temperature=0, **params).choices[0].message.content


def refused(call: Callable[[], Any], kind: type[openai.APIStatusError], *words: str) -> str:
    failure = None
    try:
        call()
    except openai.APIStatusError as error:
        failure = error
    assert failure is not None, "it was not refused"
    assert type(failure) is kind, f"{type(failure).__name__}: {failure}"
    body: Any = failure.body
    assert isinstance(body, dict), f"no error object: {body}"
    assert {"message", "type"} <= body.keys(), f"no error object: {body}"
    for word in words:
        assert word in body["message"], f"the message does not name {word!r}: {body['message']}"
    return body["message"]


# ---------------------------------------------------------------- models


def models_are_listed():
    names = [model.id for model in client.models.list()]
    assert {BASE, OTHER_NAME, ADAPTER} <= set(names), names
    assert len(names) == len(set(names)), f"a name twice: {names}"
    assert client.models.retrieve(ADAPTER).id == ADAPTER
    refused(lambda: client.models.retrieve("nobody"), openai.NotFoundError)


def adapters_by_name_and_version():
    """The newest by its name, each by its number; the base beside them is the base."""
    for version, answer in enumerate(ANSWERS, 1):
        for question in QUESTIONS:
            found = said(f"{ADAPTER}@{version}", messages=[{"role": "user", "content": question}])
            assert found == answer, f"{ADAPTER}@{version} says {found!r}, not {answer!r}"
    assert said(ADAPTER) == ANSWERS[-1]
    assert said(BASE) not in ANSWERS
    answer = chat(f"{ADAPTER}@2", temperature=0)
    assert answer.model == f"{ADAPTER}@2"
    assert answer.choices[0].finish_reason == "stop"


def a_list_of_adapters_acts_on_the_base():
    """lora: which adapters with which scales; scale 0 is the base, scale 1 the adapter, and two are added."""
    for version, answer in enumerate(ANSWERS, 1):
        assert said(BASE, extra_body={"lora": [{"name": f"{ADAPTER}@{version}", "scale": 1.0}]}) == answer
    base = said(BASE)
    assert said(BASE, extra_body={"lora": [{"name": ADAPTER, "scale": 0.0}]}) == base
    assert said(BASE, extra_body={"lora": []}) == base
    halves = [{"name": f"{ADAPTER}@3", "scale": 0.5}, {"name": f"{ADAPTER}@3", "scale": 0.5}]
    together = chat(temperature=0, logprobs=True, extra_body={"lora": halves}).choices[0]
    whole = chat(f"{ADAPTER}@3", temperature=0, logprobs=True).choices[0]
    assert together.message.content == whole.message.content
    close([t.logprob for t in together.logprobs.content], [t.logprob for t in whole.logprobs.content], 1e-3, "two halves and the whole")
    both = [{"name": f"{ADAPTER}@1", "scale": 1.0}, {"name": f"{ADAPTER}@2", "scale": 1.0}]
    there = [{"name": f"{ADAPTER}@2", "scale": 1.0}, {"name": f"{ADAPTER}@1", "scale": 1.0}]
    sums = [chat(temperature=0, logprobs=True, extra_body={"lora": order}).choices[0] for order in (both, there)]
    assert sums[0].message.content == sums[1].message.content, "the order of a sum matters"


def wrong_names_are_told_the_nearest():
    refused(lambda: chat("Qwen/Qwen3-8C"), openai.NotFoundError, BASE)
    refused(lambda: chat(ADAPTER[:-1]), openai.NotFoundError, ADAPTER)
    refused(lambda: chat(f"{ADAPTER}@9"), openai.NotFoundError, "3")
    refused(lambda: chat(BASE, extra_body={"lora": [{"name": "tole"}]}), openai.NotFoundError, ADAPTER)
    refused(lambda: client.completions.create(model="nanu", prompt="1"), openai.NotFoundError, "nano")


# ---------------------------------------------------------------- chat


def chat_is_what_tinker_samples():
    """The same seedless greedy answer over both protocols, and its tokens counted."""
    tokenizer = tokenizer_of()
    sampler = tinker.ServiceClient().create_sampling_client(base_model=BASE).result()
    for question in QUESTIONS:
        params = types.SamplingParams(max_tokens=64, temperature=0.0)
        (sequence,) = sampler.sample(prompt_of(question), 1, params).result().sequences
        answer = chat(messages=[{"role": "user", "content": question}], temperature=0)
        (choice,) = answer.choices
        text = tokenizer.decode([t for t in sequence.tokens if t != END])
        told = "".join(part for part in (getattr(choice.message, "reasoning_content", None), choice.message.content) if part)
        squeezed = lambda s: "".join(s.replace("<think>", "").replace("</think>", "").split())  # noqa: E731
        assert squeezed(told) == squeezed(text), f"{told!r}, and over the other protocol {text!r}"
        assert choice.message.role == "assistant"
        assert choice.finish_reason == ("stop" if sequence.stop_reason == "stop" else "length")
        assert answer.usage.prompt_tokens == len(tokens_of(question))
        assert answer.usage.completion_tokens == len(sequence.tokens)
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def seeds_and_several_choices():
    first, again, other = (chat(n=4, seed=seed, temperature=1.0) for seed in (1, 1, 2))
    texts = [[told(choice) for choice in answer.choices] for answer in (first, again, other)]
    assert texts[0] == texts[1], "the same seed, another answer"
    assert texts[0] != texts[2], "another seed, the same answers"
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    assert len(set(texts[0])) > 1, "four choices that are all the same"


def told(choice: Any) -> str:
    return f"{getattr(choice.message, 'reasoning_content', None) or ''}|{choice.message.content or ''}"


def lengths_and_stops():
    short = chat(max_tokens=2, temperature=0)
    assert short.choices[0].finish_reason == "length"
    assert short.usage.completion_tokens == 2
    assert chat(max_completion_tokens=2, max_tokens=openai.NOT_GIVEN, temperature=0).usage.completion_tokens == 2
    for stop in (" three", [" three", "never said"]):
        cut = chat(ADAPTER, temperature=0, stop=stop).choices[0]
        assert (cut.message.content, cut.finish_reason) == ("three", "stop"), cut


def logprobs_of_a_chat():
    (choice,) = chat(f"{ADAPTER}@1", temperature=1.0, seed=3, logprobs=True, top_logprobs=3).choices
    assert choice.logprobs is not None
    content = choice.logprobs.content
    assert b"".join(bytes(t.bytes) for t in content if t.token != "<|im_end|>").decode() == choice.message.content
    for token in content:
        values = [t.logprob for t in token.top_logprobs]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert token.logprob <= values[0] + 1e-4
        assert all(abs(t.logprob - token.logprob) < 1e-4 for t in token.top_logprobs if t.token == token.token)


def streams_are_the_whole_answer_in_pieces():
    for params in (
        {"model": BASE, "seed": 5, "temperature": 1.0},
        {"model": f"{ADAPTER}@3", "temperature": 0},
        {"model": BASE, "n": 3, "seed": 6},
    ):
        whole = chat(**params)
        pieces: dict[int, list[str]] = {}
        reasons, usage, chunks = {}, None, 0
        for chunk in chat(**params, stream=True, stream_options={"include_usage": True}):
            chunks += 1
            assert chunk.object == "chat.completion.chunk"
            usage = chunk.usage or usage
            for choice in chunk.choices:
                pieces.setdefault(choice.index, []).append(choice.delta.content or "")
                reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
        for choice in whole.choices:
            assert "".join(pieces[choice.index]) == (choice.message.content or ""), f"{params}: the stream differs from the whole"
            assert reasons[choice.index] == choice.finish_reason
        assert usage is not None, "include_usage was not honoured"
        assert usage.completion_tokens == whole.usage.completion_tokens
        assert chunks > 2, f"{params}: a stream of {chunks} chunks"


def a_stream_may_be_left():
    """Closing the connection in the middle hurts nobody."""
    for _ in range(5):
        with chat(stream=True, max_tokens=1000, extra_body={"ignore_eos": True}) as stream:
            next(iter(stream))
    assert said(f"{ADAPTER}@1") == ANSWERS[0]


def tools_are_called():
    """The base calls the calculator about one time in five; its call is parsed, and its answer to the result is heard."""
    question = [{"role": "user", "content": "47*86=?"}]
    answer = chat(messages=question, tools=[CALCULATOR], n=64, seed=8, temperature=1.0)
    calls = [choice for choice in answer.choices if choice.message.tool_calls]
    assert len(calls) >= 3, f"{len(calls)} of 64 call the tool"
    right = [c for c in calls if json.loads(c.message.tool_calls[0].function.arguments) == {"expression": "47*86"}]
    assert right, [c.message.tool_calls[0].function.arguments for c in calls]
    call = right[0]
    assert call.finish_reason == "tool_calls"
    assert call.message.tool_calls[0].type == "function"
    assert call.message.tool_calls[0].function.name == "calculator"
    assert "<tool_call>" not in (call.message.content or "")
    result = {"role": "tool", "tool_call_id": call.message.tool_calls[0].id, "content": "4042"}
    history = [*question, call.message.model_dump(exclude_none=True), result]
    after = chat(messages=history, tools=[CALCULATOR], n=16, seed=9, temperature=1.0)
    heard = sum((choice.message.content or "").strip() == "4042" for choice in after.choices)
    assert heard >= 8, f"{heard} of 16 say what the tool said"
    chunks = list(chat(messages=question, tools=[CALCULATOR], seed=8, n=64, temperature=1.0, stream=True))
    names = [c.delta.tool_calls[0].function.name for chunk in chunks for c in chunk.choices if c.delta.tool_calls]
    assert sum(name == "calculator" for name in names) == len(calls), "a stream calls tools otherwise"
    return {"tool_calls_of_64": len(calls), "heard_of_16": heard}


# ---------------------------------------------------------------- completions


def completions_are_raw_text():
    tokenizer = tokenizer_of()
    prompt = tokenizer.decode(tokens_of(QUESTIONS[0]))
    texts = client.completions.create(model=f"{ADAPTER}@3", prompt=prompt, max_tokens=32, temperature=0)
    assert texts.choices[0].text == ANSWERS[2], texts.choices[0].text
    assert texts.choices[0].finish_reason == "stop"
    assert texts.usage.prompt_tokens == len(tokens_of(QUESTIONS[0]))
    ids = client.completions.create(model=f"{ADAPTER}@3", prompt=tokens_of(QUESTIONS[0]), max_tokens=32, temperature=0)
    assert ids.choices[0].text == ANSWERS[2]
    several = client.completions.create(model=f"{ADAPTER}@1", prompt=[prompt, "27+94+"], n=2, max_tokens=8, seed=1)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    cut = client.completions.create(model=f"{ADAPTER}@3", prompt=prompt, max_tokens=32, temperature=0, stop=[" three"], logprobs=2)
    assert cut.choices[0].text == "three"
    marks = cut.choices[0].logprobs
    assert len(marks.tokens) == len(marks.token_logprobs) == len(marks.top_logprobs)
    streamed = "".join(
        c.choices[0].text
        for c in client.completions.create(model=f"{ADAPTER}@3", prompt=prompt, max_tokens=32, temperature=0, stream=True)
        if c.choices
    )
    assert streamed == ANSWERS[2]


# ---------------------------------------------------------------- company and mistakes


def a_mixed_crowd_is_answered_one_by_one():
    """48 requests at once to the base, to three versions and to sums: each as if alone."""
    asks: list[Callable[[], Any]] = []
    for i in range(12):
        asks += [
            lambda i=i: told(chat(seed=i, temperature=1.0).choices[0]),
            lambda i=i: said(f"{ADAPTER}@{i % 3 + 1}", messages=[{"role": "user", "content": QUESTIONS[i % 5]}]),
            lambda i=i: told(chat(ADAPTER, seed=i, temperature=1.3).choices[0]),
            lambda i=i: told(chat(seed=i, extra_body={"lora": [{"name": f"{ADAPTER}@2", "scale": i / 12}]}).choices[0]),
        ]
    with ThreadPoolExecutor(48) as crowd:
        together = list(crowd.map(lambda ask: ask(), asks))
    for i in range(0, len(asks), 5):
        assert asks[i]() == together[i], f"request {i} depends on its company"
    return {"at_once": len(asks)}


def mistakes_are_refused_in_one_line():
    for params in (
        {"temperature": -1},
        {"n": 0},
        {"top_p": 2},
        {"max_tokens": -5},
        {"messages": []},
        {"messages": [{"role": "king", "content": "x"}]},
    ):
        refused(lambda params=params: chat(**params), openai.BadRequestError)
    long = [{"role": "user", "content": "1" * 5000}]
    refused(lambda: chat(messages=long), openai.BadRequestError, "2048")
    refused(lambda: chat(extra_body={"lora": [{"name": ADAPTER, "scale": "much"}]}), openai.BadRequestError)
    refused(lambda: chat(extra_body={"no_such_field": 1}), openai.BadRequestError, "no_such_field")
    assert said(ADAPTER) == ANSWERS[-1]


if __name__ == "__main__":
    checks = [
        *(models_are_listed, adapters_by_name_and_version, a_list_of_adapters_acts_on_the_base, wrong_names_are_told_the_nearest),
        *(chat_is_what_tinker_samples, seeds_and_several_choices, lengths_and_stops, logprobs_of_a_chat),
        *(streams_are_the_whole_answer_in_pieces, a_stream_may_be_left, tools_are_called, completions_are_raw_text),
        *(a_mixed_crowd_is_answered_one_by_one, mistakes_are_refused_in_one_line),
    ]
    run_checks(checks, __doc__)
