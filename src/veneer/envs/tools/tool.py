"""One tool: what the model is told of it, and what happens when it is called."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jsonschema

from veneer.types import ToolCall


class ToolError(Exception):
    """A call that could not be answered, in words for the model. Anything else that a tool raises fails its rollout."""


@dataclass(frozen=True)
class Tool:
    """A function with a JSON schema (https://json-schema.org) of its arguments."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    """The schema of the arguments, of type object."""
    function: Callable[..., str | Awaitable[str]]
    """Called with the arguments by name; what it returns is shown to the model."""

    @cached_property
    def _validator(self) -> jsonschema.Draft202012Validator:
        return jsonschema.Draft202012Validator({"additionalProperties": False, **self.parameters})

    def schema(self) -> dict[str, Any]:
        """As chat templates show it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}

    async def call(self, arguments: Mapping[str, Any]) -> str:
        """Raises:
        ToolError: the arguments do not fit the schema, or the function says that it cannot answer.
        """
        wrong = next(iter(self._validator.iter_errors(dict(arguments))), None)
        if wrong is not None:
            where = ".".join(map(str, wrong.absolute_path))
            raise ToolError(f"{self.name}: {where + ': ' if where else ''}{wrong.message}")
        answer = self.function(**arguments)
        return await answer if inspect.isawaitable(answer) else answer


async def answer_call(tools: Mapping[str, Tool], call: ToolCall) -> str:
    """What a call brings.

    Raises:
        ToolError: there is no such tool, or it cannot answer.
    """
    tool = tools.get(call["name"])
    if tool is None:
        raise ToolError(f"there is no tool {call['name']}; there are {', '.join(tools)}")
    return await tool.call(call["arguments"])
