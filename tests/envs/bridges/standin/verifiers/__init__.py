"""A stand-in for verifiers 0.3, where the package is not installed: the documented classic interface, as far as modules/ use it.

It proves nothing about verifiers itself. The tests that use it run against the real package too (``make bridges``).
"""

from __future__ import annotations

import importlib
import json
from types import SimpleNamespace
from typing import Any

from verifiers.clients import Client

__version__ = "0.3.standin"


def load_environment(identity: str, **args: Any) -> Any:
    return importlib.import_module(identity.replace("-", "_")).load_environment(**args)


class Rubric:
    def __init__(self, funcs: list[Any]) -> None:
        self.funcs = funcs

    @property
    def has_group_rewards(self) -> bool:
        return any("completions" in func.__code__.co_varnames[: func.__code__.co_argcount] for func in self.funcs)


class MultiTurnEnv:
    def __init__(
        self, dataset: Any = None, eval_dataset: Any = None, rubric: Any = None, max_turns: int = -1, tool_defs: Any = None
    ) -> None:
        self.dataset, self.eval_dataset, self.rubric, self.max_turns, self.tool_defs = dataset, eval_dataset, rubric, max_turns, tool_defs

    @property
    def requires_group_rollouts(self) -> bool:
        return self.rubric.has_group_rewards

    def get_dataset(self) -> Any:
        return self.dataset

    def get_eval_dataset(self) -> Any:
        return self.eval_dataset

    async def env_response(self, messages: Any, state: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    async def get_prompt_messages(self, state: Any) -> Any:
        if not state["trajectory"]:
            return list(state["prompt"])
        said = [*state["trajectory"][-1]["prompt"], *state["trajectory"][-1]["completion"]]
        return [*said, *(_read(m) for m in await self.env_response(said, state))]

    async def get_model_response(self, state: Any, prompt: Any, sampling_args: Any = None, **kwargs: Any) -> Any:
        tools = [{"type": "function", "function": tool} for tool in self.tool_defs or ()]
        body = {
            "model": state["model"],
            "messages": [_wire(m) for m in prompt],
            **(sampling_args or {}),
            **({"tools": tools} if tools else {}),
        }
        return SimpleNamespace(message=_read((await state["client"].post(body))["choices"][0]["message"]))

    async def run_rollout(self, row: Any, client: Client, model: str, sampling_args: Any) -> dict[str, Any]:
        state: dict[str, Any] = {**row, "client": client, "model": model, "trajectory": []}
        state["prompt"] = [_read(m) for m in row["prompt"]]
        while len(state["trajectory"]) < self.max_turns:
            prompt = await self.get_prompt_messages(state)
            response = await self.get_model_response(state, prompt)
            if not (response.message.content or response.message.tool_calls or getattr(response.message, "reasoning_content", None)):
                break  # verifiers makes an EmptyModelResponseError of it, which ends the rollout
            state["trajectory"].append({"prompt": prompt, "completion": [response.message]})
        said = [message for turn in state["trajectory"][-1:] for message in (*turn["prompt"], *turn["completion"])]
        completion = said[len(state["prompt"]) :]
        scores = {func.__name__: func(completion=completion, answer=row["answer"]) for func in self.rubric.funcs}
        return {"reward": sum(scores.values()), "metrics": {**scores, "num_turns": float(len(state["trajectory"]))}, "error": None}


def _read(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    calls = [
        SimpleNamespace(id=c["id"], name=c["function"]["name"], arguments=c["function"]["arguments"])
        for c in message.get("tool_calls") or ()
    ]
    return SimpleNamespace(**{"content": "", **message, "tool_calls": calls or None})


def _wire(message: Any) -> dict[str, Any]:
    wire = {name: value for name, value in vars(message).items() if name in ("role", "content", "tool_call_id")}
    if message.tool_calls:
        wire["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": json.dumps(json.loads(c.arguments))}}
            for c in message.tool_calls
        ]
    return wire
