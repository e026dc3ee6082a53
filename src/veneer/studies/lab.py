"""Where a study's runs are made: side by side on one engine, each in a folder named by its content, so that no run is made twice."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import shutil
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from veneer.assets import NANO
from veneer.envs import load_env
from veneer.render import Renderer
from veneer.store.adapters import read_adapter, write_adapter
from veneer.store.files import storage_errors, write_text
from veneer.store.run import Run
from veneer.studies.bench import Bench, Merge, RandomBase
from veneer.train import rejection, rl, sft
from veneer.train.config import RunConfig
from veneer.train.rollouts import closing
from veneer.train.session import Interrupted, Session
from veneer.types import AdapterError, Checkpoint, ConfigError, DivergedError, Engine

OUTCOME, ADAPTER, RECORD = "outcome.json", "adapter", "record.json"
COUNTED = "(counted)"
"""An adapter that is made to be counted; no run can have this name."""
PLAYED = {"rl": rl.train, "rejection": rejection.train}
"""By kind of run: loops that play episodes, and are judged by their rewards."""
PACKAGE = Path(__file__).parents[1]
ORIGIN = ("assets", "engine", "envs", "render", "train")
"""The parts of Veneer that decide what a run comes to."""


@dataclass(frozen=True)
class Place:
    """A base in memory with what reads and writes its tokens."""

    engine: Engine
    renderer: Renderer
    _rows: dict[tuple[str, float, str], sft.Rows] = field(default_factory=dict)

    def rows(self, config: RunConfig) -> sft.Rows:
        """What a run of demonstrations reads: rendered once for all that read the same.

        Raises:
            DataError: the file is missing or a line is wrong.
        """
        key = config.sft.data, config.sft.held_out, config.sft.train_on
        if key not in self._rows:
            self._rows[key] = sft.rows_of(config, self.renderer, self.engine.context_length)
        return self._rows[key]


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    config: RunConfig
    folder: Path
    metrics: Sequence[Mapping[str, Any]]
    """Its metrics.jsonl."""
    diverged: str | None
    """Why it could not go on: its numbers left every range. It is kept like any other."""
    seconds: float
    """That its steps took, with others beside it."""

    @property
    def score(self) -> float:
        """More is better. Of episodes, the mean reward on held-out problems in the end, 0 if the run diverged; of demonstrations, minus
        the loss in nats a token, that of the start if it diverged."""
        if self.config.kind in PLAYED:
            return 0.0 if self.diverged else float([m["eval/reward"] for m in self.metrics if "eval/reward" in m][-1])
        return -self._losses[0 if self.diverged else -1]

    @property
    def score_before(self) -> float:
        return float(self.metrics[0]["eval/reward"]) if self.config.kind in PLAYED else -self._losses[0]

    @property
    def _losses(self) -> list[float]:
        """Of the held-out rows, or of each step's batch where none are."""
        for name in ("eval/mean_nll", "train_mean_nll"):
            if found := [float(m[name]) for m in self.metrics if name in m]:
                return found
        return [math.nan]  # it diverged in its first step

    def __str__(self) -> str:
        config = self.config
        rate = getattr(config, config.kind).learning_rate
        arm = "full" if config.weights == "full" else f"rank {config.lora.rank}"
        end = "diverged" if self.diverged else f"{self.score_before:.3f} -> {self.score:.3f}"
        return f"{arm}, learning rate {rate:.3g}, seed {config.seed}: {end}, {self.seconds:.0f} s"


class Elsewhere(Protocol):
    """What makes runs outside this process, as ``hands.Hands`` does."""

    async def make(self, name: str, config: RunConfig, stop: threading.Event) -> None:
        """Raises:
        Interrupted, VeneerError: as ``Lab.run``.
        """
        ...


