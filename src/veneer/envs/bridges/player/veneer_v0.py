"""Environments with ``load_environment``: the classic interface of verifiers, up to 0.3."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import AsyncGenerator
from typing import Any

from veneer_loading import Refused, split, text_of


class Classic:
    def __init__(self, settings: dict[str, Any], key: str) -> None:
        vf = importlib.import_module("verifiers")
        self.version = getattr(vf, "__version__", "unknown")
        try:
            load_environment = vf.load_environment
        except AttributeError as error:
            raise Refused(
                f"{settings['id']} has load_environment, the interface of verifiers up to 0.3, and here is verifiers {self.version}; "
                "run: pip install 'verifiers<0.4' there"
            ) from error
        if settings["config"]:
            raise Refused("env.args.config is for tasksets of verifiers v1; load_environment takes env.args.args")
        self.env = load_environment(settings["id"], **settings["args"])
        if getattr(self.env, "requires_group_rollouts", False):
            raise Refused(f"{settings['id']} scores the rollouts of a group together, which this bridge cannot: it plays them one by one")
        train, held = self._rows("dataset"), self._rows("eval_dataset")
        if train is None:
            train, held = held, None
        self.rows = {False: train, True: held}
        prompts = [None if rows is None else [text_of(prompt) for prompt in rows["prompt"]] for rows in (train, held)]
        self.places = split(prompts[0] or [], prompts[1])
        config = {"api_base_url": settings["url"], "api_key_var": key, "max_retries": 0, "connect_timeout": 60.0, "timeout": 86400.0}
        self.client = importlib.import_module("verifiers.clients").resolve_client(
            importlib.import_module("verifiers.types").ClientConfig(client_type="openai_chat_completions", **config)
        )

    def _rows(self, name: str) -> Any:
        """The environment's rows of a kind; None: it has none."""
        if getattr(self.env, name, None) is None and getattr(self.env, f"{name}_source", None) is None:
            return None
        return getattr(self.env, f"get_{name}")()

    def facts(self) -> dict[str, Any]:
        return {"api": "v0", "version": self.version, **{kind: len(found) for kind, found in self.places.items()}}

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            await self.client.close()

    async def play(self, name: str, split: str, index: int) -> tuple[Any, dict[str, Any]]:
        """Reward and metrics of one rollout; its model is called ``name``."""
        held, row = self.places[split][index]
        output = await self.env.run_rollout(dict(self.rows[held][row]), client=self.client, model=name, sampling_args={})
        error = output.get("error")
        if error is not None and "EmptyModelResponse" not in str(error):  # to say nothing is an answer, and the rubric's to judge
            chain = error.get("error_chain_repr") or error.get("error") if isinstance(error, dict) else repr(error)
            raise RuntimeError(str(chain))
        return output.get("reward"), dict(output.get("metrics") or {})
