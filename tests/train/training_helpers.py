"""A real engine on the bundled base, a run in a folder, and environments whose rewards anything can learn."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from veneer.cli.loops import LOOPS
from veneer.engine import LocalEngine, LoraEngine, load_base
from veneer.envs import load_env
from veneer.render import load_renderer
from veneer.store.run import Run
from veneer.train import dpo, rejection, rl, sft
from veneer.train.config import RunConfig, make_config
from veneer.train.distill import Teacher
from veneer.train.session import Session
from veneer.types import Checkpoint, LoraConfig

ENV = '''
import asyncio
import itertools
from dataclasses import dataclass, field

from veneer.types import Observation, StepResult


class Episode:
    """Rewards the share of odd digits in what was said; ``fault`` happens to one episode in ``every``."""

    def __init__(self, index, fault):
        self.index, self.fault = index, fault

    async def initial_observation(self):
        if self.fault == "first_raise":
            raise OSError("no such server")
        if self.fault == "first_none":
            return None
        return Observation([{"role": "user", "content": f"say {self.index % 5}"}])

    async def _step(self, action):
        text = action.get("reasoning_content", "") + action["content"]
        reward, metrics = sum(c in "13579" for c in text) / max(len(text), 1), {"length": float(len(text))}
        if self.fault == "raise":
            raise KeyError("grader")
        if self.fault == "nan":
            reward = float("nan")
        if self.fault == "inf":
            reward = float("inf")
        if self.fault == "none":
            reward = None
        if self.fault == "no_result":
            return None
        if self.fault == "bad_metrics":
            metrics = {"length": None}
        if self.fault == "spin":
            while True:
                pass
        if self.fault == "sleep":
            await asyncio.sleep(100)
        if self.fault == "constant":
            reward = 0.25
        if self.fault == "solved":
            reward = 1.0
        return StepResult(reward, True, metrics=metrics)

    def step(self, action):
        if self.fault == "sync_raise":
            raise ValueError("not a coroutine")
        return self._step(action)


@dataclass
class Dataset:
    fault: str
    every: int
    name: str = "odd"
    made: object = field(default_factory=itertools.count)

    def env(self, split, index):
        hit = next(self.made) % self.every == self.every - 1
        if hit and self.fault == "no_env":
            raise RuntimeError("no problem today")
        return Episode(index, self.fault if hit else "")


def odd(fault="", every=4):
    return Dataset(fault, every)
'''

SMALL: dict[str, Any] = {
    "name": "small",
    "lora": {"rank": 1},
    "env": {"seconds": 0.3},
    "rl": {"steps": 2, "groups_per_batch": 2, "group_size": 4, "max_tokens": 12},
    "eval": {"problems": 4, "every": 100},
}


def config_of(tmp_path: Path, fault: str = "", every: int = 4, **sections: Any) -> RunConfig:
    """SMALL with an environment in ``tmp_path`` and some keys changed; a dict changes keys of a section."""
    path = tmp_path / "odd_env.py"
    path.write_text(ENV)
    tree: dict[str, Any] = {key: dict(value) if isinstance(value, dict) else value for key, value in SMALL.items()}
    tree["env"] |= {"name": f"{path}:odd", "args": {"fault": fault, "every": every}}
    for key, value in sections.items():
        tree[key] = tree.get(key, {}) | value if isinstance(value, dict) else value
    return make_config(tree)


def open_session(config: RunConfig, folder: Path, init: Checkpoint | None = None) -> Session:
    """A session on an engine of its own."""
    engine = LoraEngine(load_base(config.base))
    return Session(engine, load_renderer(config.base), config, Run(folder, config.to_toml()), init)


def engine_of(session: Session) -> LocalEngine:
    assert isinstance(session.engine, LocalEngine)
    return session.engine


def run_session(session: Session, teacher: Teacher | None = None) -> Any:
    """Play the loop of the session's kind to its end."""
    config = session.config
    dataset = load_env(config.env.name, config.env.args) if config.plays else None
    plain = {"sft": sft.train, "dpo": dpo.train}
    try:
        if config.kind in plain:
            return asyncio.run(plain[config.kind](session))
        if config.kind == "distill":
            return asyncio.run(LOOPS["distill"](session, dataset, teacher))
        assert dataset is not None
        return asyncio.run({"rl": rl.train, "rejection": rejection.train}[config.kind](session, dataset))
    finally:
        session.run.close()


def final_weights(session: Session) -> dict[str, bytes]:
    """Of the newest checkpoint, file by file."""
    newest = sorted((session.run.folder / "checkpoints").glob("step-*"))[-1]
    return {p.name: p.read_bytes() for p in newest.glob("*.safetensors")}


def random_adapter(session: Session, name: str, seed: int, scale: float = 0.02) -> Checkpoint:
    """An adapter on the session's engine that does something: random A and B."""
    session.engine.create_adapter(name, LoraConfig(rank=2))
    fresh = session.engine.save_state(name, "sampler").result()
    rng = np.random.default_rng(seed)
    weights = {key: rng.normal(0, scale, array.shape).astype(np.float32) for key, array in fresh.weights.items()}
    session.engine.load_state(name, dataclasses.replace(fresh, weights=weights)).result()
    return session.engine.save_state(name, "sampler").result()
