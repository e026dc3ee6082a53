"""Dataset files: a JSON object a line, in TRL's columns (https://huggingface.co/docs/trl/dataset_formats).

``messages``, or ``prompt`` and ``completion``, or ``prompt``, ``chosen`` and ``rejected``; each as a list of messages or as
text, and ``tools`` beside any of them. Text is one message: what the user says, or what the assistant answers.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from veneer.jsonl import read_jsonl
from veneer.render import Renderer
from veneer.train.datums import supervised_data
from veneer.types import DataError, Datum, Message, ToolCall

T = TypeVar("T")

TrainOn = Literal["all_assistant_messages", "last_assistant_message"]


@dataclass(frozen=True)
class Conversation:
    messages: Sequence[Message]
    given: int = 0
    """So many messages at the beginning are a prompt: nothing in them is trained."""
    tools: Sequence[dict[str, Any]] = ()


# ---------------------------------------------------------------- files


def read_rows(path: Path, key: str, needs: str, held_out: float, make: Callable[[Any], T]) -> tuple[list[T], list[T]]:
    """What ``make`` makes of every line, to train on and held out: a line belongs to one or the other by its text.

    Args:
        key: of the configuration, for the message that there is no such file.
        needs: what a line needs, for the message that one is wrong.
        held_out: share of the lines.

    Raises:
        DataError: names the file and the line.
    """
    if not path.is_file():
        raise DataError(f"{key}: there is no file {str(path)!r}")
    rows: list[T] = []
    kept_apart: list[T] = []
    for number, line in read_jsonl(path):
        try:
            row = make(line)
        except (ValueError, LookupError, TypeError, AttributeError, DataError) as error:
            raise DataError(f"{path}, line {number}: {error}; a line needs {needs}") from error
        drawn = int.from_bytes(hashlib.blake2b(json.dumps(line, sort_keys=True).encode(), digest_size=8).digest()) / 2**64
        (rows if drawn >= held_out else kept_apart).append(row)
    if not rows:
        raise DataError(f"{path} has no rows to train on")
    return rows, kept_apart


def batch_indices(rows: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The rows of a step: epochs are seeded permutations, laid end to end."""
    positions = range((step - 1) * batch_size, step * batch_size)
    orders = {epoch: permutation(rows, f"{seed}/{epoch}") for epoch in {p // rows for p in positions}}
    return [orders[p // rows][p % rows] for p in positions]


@lru_cache(4)
def permutation(rows: int, seed: str) -> tuple[int, ...]:
    order = list(range(rows))
    random.Random(seed).shuffle(order)
    return tuple(order)


# ---------------------------------------------------------------- columns


def conversation(row: Any) -> Conversation:
    """A line of ``messages``, or of ``prompt`` and ``completion``."""
    if "messages" in row:
        return Conversation(_messages(row["messages"]), 0, _tools(row))
    prompt, completion = _said(row["prompt"], "user"), _said(row["completion"], "assistant")
    return Conversation([*prompt, *completion], len(prompt), _tools(row))


def preference(row: Any) -> tuple[Conversation, Conversation]:
    """The chosen and the rejected conversation of a line. Without ``prompt`` it is what both begin with."""
    chosen, rejected = row["chosen"], row["rejected"]
    if "prompt" not in row:
        prompt, chosen, rejected = _divided(chosen, rejected)
    else:
        prompt = row["prompt"]
    begin, tools = _said(prompt, "user"), _tools(row)
    good, bad = (Conversation([*begin, *_said(end, "assistant")], len(begin), tools) for end in (chosen, rejected))
    return good, bad


def question(row: Any) -> Conversation:
    """A line of ``prompt``, or of ``messages`` up to the last answer: what is to be answered."""
    messages = _said(row["prompt"], "user") if "prompt" in row else _messages(row["messages"])
    while "prompt" not in row and messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise ValueError("there is no question in it")
    return Conversation(messages, len(messages), _tools(row))


def _divided(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """TRL's rule (``extract_prompt``): up to the first difference, or to the last place of the shorter if there is none."""
    if type(chosen) is not type(rejected):
        raise ValueError("chosen and rejected must both be text or both lists of messages")
    shorter = min(len(chosen), len(rejected))
    at = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter - 1)
    if isinstance(chosen, str) and at > 0 and chosen[at - 1] == " ":
        at -= 1
    if at < 1:
        raise ValueError("chosen and rejected have no common beginning, and there is no 'prompt'")
    return chosen[:at], chosen[at:], rejected[at:]


def _said(part: Any, role: Literal["user", "assistant"]) -> list[Message]:
    if isinstance(part, str):
        return [{"role": role, "content": part}]
    return _messages(part)


def _messages(found: Any) -> list[Message]:
    if not isinstance(found, list) or not found:
        raise ValueError(f"{found!r:.80} is neither text nor a list of messages")
    return [_message(message) for message in cast("list[Any]", found)]


def _message(found: Any) -> Message:
    """As our templates read it. OpenAI's and TRL's ``function`` around a call is taken off, and arguments that are JSON text are read."""
    if found["role"] not in ("system", "user", "assistant", "tool"):
        raise ValueError(f"unknown role {found['role']!r}")
    calls = [_call(call) for call in found.get("tool_calls") or ()]
    content = found.get("content", "") if calls else found["content"]
    content = "" if calls and content is None else content
    if not isinstance(content, str):
        raise ValueError(f"the content of a message must be text, not {content!r:.80}")
    message = {**{key: value for key, value in found.items() if value is not None}, "content": content}
    return cast(Message, {**message, "tool_calls": calls} if calls else message)


def _call(found: Any) -> ToolCall:
    function = found.get("function", found)
    arguments = function["arguments"]
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(arguments, dict) or not isinstance(function["name"], str):
        raise ValueError(f"{found!r:.80} is no tool call: it needs a name and arguments")
    return {"name": function["name"], "arguments": cast("dict[str, Any]", arguments)}


def _tools(row: Any) -> list[dict[str, Any]]:
    """JSON schemas, or JSON text of them."""
    tools = row.get("tools") or []
    tools = json.loads(tools) if isinstance(tools, str) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in cast("list[Any]", tools)):
        raise ValueError("tools must be a list of JSON schemas")
    return cast("list[dict[str, Any]]", tools)


# ---------------------------------------------------------------- datums


def answer_data(talk: Conversation, renderer: Renderer, context: int, train_on: TrainOn = "all_assistant_messages") -> list[Datum]:
    """Datums with the loss on the assistant's messages behind what is given: all of them, or the last.

    Raises:
        DataError: it does not end with the assistant, or is longer than the context.
    """
    messages = talk.messages
    if len(messages) == talk.given or messages[-1]["role"] != "assistant":
        raise DataError("the last message must be the assistant's")
    places = [i for i in range(talk.given, len(messages)) if messages[i]["role"] == "assistant"]
    places = places[-1:] if train_on == "last_assistant_message" else places
    turns = [renderer.build_supervised_example(messages[: i + 1], talk.tools) for i in places]
    longest = max(len(prompt) + len(answer) for prompt, answer in turns)
    if longest > context:
        raise DataError(f"{longest} tokens; the base's context is {context}")
    return supervised_data(turns)
