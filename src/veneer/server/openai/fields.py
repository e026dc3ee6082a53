"""Kinds of fields that a request has: in what forms they may come, and what they are made into."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

MOST_STOPS, LONGEST_STOP = 64, 1024
LOWEST_TEMPERATURE = 1e-4
"""Above 0: logits divided by less are no float32 any more."""
LEAST_SCALE = 1e-3
"""An adapter by less than this is none: its update vanishes in rounding."""
MOST_TOKEN = 2**31 - 1


@dataclass(frozen=True)
class Form:
    """A field that comes in several forms: ``schema`` tells them, ``read`` makes one of them or says what is wrong."""

    read: Callable[[Any], Any]
    schema: dict[str, Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self.read, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return self.schema


def only(*values: Any) -> Form:
    """A field that must not change the answer, as nothing here acts on it: these values and null are taken, and mean the same."""
    there = ", ".join(json.dumps(value) for value in values)

    def read(value: Any) -> Any:
        if value is None or any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in values):
            return value
        raise ValueError(f"this server does not act on it; leave it out{f', or give {there}' if there else ''}")

    return Form(read, {"enum": [None, *values]})


def _stops(value: Any) -> list[str]:
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("it must be a text or a list of texts")
    if len(texts) > MOST_STOPS or not all(0 < len(text) <= LONGEST_STOP for text in texts):
        raise ValueError(f"it must be at most {MOST_STOPS} texts, each of 1 to {LONGEST_STOP} characters")
    return texts


def _prompts(value: Any) -> list[Any]:
    """One prompt or many, each a text or tokens."""
    many = value if isinstance(value, list) and value and not _is_tokens(value) else [value]
    if not all(isinstance(prompt, str) or _is_tokens(prompt) for prompt in many):
        raise ValueError(f"it must be a text, a list of token ids from 0 to {MOST_TOKEN}, or a list of either")
    return many


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(t) is int and 0 <= t <= MOST_TOKEN for t in value)


def _content(value: Any) -> str:
    """Text, or text in parts."""
    parts = [] if value is None else [{"type": "text", "text": value}] if isinstance(value, str) else value
    if not isinstance(parts, list) or not all(isinstance(part, Mapping) for part in parts):
        raise ValueError("it must be a text or a list of parts")
    odd = [part.get("type") for part in parts if part.get("type") != "text" or not isinstance(part.get("text"), str)]
    if odd:
        raise ValueError(f"it must have text parts only; {json.dumps(odd[0])[:80]} cannot be read by this base")
    return "".join(part["text"] for part in parts)


def _temperature(value: float) -> float:
    if 0 < value < LOWEST_TEMPERATURE:
        raise ValueError(f"it must be 0 (greedy) or at least {LOWEST_TEMPERATURE}")
    return value


def _scale(value: float) -> float:
    if 0 < abs(value) < LEAST_SCALE:
        raise ValueError(f"it must be 0 (the adapter does not act) or at least {LEAST_SCALE}, with either sign")
    return value


def _tool(value: Any) -> Any:
    """As it came: its keys go into the prompt in their order."""
    function = value.get("function") if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping) or value.get("type") != "function" or not isinstance(function, Mapping):
        raise ValueError('it must be {"type": "function", "function": {...}}; there are no tools of another type')
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError("its function must have a name")
    if function.get("strict"):
        raise ValueError("strict: arguments are not forced into their schema by this server; leave strict out or false")
    return value


def _arguments(value: str) -> str:
    try:
        parsed = json.loads(value or "{}")
    except (ValueError, RecursionError) as error:
        raise ValueError("it must be a JSON object, written as a text") from error
    if not isinstance(parsed, dict):
        raise ValueError("it must be a JSON object, written as a text")
    return value or "{}"


TEXT = {"type": "string"}
STOP = {"type": "string", "minLength": 1, "maxLength": LONGEST_STOP}
TOKENS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": MOST_TOKEN}}
PART = {"type": "object", "properties": {"type": {"const": "text"}, "text": TEXT}, "required": ["type", "text"]}
TOOL = {
    "type": "object",
    "required": ["type", "function"],
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "required": ["name"],
            "properties": {
                "name": {"type": "string", "minLength": 1},
                "description": TEXT,
                "parameters": {"type": "object"},
                "strict": {"enum": [None, False]},
            },
        },
    },
}

Stops = Annotated[list[str], Form(_stops, {"anyOf": [STOP, {"type": "array", "items": STOP, "maxItems": MOST_STOPS}, {"type": "null"}]})]
Prompts = Annotated[
    list[Any], Form(_prompts, {"anyOf": [TEXT, TOKENS, {"type": "array", "minItems": 1, "items": {"anyOf": [TEXT, TOKENS]}}]})
]
Content = Annotated[str, Form(_content, {"anyOf": [TEXT, {"type": "array", "items": PART}, {"type": "null"}]})]
Tool = Annotated[dict[str, Any], Form(_tool, TOOL)]
Arguments = Annotated[str, AfterValidator(_arguments)]
Temperature = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False), AfterValidator(_temperature)]
Probability = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Scale = Annotated[float, Field(ge=-1000, le=1000, allow_inf_nan=False), AfterValidator(_scale)]
Span = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
