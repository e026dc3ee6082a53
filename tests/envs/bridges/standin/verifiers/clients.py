"""A chat client of the standard library, in threads."""

from __future__ import annotations

import asyncio
import json
import os
import urllib.error
import urllib.request
from typing import Any


class Client:
    def __init__(self, config: Any) -> None:
        self.config = config

    async def post(self, body: Any) -> Any:
        return await asyncio.to_thread(self._post, body)

    def _post(self, body: Any) -> Any:
        request = urllib.request.Request(
            f"{self.config.api_base_url}/chat/completions",
            json.dumps(body).encode(),
            {"Authorization": f"Bearer {os.environ[self.config.api_key_var]}", "Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{error.code}: {error.read().decode()}") from error

    async def close(self) -> None:
        pass


def resolve_client(config: Any) -> Client:
    return Client(config)
