"""A real engine on the bundled base, a run in a folder, and environments whose rewards anything can learn."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from veneer.engine import LocalEngine, LoraEngine, load_base
from veneer.envs import load_env
from veneer.render import load_renderer
from veneer.store.run import Run
from veneer.train import rl, sft
from veneer.train.config import RunConfig, make_config
from veneer.train.session import Session

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


def open_session(config: RunConfig, folder: Path) -> Session:
    """A session on an engine of its own."""
    engine = LoraEngine(load_base(config.base))
    return Session(engine, load_renderer(config.base), config, Run(folder, config.to_toml()))


def engine_of(session: Session) -> LocalEngine:
    assert isinstance(session.engine, LocalEngine)
    return session.engine


def run_session(session: Session) -> rl.RlResult | sft.SftResult:
    """Play the loop of the session's kind to its end."""
    try:
        if session.config.kind == "sft":
            return asyncio.run(sft.train(session))
        return asyncio.run(rl.train(session, load_env(session.config.env.name, session.config.env.args)))
    finally:
        session.run.close()
