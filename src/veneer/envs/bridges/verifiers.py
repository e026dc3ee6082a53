"""``verifiers:ID``: an environment of https://github.com/PrimeIntellect-ai/verifiers, played as it is.

It runs in a process of its own, which may have an interpreter of its own, and believes that its model is an OpenAI endpoint: ours.
What it asks its model becomes an observation, what the policy samples becomes the completion.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from veneer.envs.bridges.chat import Json
from veneer.envs.bridges.errors import BridgeError
from veneer.envs.bridges.process import Process
from veneer.envs.bridges.talk import Asked, Talk
from veneer.types import ConfigError, Message, Observation, Split, StepResult

if TYPE_CHECKING:
    from veneer.envs.bridges.endpoint import Endpoint

PATIENCE = 20.0
"""Seconds after which a process that has not taken note of a rollout's end is held to hang."""


def verifiers(
    identity: str,
    args: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    python: str = sys.executable,
    folder: str | None = None,
    limit: int = 1000,
    seed: int = 0,
    start_seconds: float = 180.0,
) -> VerifiersDataset:
    """An environment by its id in ``verifiers``.

    ``args`` are those of ``load_environment``, or the taskset's own. ``config`` is the rest of the ``[env]`` block of verifiers v1:
    agents, harness, limits. ``python`` is an interpreter that has the package and the environment; ``folder`` is where the
    environment's module lies if it is not installed. Of endless tasksets the first ``limit`` tasks are taken. ``seed`` orders the
    training problems. ``start_seconds``: how long loading may take.

    Raises:
        ConfigError: it cannot be loaded.
    """
    from veneer.envs.bridges.endpoint import Endpoint  # brings a server

    settings = {"id": identity, "args": dict(args or {}), "config": dict(config or {}), "folder": folder, "limit": limit}
    endpoint = Endpoint()
    dataset = VerifiersDataset(identity, endpoint, python, settings, seed)
    try:
        dataset.start(start_seconds)
    except OSError as error:
        endpoint.leave()
        raise ConfigError(f"env.args.python: {python} cannot be run ({error.strerror})") from error
    except BridgeError as error:
        endpoint.leave()
        raise ConfigError(f"env.name: verifiers:{identity}: {error}") from error
    return dataset


