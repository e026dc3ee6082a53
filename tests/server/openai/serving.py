"""A real server in this process, on a free port, with random adapters of the bundled base."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openai
import uvicorn

from veneer.digest import digest_adapter
from veneer.engine import LocalEngine, LoraEngine, load_base
from veneer.render import Renderer
from veneer.server.app import make_app
from veneer.server.bases import Bases, Served
from veneer.server.connections import settings
from veneer.server.shelf import Shelf
from veneer.server.worker import Worker
from veneer.store.registry import Registry
from veneer.types import Adapter, Checkpoint, LoraConfig, Message, SamplingParams

SUM: list[Any] = [{"role": "user", "content": "27+94+38=?"}]
SORT: list[Any] = [{"role": "user", "content": "sort 739562"}]


@dataclass
class Serving:
    """The server, and its parts to look at."""

    url: str
    home: Path
    registry: Registry
    served: Served
    lora_dir: Path

    def client(self, **settings: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="tml-any", max_retries=0, timeout=60, **settings)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="tml-any", max_retries=0, timeout=60)

    def put(self, name: str, seed: int, size: float = 0.1, rank: int = 2, **facts: Any) -> int:
        """A version of an adapter that changes what the base says."""
        renderer = self.served.renderer
        digests = {"tokenizer_digest": renderer.tokenizer_digest, "template_digest": renderer.template_digest}
        return self.registry.put(name, random_checkpoint(self.served, seed, size, rank), {**digests, "stage": "rl", **facts})

    @property
    def idle(self) -> bool:
        """Nothing runs or waits, and no place of the cache is taken once the engine has had a turn."""
        engine: Any = self.served.engine
        if self.served.shelf.worker.waiting or engine._sampling or engine._queue:
            return False
        asyncio.run(_turn(self.served))
        return not any(bank.used for crew in engine._sampler.crews for bank in crew.banks.values())


async def _turn(served: Served) -> None:
    await served.shelf.worker.run(served.engine.step)


def random_checkpoint(served: Served, seed: int, size: float = 0.1, rank: int = 2) -> Checkpoint:
    """Both factors random, so that it is an update; B starts at zero otherwise."""
    engine = LoraEngine(served.engine.base)  # type: ignore[attr-defined]
    engine.create_adapter("random", LoraConfig(rank=rank, seed=seed))
    fresh = engine.save_state("random", "sampler").result()
    rng = np.random.default_rng(seed)
    weights = {
        key: (size * rng.standard_normal(array.shape)).astype(np.float32) if key.endswith("lora_B.weight") else array
        for key, array in fresh.weights.items()
    }
    adapter = Adapter("random", 1, digest_adapter(weights, fresh.config), engine.base_id, engine.base_digest)
    return Checkpoint("sampler", adapter, fresh.config, weights)


@contextmanager
def serving(folder: Path) -> Generator[Serving]:
    base = load_base("nano", "cpu")
    engine = LoraEngine(base)
    worker = Worker([engine])
    assert base.tokenizer is not None
    served = Served(("nano", "other/name"), engine, Renderer(base.tokenizer), Shelf(worker, engine))
    registry, lora_dir = Registry(folder / "home"), folder / "lora"
    lora_dir.mkdir()
    app = make_app(Bases([served]), worker, folder / "home" / "server", registry=registry, lora_dir=lora_dir)
    server = uvicorn.Server(settings(app))
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: server.run(sockets=[listening]), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    port = listening.getsockname()[1]
    try:
        yield Serving(f"http://127.0.0.1:{port}", folder / "home", registry, served, lora_dir)
    finally:
        server.should_exit = True
        thread.join(20)


def alone(serving: Serving, messages: list[Message], checkpoint: Checkpoint | None, params: SamplingParams, n: int = 1) -> list[Any]:
    """The same drawn by an engine that nobody else uses: samples."""
    engine: LocalEngine = LoraEngine(serving.served.engine.base)  # type: ignore[attr-defined]
    if checkpoint is not None:
        engine.load_state("it", checkpoint).result()
    prompt = serving.served.renderer.build_generation_prompt(messages)
    return engine.sample(prompt, None if checkpoint is None else "it", params, n).result()


def counts(told: Any) -> tuple[int, int, int]:
    """Usage, but for what a cache happened to hold."""
    return told.usage.prompt_tokens, told.usage.completion_tokens, told.usage.total_tokens


def until(condition: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)
