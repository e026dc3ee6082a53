"""Questions to an OpenAI endpoint: retried, limited in time and number, and kept once they are answered."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from veneer.envs.optional import need
from veneer.store.files import storage_errors, veneer_home, write_text
from veneer.turns import holding
from veneer.types import ConfigError, RunError, in_one_line

if TYPE_CHECKING:
    from openai import AsyncOpenAI

NO_KEY = "none"
"""What an endpoint without keys is shown: the client sends something in any case, and it shall not be the key of another service."""


@dataclass
class _Live:
    """What belongs to one event loop."""

    loop: asyncio.AbstractEventLoop
    client: AsyncOpenAI
    turns: asyncio.Semaphore
    asking: dict[str, asyncio.Lock] = field(default_factory=dict[str, asyncio.Lock])


class Endpoint:
    def __init__(
        self, base_url: str, model: str, key_variable: str, seconds: float, retries: int, concurrency: int, cache: str, where: str
    ) -> None:
        """``where``: of the configuration.

        Raises:
            ConfigError: the address is none or holds a secret, or the key's variable is not set.
        """
        need("openai")
        import openai  # noqa: F401  # seconds, which must not be a rollout's own; and an alarm in the middle would leave half of it

        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{where}.base_url: write an address such as http://127.0.0.1:8321/v1")
        if parts.username or parts.password or parts.query:
            raise ConfigError(f"{where}.base_url: no password or key belongs in an address; name a variable in api_key_env")
        self._key = os.environ.get(key_variable, "").strip() if key_variable else NO_KEY
        if not self._key:
            raise ConfigError(f"{where}.api_key_env: the environment variable {key_variable} is not set")
        self.base_url, self.model, self.seconds, self.retries, self.concurrency = base_url, model, seconds, retries, concurrency
        self.cache = None if cache == "none" else Path(cache) if cache else veneer_home() / "cache" / "judge"
        self._live: _Live | None = None

    async def ask(self, question: str, temperature: float, max_tokens: int) -> str:
        """What the model says to one question of a user.

        Raises:
            TimeoutError: nothing came within the time.
            RunError: the endpoint refused, in one line without the key.
        """
        request = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": temperature,
            "max_tokens": max_tokens,
        }
        live = self._living()
        if self.cache is None:
            async with holding(live.turns):
                return await self._say(live.client, request)
        digest = hashlib.sha256(json.dumps({"base_url": self.base_url, **request}, sort_keys=True).encode()).hexdigest()
        path = self.cache / digest[:2] / f"{digest}.json"
        async with _one_at_a_time(live.asking, digest):  # a group often says the same
            said = _kept(path)
            if said is None:
                async with holding(live.turns):
                    said = await self._say(live.client, request)
                _keep(path, said)
            return said

    async def _say(self, client: AsyncOpenAI, request: dict[str, Any]) -> str:
        import openai

        try:
            async with asyncio.timeout(self.seconds):
                answer = await client.chat.completions.create(**request)
                return answer.choices[0].message.content or ""
        except openai.APITimeoutError as error:
            raise TimeoutError from error
        except (openai.OpenAIError, ValueError, AttributeError, IndexError, TypeError, KeyError) as error:  # or no answer of that form
            raise RunError(in_one_line(error).replace(self._key, "[key]") if self._key != NO_KEY else in_one_line(error)) from None

    def _living(self) -> _Live:
        """The client of the loop that runs; connections of an earlier one are gone with it."""
        import openai

        loop = asyncio.get_running_loop()
        if self._live is None or self._live.loop is not loop:
            client = openai.AsyncOpenAI(
                api_key=self._key,
                base_url=self.base_url,
                timeout=openai.Timeout(self.seconds, connect=min(5.0, self.seconds)),
                max_retries=self.retries,
            )
            self._live = _Live(loop, client, asyncio.Semaphore(self.concurrency))
        return self._live

    async def close(self) -> None:
        live, self._live = self._live, None
        if live is not None and live.loop is asyncio.get_running_loop():
            await live.client.close()


def _kept(path: Path) -> str | None:
    """What was answered before, by this process or another. A file that cannot be read is as good as none."""
    try:
        return str(json.loads(path.read_text())["said"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(path: Path, said: str) -> None:
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"said": said}))


@asynccontextmanager
async def _one_at_a_time(locks: dict[str, asyncio.Lock], name: str) -> AsyncGenerator[None, None]:
    """Those that want the same wait for the first."""
    lock = locks.setdefault(name, asyncio.Lock())
    try:
        async with holding(lock):
            yield
    finally:
        if not lock.locked():
            locks.pop(name, None)