class VerifiersDataset:
    """Problems of one environment, and the process that plays them. Lost, it is started anew for the next rollout."""

    def __init__(self, identity: str, endpoint: Endpoint, python: str, settings: Mapping[str, Any], seed: int) -> None:
        self.name = f"verifiers:{identity}"
        self._endpoint = endpoint
        self._python, self._seed = python, seed
        self._settings = {**settings, "url": self._endpoint.url, "key": self._endpoint.key}
        self._numbers = itertools.count()
        self._playing: dict[str, tuple[Process, Talk]] = {}
        """Rollouts whose end the process has not told."""
        self._process: Process | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.facts: Json = {}
        """Interface and version, and how many problems there are of each split."""

    def start(self, seconds: float) -> None:
        """Start the process and wait until the environment is loaded.

        Raises:
            BridgeError: it cannot be loaded, or not within ``seconds``.
            OSError: there is no such interpreter.
        """
        self._process = process = Process(self._python, self._settings, self._heard)
        try:
            self.facts = process.ready.result(seconds)
        except FutureTimeout:
            process.kill()
            raise BridgeError(f"loading took longer than env.args.start_seconds = {seconds:g}") from None
        except BridgeError:
            process.close()
            raise

    def env(self, split: Split, index: int) -> VerifiersEnv:
        return VerifiersEnv(self, split, place(self.facts[split], split, index, self._seed))

    async def begin(self, split: Split, index: int) -> Talk:
        """Have a rollout played.

        Raises:
            BridgeError: the process had ended, and cannot be started anew.
        """
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._move(loop)
        while True:
            if self._process is None:
                self._process = Process(self._python, self._settings, self._heard)
            process = self._process
            facts = await asyncio.shield(asyncio.wrap_future(process.ready))
            if self._process is process:  # it has not ended meanwhile; if it ends from now on, the rollout hears of it
                break
        if facts != self.facts:
            raise BridgeError("the environment's process was started anew, and has other problems than before")
        talk = Talk(f"rollout-{next(self._numbers)}")
        self._playing[talk.name] = process, talk
        self._endpoint.talks[talk.name] = talk
        process.tell(play=talk.name, split=split, index=index)
        return talk

    def _move(self, loop: asyncio.AbstractEventLoop) -> None:
        """To another loop. What was played in the one before is over."""
        for name, (process, _) in self._playing.items():
            process.tell(drop=name)
        self._playing.clear()
        self._endpoint.talks.clear()
        self._loop = loop
        self._endpoint.serve()

    def end(self, talk: Talk) -> None:
        """The rollout is over for us. If the process still plays it, it is to stop, and if it does not say so, it hangs."""
        talk.fail("it was given up")
        self._endpoint.talks.pop(talk.name, None)
        if talk.name in self._playing:
            process, _ = self._playing[talk.name]
            process.tell(drop=talk.name)
            asyncio.get_running_loop().call_later(PATIENCE, self._expect_end, talk.name)

    def _expect_end(self, name: str) -> None:
        if name in self._playing:
            process, _ = self._playing[name]
            process.hung = True
            process.kill()

    def _heard(self, process: Process, message: Json | None) -> None:
        """On a thread of the process's."""
        if message is None and self._process is process:
            self._process = None
        with contextlib.suppress(RuntimeError):  # the loop has closed, and with it all rollouts
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._take, process, message)

    def _take(self, process: Process, message: Json | None) -> None:
        if message is None:
            for name in [name for name, (whose, _) in self._playing.items() if whose is process]:
                self._playing.pop(name)[1].fail(process.epitaph())
        elif entry := self._playing.pop(str(message.get("rollout")), None):
            _, talk = entry
            if "error" in message:
                talk.fail(f"the environment failed: {message['error']}")
            elif "reward" in message:
                talk.end(message["reward"], message["metrics"])
            else:
                talk.fail("the environment's process dropped it")

    async def close(self) -> None:
        """End the process and the endpoint."""
        process, self._process = self._process, None
        if process is not None:
            await asyncio.to_thread(process.close)
        await self._endpoint.close()


class VerifiersEnv:
    """One rollout. What it earned is told at its end, as the environment's rubric has it."""

    def __init__(self, dataset: VerifiersDataset, split: Split, index: int) -> None:
        self._dataset, self._index = dataset, index
        self._split: Split = split
        self._talk: Talk | None = None

    async def initial_observation(self) -> Observation:
        self._talk = await self._dataset.begin(self._split, self._index)
        first = await self._talk.next()
        if not isinstance(first, Asked):
            raise BridgeError("the environment ended its rollout without a question to the model")
        return Observation(first.messages, first.tools)

    async def step(self, action: Message) -> StepResult:
        assert self._talk is not None
        self._talk.reply(action)
        turn = await self._talk.next()
        if isinstance(turn, Asked):
            return StepResult(0.0, episode_done=False, next_messages=turn.messages)
        return StepResult(turn.reward, episode_done=True, metrics=dict(turn.metrics))

    async def close(self) -> None:
        if self._talk is not None:
            self._dataset.end(self._talk)


def place(problems: int, split: Split, index: int, seed: int) -> int:
    """Which of a split's problems the index-th is. Held-out ones come in their own order; training goes through all of them, in
    another order each time."""
    if split == "eval":
        return index % problems
    return _order(problems, seed, index // problems)[index % problems]


@lru_cache(8)
def _order(problems: int, seed: int, turn: int) -> Sequence[int]:
    order = list(range(problems))
    random.Random(f"{seed}/{turn}").shuffle(order)
    return order
