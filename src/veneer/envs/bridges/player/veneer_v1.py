"""Tasksets of verifiers v1 (``verifiers.v1``, alone in the package from 0.4 on)."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import sys
import types
from collections.abc import AsyncGenerator
from typing import Any

from veneer_loading import Refused, split, text_of

CHAT = "veneer_chat"
"""The id of the harness below."""


class Tasks:
    def __init__(self, settings: dict[str, Any], key: str) -> None:
        try:
            vf = importlib.import_module("verifiers.v1")
        except ModuleNotFoundError as error:
            raise Refused(f"{settings['id']} has no load_environment, and verifiers.v1 cannot be imported ({error})") from error
        self.version = importlib.import_module("verifiers").__version__
        sys.modules[CHAT] = chat_harness(vf)
        config, identity = settings["config"], settings["id"]
        kind = vf.env_config_type(identity, config.get("id", ""))
        roles = [name for name, field in kind.model_fields.items() if isinstance(field.default, vf.AgentConfig)]
        data: dict[str, Any] = {**config, "taskset": {**config.get("taskset", {}), "id": identity, **settings["args"]}}
        plain = vf.default_harness_id(identity) == "bash"  # what a taskset without one of its own falls back to
        for role in roles:
            own = kind.model_fields[role].default
            defaults: dict[str, Any] = {"runtime": {"type": "subprocess"}}
            if plain and (own.harness is None or own.harness.id == "null"):
                defaults["harness"] = {"id": CHAT}
            data[role] = {**defaults, **config.get(role, {})}
        self.config = vf.resolve_env_config(data)
        policy = [role for role in roles if getattr(self.config, role).client is None]
        if len(policy) != 1:
            raise Refused(
                f"{identity} has {len(policy)} agents of the policy ({', '.join(policy)}); this bridge trains one: "
                "give the others a client of their own in env.args.config"
            )
        self.role = policy[0]
        self.env = vf.load_environment(self.config)
        self.context = lambda model: vf.ModelContext(
            model=model, client=vf.EvalClientConfig(base_url=settings["url"], api_key_var=key, timeout={"connect": 60.0})
        )
        limit = settings["limit"] if self.env.taskset.INFINITE else None
        self.tasks = list(itertools.islice(iter(self.env.taskset), limit))
        self.places = split([text_of(task.data.model_dump(mode="json", exclude={"idx", "name"})) for task in self.tasks], None)

    def facts(self) -> dict[str, Any]:
        return {"api": "v1", "version": self.version, **{kind: len(found) for kind, found in self.places.items()}}

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncGenerator[None, None]:
        async with self.env.serving():
            yield

    async def play(self, name: str, split: str, index: int) -> tuple[Any, dict[str, Any]]:
        """Reward and metrics of one episode; its model is called ``name``."""
        _, at = self.places[split][index]
        (slot,) = self.env.slots(self.tasks[at])
        episode = await self.env.run_slot(slot, self.context(name))
        traces = episode.traces if len(episode.traces) == 1 else [t for t in episode.traces if t.agent.name == self.role]
        errors = [*(error for trace in traces for error in trace.errors), *episode.errors]
        if errors or len(traces) != 1:
            last = errors[-1] if errors else None
            raise RuntimeError(f"{last.type}: {last.message}" if last else f"it ran {len(traces)} agents of the policy")
        (trace,) = traces
        unscored = [reward for reward, value in trace.rewards.items() if value is None]
        if unscored:
            raise RuntimeError(f"the reward {unscored[0]} was not given")
        rewards = {reward: value.score for reward, value in trace.rewards.items()}
        return trace.reward, {**rewards, **{metric: value for metric, value in trace.metrics.items() if value is not None}}


def chat_harness(vf: Any) -> types.ModuleType:
    """A module with a harness that does in this process what verifiers' own ``null`` does in one for every rollout: a chat, with the
    task's MCP tools, until an answer calls none."""
    httpx = importlib.import_module("httpx")
    tools_of = importlib.import_module("verifiers.v1.harnesses.utils.mcp")
    to_wire = importlib.import_module("verifiers.v1.dialects.chat").message_to_wire

    class ChatHarness(vf.Harness[vf.HarnessConfig]):
        APPENDS_SYSTEM_PROMPT = SUPPORTS_MCP = SUPPORTS_RESUME = True
        EXECUTES_CODE = NEEDS_CONTAINER = False

        async def launch(
            self, ctx: Any, trace: Any, runtime: Any, endpoint: str, secret: str, mcp_urls: dict[str, str], data: Any, **_: Any
        ) -> Any:
            system, prompt = self.resolve_prompt(data)
            messages = [{"role": "system", "content": system}] if system else []
            messages += [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [to_wire(m) for m in prompt or ()]
            servers = {"mcpServers": {name: {"url": url, "timeout": self.config.tool_timeout} for name, url in mcp_urls.items()}}
            async with contextlib.AsyncExitStack() as stack:
                client = await stack.enter_async_context(httpx.AsyncClient(timeout=None))
                tools, dispatch, connected = await tools_of.connect_mcp(servers, stack) if mcp_urls else ([], {}, {})
                while True:
                    body = {"model": ctx.model, "messages": messages, **({"tools": tools} if tools else {})}
                    response = await client.post(f"{endpoint}/chat/completions", json=body, headers={"Authorization": f"Bearer {secret}"})
                    if response.is_error:  # also how a task's stop condition ends a run
                        return vf.ProgramResult(exit_code=1, stdout="", stderr=response.text)
                    message = response.json()["choices"][0]["message"]
                    messages.append(message)
                    if not message.get("tool_calls"):
                        return vf.ProgramResult(exit_code=0, stdout="", stderr="")
                    for call in message["tool_calls"]:
                        messages.append({"role": "tool", "tool_call_id": call["id"], "content": await answer(call, dispatch, connected)})

    async def answer(call: dict[str, Any], dispatch: Any, connected: Any) -> Any:
        name = call["function"]["name"]
        if name not in dispatch:
            return f"error: unknown tool {name!r}"
        return await tools_of.call_mcp(connected, dispatch, name, json.loads(call["function"]["arguments"]))

    module = types.ModuleType(CHAT)
    module.ChatHarness, module.__all__ = ChatHarness, ["ChatHarness"]  # type: ignore[attr-defined]
    ChatHarness.__module__ = CHAT
    return module
