"""From what a model says to an OpenEnv action: its text as one field of the action, or its tool calls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from veneer.envs.bridges.chat import Json
from veneer.types import ConfigError, Message


class ActionError(Exception):
    """What the model said is no action, in words for the model."""


@dataclass(frozen=True)
class Schema:
    """The server's own JSON schema of its actions."""

    fields: Mapping[str, Json]

    @property
    def calls_tools(self) -> bool:
        """It is OpenEnv's CallToolAction: the environment is played by MCP tools."""
        return "tool_name" in self.fields


@dataclass(frozen=True)
class Action:
    schema: Schema
    field: str
    """Where the text goes."""
    fixed: Json
    """The other fields."""


def read_schema(told: Any) -> Schema:
    """Of what the server says at /schema.

    Raises:
        ConfigError: it says no such thing.
    """
    action = told.get("action") if isinstance(told, dict) else None
    fields = action.get("properties") if isinstance(action, dict) else None
    if not isinstance(fields, dict):
        raise ConfigError("env.name: what answers there is no OpenEnv server: /schema names no action")
    return Schema({name: kind for name, kind in fields.items() if isinstance(kind, dict) and name != "metadata"})


def actions_of(action: Action, said: Message) -> Sequence[Json]:
    """The actions in a turn, in order. None at all: where tools are called, the model ends the episode by calling none.

    Raises:
        ActionError: it is no action.
    """
    if not action.schema.calls_tools:
        return [{**action.fixed, action.field: _value(said["content"].strip(), action.schema.fields[action.field])}]
    if said.get("invalid_tool_calls"):
        raise ActionError("not a call; write a JSON object with name and arguments")
    return [{"type": "call_tool", "tool_name": c["name"], "arguments": c["arguments"], **action.fixed} for c in said.get("tool_calls", [])]


def _value(text: str, schema: Json) -> Any:
    """The text in the type that the schema names; where it allows a string, as it is."""
    kinds = [schema.get("type"), *(option.get("type") for option in schema.get("anyOf", []) if isinstance(option, dict))]
    if "string" in kinds or not any(kinds):
        return text
    wanted = next(kind for kind in kinds if kind)
    try:
        value = json.loads(text)
    except ValueError:
        raise ActionError(f"an action is of type {wanted} here, not {text[:40]!r}") from None
    right = {"integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict}.get(str(wanted), object)
    if not isinstance(value, right) or (wanted in ("integer", "number") and isinstance(value, bool)):
        raise ActionError(f"an action is of type {wanted} here, not {text[:40]!r}")
    return value
