"""The OpenAI API of a real process, beside verbs of other processes on the same home."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from real_server import process

from veneer.digest import digest_adapter
from veneer.engine import LoraEngine, load_base
from veneer.render import load_renderer
from veneer.store.adapters import write_adapter
from veneer.store.registry import Registry
from veneer.types import Adapter, Checkpoint, LoraConfig

ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "sort 739562"}], "seed": 1, "max_tokens": 32}


def checkpoints(seeds: tuple[int, ...]) -> list[Checkpoint]:
    engine = LoraEngine(load_base("nano", "cpu"))
    made: list[Checkpoint] = []
    for seed in seeds:
        engine.create_adapter(f"{seed}", LoraConfig(rank=1, seed=seed))
        fresh = engine.save_state(f"{seed}", "sampler").result()
        rng = np.random.default_rng(seed)
        weights = {key: (0.1 * rng.standard_normal(array.shape)).astype(np.float32) for key, array in fresh.weights.items()}
        adapter = Adapter("it", 1, digest_adapter(weights, fresh.config), engine.base_id, engine.base_digest)
        made.append(Checkpoint("sampler", adapter, fresh.config, weights))
    return made


def veneer(home: Path, *arguments: str) -> Any:
    """A verb, in a process of its own."""
    environment = {**os.environ, "VENEER_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "veneer", *arguments, "--json"]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True).stdout)


def test_a_served_home(tmp_path: Path) -> None:
    """Serve, answer by two versions, promote and forget from a shell, load a folder: what an operator does on the first day."""
    home, loras = tmp_path / "home", tmp_path / "loras"
    registry, renderer = Registry(home), load_renderer("nano")
    facts = {"tokenizer_digest": renderer.tokenizer_digest, "template_digest": renderer.template_digest, "stage": "rl"}
    first, second, third = checkpoints((1, 2, 3))
    for made in (first, second):
        registry.put("sorter", made, facts)
    write_adapter(loras / "third", third, facts)
    with process(tmp_path, "--lora-dir", str(loras), "--alias", "my/base=nano") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
        assert [model.id for model in client.models.list()] == ["nano", "my/base", "sorter"]

        def version() -> int:
            told = client.chat.completions.create(model="sorter", **ASK)
            return told.model_extra["veneer"]["adapters"][0]["version"]  # type: ignore[index]

        assert version() == 2
        for wanted in (2, 1):
            veneer(home, "adapters", "promote", f"sorter@{wanted}")
            assert version() == wanted
        veneer(home, "adapters", "rollback", "sorter")
        assert version() == 2
        whole = client.chat.completions.create(model="sorter@1", **ASK).choices[0].message
        parts = [chunk.choices[0].delta for chunk in client.chat.completions.create(model="sorter@1", **ASK, stream=True)]
        assert "".join(part.content or "" for part in parts) == whole.content
        client.post("/load_lora_adapter", body={"lora_name": "third", "lora_path": "third"}, cast_to=str)
        told = client.chat.completions.with_raw_response.create(model="third", **ASK)
        assert told.headers["x-veneer-adapter-digest"] == third.adapter.digest
        receipt = veneer(home, "adapters", "forget", "sorter@1")
        assert receipt["forgotten"][0]["digest"] == first.adapter.digest
        with pytest.raises(openai.NotFoundError, match="was forgotten"):
            client.chat.completions.create(model="sorter@1", **ASK)
        with pytest.raises(openai.NotFoundError, match="did you mean 'sorter'"):
            client.chat.completions.create(model="sortr", **ASK)