@dataclass
class Lab:
    """Makes runs. ``folder``: where they are kept. ``open_place``: loads what runs of a base and kind of weights share."""

    folder: Path
    open_place: Callable[[RunConfig], Place]
    device: str = "cpu"
    """Of all runs, as "cpu" or "cuda"."""
    side_by_side: int = 8
    """Runs at a time: as many adapters on one engine, or on those of all processes."""
    told: Callable[[Outcome, int, int], None] = lambda outcome, done, of: None
    """Of every run that ends: how many of those asked for are there."""
    stop: threading.Event = field(default_factory=threading.Event)
    """When set, runs save their state and stop."""
    hands: Elsewhere | None = None
    """What makes runs outside this process; None: they are made in it."""
    bench: Bench | None = None
    """What engines are counted and timed with; None: this lab only makes runs."""
    merge: Merge | None = None
    """What writes adapters into a base's weights."""
    random_base: RandomBase | None = None
    """What makes bases of other widths."""
    diverged: dict[Path, Outcome] = field(default_factory=dict)
    """Runs that did, of all that were asked for, by folder; whoever wants to know of one study empties it before."""
    _places: dict[tuple[str, str], Place] = field(default_factory=dict)

    async def run(self, configs: Sequence[RunConfig], *, here: bool = False) -> list[Outcome]:
        """What each comes to. Runs of an earlier call, of another study or of a process that was killed are taken over or gone on with.
        ``here``: on the engine of this process.

        Raises:
            Interrupted: ``stop`` was set; what was done is kept.
            VeneerError: as a run has it, but for a divergence; the others are saved first.
        """
        configs = [config.model_copy(update={"device": self.device}) for config in configs]
        wanted = {self.folder_of(config): config for config in configs}
        found: dict[Path, Outcome] = {}
        for place in dict.fromkeys(_place_of(config) for config in wanted.values()):
            those = {folder: config for folder, config in wanted.items() if _place_of(config) == place}
            free = asyncio.Semaphore(self.side_by_side)

            async def one(folder: Path, config: RunConfig, free: asyncio.Semaphore = free) -> None:
                async with free:
                    found[folder] = await self._one(folder, config, here)
                    if found[folder].diverged:
                        self.diverged[folder] = found[folder]
                    self.told(found[folder], len(found), len(wanted))

            await self.together([one(folder, config) for folder, config in those.items()])
        return [found[self.folder_of(config)] for config in configs]

    def trainable(self, config: RunConfig) -> int:
        """How many parameters a run trains.

        Raises:
            VeneerError: there is no such base, or no adapter of this kind on it.
        """
        engine = self.place(config.model_copy(update={"device": self.device})).engine
        count = engine.create_adapter(COUNTED, config.lora_config())
        engine.remove_adapter(COUNTED)
        return count

    async def together(self, runs: Sequence[Awaitable[None]]) -> None:
        """Wait for all, whatever becomes of one: they save their state before anything is raised.

        Raises:
            Interrupted, VeneerError: the first that one of them raised, and rather what it was that stopped the others.
        """

        async def stopping(run: Awaitable[None]) -> None:
            try:
                await run
            except BaseException:
                self.stop.set()
                raise

        ends = await asyncio.gather(*map(stopping, runs), return_exceptions=True)
        errors = [end for end in ends if end is not None]
        if errors:
            raise next((error for error in errors if not isinstance(error, Interrupted)), errors[0])

    async def make(self, config: RunConfig) -> None:
        """Make one run on the engine of this process, or go on with it.

        Raises:
            Interrupted, VeneerError: as ``run``.
        """
        self.go_on()
        await self._make(self.folder_of(config), config, self.place(config))

    async def _one(self, folder: Path, config: RunConfig, here: bool) -> Outcome:
        done = folder / OUTCOME
        if not done.is_file():
            self.go_on()
            if self.hands is None or here:
                await self.make(config)
            else:
                await self.hands.make(folder.name, config, self.stop)
        for name in ("checkpoints", "rollouts"):  # nobody goes on from here; a hundred runs would keep gigabytes
            shutil.rmtree(folder / name, ignore_errors=True)
        told = json.loads(done.read_text())
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return Outcome(config, folder, metrics, told["diverged"], told["seconds"])

    def go_on(self) -> None:
        """Raises:
        Interrupted: ``stop`` was set.
        """
        if self.stop.is_set():
            raise Interrupted("interrupted; what was done is kept, the same command goes on from here")

    def place(self, config: RunConfig, *, fresh: bool = False) -> Place:
        """Where runs of this configuration are made, opened if it is not the one that is. ``fresh``: opened in any case, so that no adapter
        has been there."""
        if fresh or _place_of(config) not in self._places:
            self._places.clear()  # one base in memory at a time
            self._places[_place_of(config)] = self.open_place(config)
        return self._places[_place_of(config)]

    async def measured(self, what: str, config: RunConfig, measure: Callable[[RunConfig], Awaitable[Any]]) -> Any:
        """What ``measure`` finds on the configuration, as JSON: measured once, and kept beside the runs under the digest of ``what``, the
        configuration and Veneer's own files. ``what``: a name for all that decides it beside them.

        Raises:
            Interrupted: ``stop`` was set.
            VeneerError: as ``measure`` has it.
        """
        config = config.model_copy(update={"device": self.device})
        path = self.folder_of(config, what) / RECORD
        if not path.is_file():
            self.go_on()
            text = json.dumps({"what": what, "found": await measure(config)}) + "\n"
            with storage_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_text(path, text)
        return json.loads(path.read_text())["found"]

    async def _make(self, folder: Path, config: RunConfig, place: Place) -> None:
        config = config.model_copy(update={"name": folder.name, "folder": str(folder)})
        diverged = None
        init = _first(config)
        run = Run(folder, config.to_toml())
        if (folder / OUTCOME).is_file():  # made by somebody else while this one waited for a process or a base
            run.close()
            return
        session = Session(place.engine, place.renderer, config, run, init, stop=self.stop)
        await asyncio.sleep(0)  # sessions use the engine as they begin, and what begins together is to stay in step: passes are merged
        try:
            try:
                await _train(session, place)
            except DivergedError as error:
                diverged = str(error)
            weights = await place.engine.save_state(session.adapter, "sampler")
            write_adapter(folder / ADAPTER, weights, session.facts())
            seconds = round(sum(sum(timing.values()) - timing["step"] for timing in run.timings()), 1)
            run.write(OUTCOME, json.dumps({"diverged": diverged, "seconds": seconds}) + "\n")
        finally:
            with suppress(AdapterError):  # it failed before it was made
                place.engine.remove_adapter(session.adapter)
            run.close()

    def folder_of(self, config: RunConfig, what: str = "") -> Path:
        """Named by all that decides what a run or a measurement comes to: its settings, what it reads, wherever that lies, and Veneer's own
        files.

        Raises:
            AdapterError: the adapter that it begins from cannot be read.
        """
        unnamed = config.model_copy(update={"name": "run", "folder": ""})
        if config.kind == "sft" and Path(config.sft.data).is_file():
            rows = hashlib.sha256(Path(config.sft.data).read_bytes()).hexdigest()
            unnamed = unnamed.model_copy(update={"sft": config.sft.model_copy(update={"data": rows})})
        if config.init:
            unnamed = unnamed.model_copy(update={"init": _digest(config.init)})
        if config.base != NANO and Path(config.base).is_dir():
            unnamed = unnamed.model_copy(update={"base": _weights_digest(config.base)})
        return self.folder / hashlib.sha256(f"{what}{origin()}\n{unnamed.to_toml()}".encode()).hexdigest()[:16]


