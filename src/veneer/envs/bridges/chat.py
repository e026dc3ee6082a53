"""The OpenAI chat format, as far as environments speak it to their model: requests in, completions out."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from veneer.types import Message, ToolCall

Json = dict[str, Any]

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "temperature": (1,),
    "top_p": (1,),
    "top_k": (-1, 0),
    "min_p": (0,),
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "stop": ([],),
    "logprobs": (False,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto",),
}
"""Settings that change what is sampled, or ask for more than a text, and the values that change nothing. With any other value what
is sampled would not be what is trained. ``max_tokens``, ``seed`` and all that is not named here are ignored: the run decides."""


class ChatError(Exception):
    """A request that cannot be answered, in words."""


@dataclass(frozen=True)
class Said:
    """One message, in the parts that are compared: whoever sends it again may spell it otherwise."""

    role: str
    content: str
    calls: tuple[tuple[str, str, str], ...] = ()
    """Id, name and arguments (JSON with sorted keys) of each tool call."""
    answers: str = ""
    """Id of the call that a tool message answers."""

    def message(self) -> Message:
        message = cast(Message, {"role": self.role, "content": self.content})
        if self.calls:
            message["tool_calls"] = [_call(name, arguments) for _, name, arguments in self.calls]
        return message


def _call(name: str, arguments: str) -> ToolCall:
    return {"name": name, "arguments": json.loads(arguments)}


def read_request(body: Mapping[str, Any]) -> tuple[list[Said], list[Json]]:
    """Messages and tools of a chat request.

    Raises:
        ChatError: it is none, or asks for what would not be the policy's own text.
    """
    for name, allowed in NEUTRAL.items():
        if body.get(name) is not None and body[name] not in allowed:
            raise ChatError(f"the environment asks for {name} = {json.dumps(body[name])}; what is trained is the policy as it is")
    messages, tools = body.get("messages"), body.get("tools") or []
    if not isinstance(messages, list) or not messages or not isinstance(tools, list):
        raise ChatError("the environment's request has no list of messages")
    said = [_read_message(message) for message in messages]
    if said[-1].role == "assistant":
        raise ChatError("the environment's request ends with the assistant: an answer that is begun already cannot be trained")
    return said, tools


def _read_message(message: Any) -> Said:
    role = ROLES.get(str(message.get("role"))) if isinstance(message, dict) else None
    if role is None:
        raise ChatError(f"the environment's request has a message of no known role: {message!r:.80}")
    calls: list[tuple[str, str, str]] = []
    for call in message.get("tool_calls") or []:
        try:
            arguments = json.dumps(json.loads(call["function"]["arguments"]), sort_keys=True)
            calls.append((str(call.get("id", "")), str(call["function"]["name"]), arguments))
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ChatError(f"the environment's request has a tool call that is none: {call!r:.80}") from error
    return Said(role, _text(message.get("content")), tuple(calls), str(message.get("tool_call_id") or "") if role == "tool" else "")


def _text(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [content]
    for part in parts:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ChatError(f"the environment shows the model something other than text: {kind}")
    return "".join(part["text"] for part in parts)


def answer_of(action: Message, first_call: int) -> Said:
    """An action as it goes out. ``first_call`` numbers its tool calls, which need ids of their own."""
    calls = [
        (f"call_{first_call + i}", call["name"], json.dumps(call["arguments"], sort_keys=True))
        for i, call in enumerate(action.get("tool_calls", []))
    ]
    return Said("assistant", action["content"], tuple(calls))


def completion(model: str, answer: Said, reasoning: str | None) -> Json:
    """A chat completion. It says nothing of tokens: an environment sees text."""
    message: Json = {"role": "assistant", "content": answer.content}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    if answer.calls:
        message["tool_calls"] = [
            {"id": call, "type": "function", "function": {"name": name, "arguments": arguments}} for call, name, arguments in answer.calls
        ]
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if answer.calls else "stop"}
    return {
        "id": f"chatcmpl-{model}-{time.monotonic_ns()}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [choice],
    }


def events(whole: Json) -> Sequence[str]:
    """A completion as server-sent events: all of it in one, its end, and the mark of the end."""
    (choice,) = whole["choices"]
    delta = dict(choice["message"])
    if "tool_calls" in delta:
        delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(delta["tool_calls"])]
    head = {**whole, "object": "chat.completion.chunk"}
    first = {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    last = {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}]}
    return [f"data: {json.dumps(first)}\n\n", f"data: {json.dumps(last)}\n\n", "data: [DONE]\n\n"]
