"""The conversation between an environment that leads and a policy that leads, and the endpoint in which they meet."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.envs.bridges.chat import ChatError, answer_of, completion, read_request
from veneer.envs.bridges.endpoint import Endpoint
from veneer.envs.bridges.errors import BridgeError
from veneer.envs.bridges.talk import Asked, Talk
from veneer.types import Message

ADD: Any = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
HELLO: Any = {"role": "user", "content": "hello"}


@asynccontextmanager
async def served(talk: Talk) -> AsyncGenerator[tuple[Endpoint, openai.AsyncOpenAI]]:
    endpoint = Endpoint()
    endpoint.talks[talk.name] = talk
    endpoint.serve()
    client = openai.AsyncOpenAI(base_url=endpoint.url, api_key=endpoint.key, max_retries=0)
    try:
        yield endpoint, client
    finally:
        await client.close()
        await endpoint.close()


async def answering(talk: Talk, *actions: Message) -> list[Asked]:
    asked = []
    for action in actions:
        turn = await talk.next()
        assert isinstance(turn, Asked)
        asked.append(turn)
        talk.reply(action)
    return asked


@pytest.mark.parametrize("stream", [False, True])
def test_the_public_client_plays_a_tool_call_and_an_answer(stream: bool) -> None:
    """An environment uses the openai package, streaming or not, and gets thinking, calls with ids, and text as it expects them."""

    async def environment(client: openai.AsyncOpenAI) -> tuple[Any, Any]:
        messages: list[Any] = [HELLO]
        first = await complete(client, messages)
        messages += [first, {"role": "tool", "tool_call_id": first["tool_calls"][0]["id"], "content": "3"}]
        return first, await complete(client, messages)

    async def complete(client: openai.AsyncOpenAI, messages: list[Any]) -> Any:
        if not stream:
            whole = await client.chat.completions.create(model="rollout-0", messages=messages, tools=[ADD])
            return whole.choices[0].message.model_dump(exclude_none=True)
        async with client.chat.completions.stream(model="rollout-0", messages=messages, tools=[ADD]) as events:
            message = (await events.get_final_completion()).choices[0].message
            return {name: value for name, value in message.model_dump(exclude_none=True).items() if name != "parsed"}

    async def both() -> tuple[tuple[Any, Any], list[Asked]]:
        talk = Talk("rollout-0")
        call: Message = {
            "role": "assistant",
            "content": "",
            "reasoning_content": "hm",
            "tool_calls": [{"name": "add", "arguments": {"a": 1}}],
        }
        async with served(talk) as (_, client):
            return await asyncio.gather(environment(client), answering(talk, call, {"role": "assistant", "content": "it is 3"}))

    (first, second), asked = asyncio.run(both())
    assert first["reasoning_content"] == "hm"
    assert first["tool_calls"][0]["function"]["name"] == "add"
    assert json.loads(first["tool_calls"][0]["function"]["arguments"]) == {"a": 1}
    assert second["content"] == "it is 3"
    assert asked[0] == Asked([HELLO], [ADD])
    assert asked[1] == Asked([{"role": "tool", "content": "3"}], [ADD])


def test_only_who_has_the_key_and_names_an_open_rollout_is_answered() -> None:
    """Another user of the machine finds the port, and learns nothing there."""

    async def asking() -> None:
        talk = Talk("rollout-0")
        async with served(talk) as (endpoint, client):
            stranger = client.with_options(api_key="guess")
            with pytest.raises(openai.AuthenticationError):
                await stranger.models.list()
            with pytest.raises(openai.AuthenticationError):
                await stranger.chat.completions.create(model="rollout-0", messages=[HELLO])
            with pytest.raises(openai.NotFoundError, match="only model of a rollout is its policy"):
                await client.chat.completions.create(model="gpt-4.1", messages=[HELLO])
            assert [model.id for model in (await client.models.list()).data] == ["rollout-0"]
            assert len(endpoint.key) >= 32
            talk.end(1.0, {})
            with pytest.raises(openai.BadRequestError, match="the rollout has ended"):
                await client.chat.completions.create(model="rollout-0", messages=[HELLO])

    asyncio.run(asking())


def test_a_rollout_that_is_given_up_answers_the_request_that_waits() -> None:
    """Otherwise the environment waits for ever for a policy that has gone."""

    async def asking() -> None:
        talk = Talk("rollout-0")
        async with served(talk) as (_, client):
            request = asyncio.ensure_future(client.chat.completions.create(model="rollout-0", messages=[HELLO]))
            await talk.next()
            talk.fail("it was given up")
            with pytest.raises(openai.APIStatusError, match="the rollout is over"):
                await request

    asyncio.run(asking())


def ask(talk: Talk, messages: list[Any], **settings: Any) -> None:
    talk.ask({"messages": messages, **settings})


def failure(requests: list[tuple[list[Any], dict[str, Any]]]) -> str:
    """How a rollout with these requests fails, to the environment and to the policy alike; the policy says "ok" each time."""

    async def asking() -> str:
        talk = Talk("rollout-0")
        for i, (messages, asked) in enumerate(requests):
            if i < len(requests) - 1:
                ask(talk, messages, **asked)
                await talk.next()
                talk.reply({"role": "assistant", "content": "ok"})
                continue
            with pytest.raises(ChatError) as told:
                ask(talk, messages, **asked)
            with pytest.raises(BridgeError) as failed:
                await talk.next()
            assert str(told.value) == str(failed.value)
            return str(failed.value)
        raise AssertionError

    return asyncio.run(asking())


OK: Any = {"role": "assistant", "content": "ok"}
MORE: Any = {"role": "user", "content": "more"}


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ([MORE], "message 1 of 2, what it showed, is another"),
        ([HELLO, {"role": "assistant", "content": "OK."}, MORE], "message 2 of 2, the policy's own answer, is another"),
        ([HELLO], "message 2 of 2, the policy's own answer, is another or missing"),
    ],
)
def test_a_history_that_is_rewritten_fails_the_rollout(second: list[Any], words: str) -> None:
    """What the model saw would not be what is trained; the line names the place."""
    assert words in failure([([HELLO], {}), (second, {})])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": 0.7}, "temperature = 0.7"),
        ({"temperature": 0}, "temperature = 0"),
        ({"top_p": 0.9}, "top_p"),
        ({"stop": ["\n"]}, "stop"),
        ({"n": 2}, "n = 2"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
)
def test_what_would_change_the_sampling_is_refused(settings: dict[str, Any], words: str) -> None:
    """An environment that sets a temperature would be trained on another distribution than it was sampled from."""
    assert words in failure([([HELLO], settings)])


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0, "top_p": 1, "n": 1, "stop": None},
        {"max_tokens": 5, "max_completion_tokens": 7, "seed": 3, "user": "x", "metadata": {}},
    ],
)
def test_what_changes_nothing_or_is_the_runs_own_is_let_through(settings: dict[str, Any]) -> None:
    """Libraries send their defaults along."""
    assert [s.content for s in read_request({"messages": [HELLO], **settings})[0]] == ["hello"]


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "no list of messages"),
        ("hello", "no list of messages"),
        ([{"role": "wizard", "content": "x"}], "no known role"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}], "other than text: image_url"),
        ([HELLO, OK], "ends with the assistant"),
        (
            [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, HELLO],
            "tool call that is none",
        ),
    ],
)
def test_a_request_that_is_no_conversation_is_told_in_words(messages: Any, words: str) -> None:
    with pytest.raises(ChatError, match=words):
        read_request({"messages": messages})


def test_two_requests_at_once_are_several_agents() -> None:
    """Their turns have no order, so there is no row to train."""

    async def asking() -> None:
        talk = Talk("rollout-0")
        ask(talk, [HELLO])
        with pytest.raises(ChatError, match="several agents"):
            ask(talk, [MORE])

    asyncio.run(asking())


def test_other_tools_in_a_later_request_fail_the_rollout() -> None:
    """The tools stand in the first prompt, which has been read."""
    assert "other tools" in failure([([HELLO], {}), ([HELLO, OK, MORE], {"tools": [ADD]})])


TEXT = st.text(max_size=20)
CALL = st.fixed_dictionaries({"name": TEXT, "arguments": st.dictionaries(TEXT, st.one_of(st.integers(), TEXT), max_size=3)})


@settings(max_examples=50, deadline=None)
@given(content=TEXT, calls=st.lists(CALL, max_size=3), reasoning=st.none() | TEXT)
def test_an_answer_that_comes_back_is_recognised(content: str, calls: list[Any], reasoning: str | None) -> None:
    """Whatever a policy says: an environment that sends it on as it got it, with nulls for what is empty and its JSON spelled anew,
    has rewritten nothing."""
    action: Message = {"role": "assistant", "content": content, **({"tool_calls": calls} if calls else {})}  # type: ignore[typeddict-item]
    answer = answer_of(action, 0)
    message = completion("m", answer, reasoning)["choices"][0]["message"]
    message["content"] = message["content"] or None
    for call in message.get("tool_calls", []):
        call["function"]["arguments"] = json.dumps(json.loads(call["function"]["arguments"]), indent=1)
    said, _ = read_request({"messages": [HELLO, json.loads(json.dumps(message)), MORE]})
    assert said[1] == answer