@cache
def origin() -> str:
    """The digest of the files of Veneer that decide what a run comes to."""
    found = hashlib.sha256()
    for part in ORIGIN:
        for path in sorted((PACKAGE / part).rglob("*")):
            if path.is_file() and path.suffix in (".py", ".json", ".jinja", ".safetensors"):
                found.update(f"{path.relative_to(PACKAGE)}\n{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return found.hexdigest()


def _first(config: RunConfig) -> Checkpoint | None:
    """What a run begins from; None: the base.

    Raises:
        AdapterError: it cannot be read.
        ConfigError: it has another shape than the run is to have.
    """
    if not config.init:
        return None
    checkpoint, wanted = read_adapter(Path(config.init))[0], config.lora_config()
    found = checkpoint.config and wanted and replace(checkpoint.config, seed=wanted.seed)
    if found != wanted:
        raise ConfigError(f"init: the adapter in {config.init} has the shape {found}, and the run is to have {wanted}")
    return checkpoint


@cache
def _digest(folder: str) -> str:
    """Of an adapter of this lab, which never changes.

    Raises:
        AdapterError: it cannot be read.
    """
    return read_adapter(Path(folder))[0].adapter.digest


@cache
def _weights_digest(folder: str) -> str:
    """Of a base's weights and configuration."""
    found = hashlib.sha256()
    for path in sorted([*Path(folder).glob("*.safetensors"), *Path(folder).glob("*.json")]):
        with path.open("rb") as file:
            found.update(f"{path.name}\n{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return found.hexdigest()


def _place_of(config: RunConfig) -> tuple[str, str]:
    return config.base, config.weights


async def _train(session: Session, place: Place) -> None:
    config = session.config
    if config.kind in PLAYED:
        async with closing(load_env(config.env.name, config.env.args)) as dataset:
            await PLAYED[config.kind](session, dataset)
    elif config.kind == "sft":
        await sft.train(session, place.rows(config))
    else:
        raise ConfigError(f"kind = {config.kind!r}: a study's runs are rl, rejection or sft")
