"""Processes beside this one that make a lab's runs.

Steps of a small model on few rows wait for the interpreter longer than for the arithmetic, and one process has one interpreter at work: two
of a thread each make more runs than one of two threads. A run comes to the same wherever it is made.

A line of JSON asks for a run, {"run": name, "config": TOML}; a line says that it has ended, {"run": name}, with "error": [class, words] if
it failed. {"stop": true} asks for all runs at hand to be saved. The pipe's end is that of whoever asked: nobody waits for them any more.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any, TextIO

from veneer.train.config import RunConfig, make_config
from veneer.types import RunError, VeneerError

if TYPE_CHECKING:
    from veneer.studies.lab import Lab

LOG = logging.getLogger("veneer.studies")
LOOK = 0.1
"""Seconds between looks at whether to stop."""
GRACE = 5.0
"""Seconds in which a process for which nobody waits ends by itself."""
MAX_LINE = 2**20
"""Bytes of what asks for a run."""


class Hands:
    """Up to ``count`` processes of ``command``, each of which calls ``serve``. They start when they are needed, and end with this one."""

    def __init__(self, command: Sequence[str], count: int) -> None:
        self._command, self._count = command, count
        self._alive: list[_Hand] = []

    async def make(self, name: str, config: RunConfig, stop: threading.Event) -> None:
        """Have a run made, by the process that has the fewest at hand.

        Raises:
            Interrupted: ``stop`` was set; the run is saved.
            RunError: the process ended.
            VeneerError: as the run has it.
        """
        hand = self._freest()
        ended = asyncio.wrap_future(hand.ask(name, config))
        asyncio.get_running_loop().call_soon(hand.send)  # with those that are asked for now, which so begin together
        while not (await asyncio.wait([ended], timeout=LOOK))[0]:
            if stop.is_set():
                hand.stop()
        await ended

    def close(self) -> None:
        """End them, whatever they do."""
        for hand in self._alive:
            hand.hang_up()
        for hand in self._alive:
            hand.end()
        self._alive.clear()

    def __enter__(self) -> Hands:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _freest(self) -> _Hand:
        self._alive = [hand for hand in self._alive if hand.serves]
        least = min(self._alive, key=lambda hand: hand.busy, default=None)
        if least is None or (least.busy and len(self._alive) < self._count):
            least = _Hand(self._command)
            self._alive.append(least)
        return least


class _Hand:
    """One process, and a thread that listens to it."""

    def __init__(self, command: Sequence[str]) -> None:
        self._asked: dict[str, Future[None]] = {}
        self._lock = threading.Lock()
        self._stopped = self._ended = False
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},  # whatever is imported, it is what is imported here
            start_new_session=True,  # Ctrl-C is ours to answer
        )
        assert self._process.stdin is not None
        self._asking = self._process.stdin
        threading.Thread(target=self._listen, name="veneer-hand", daemon=True).start()

    @property
    def busy(self) -> int:
        return len(self._asked)

    @property
    def serves(self) -> bool:
        """Whether it can be asked for anything more."""
        return not self._stopped and not self._ended

    def ask(self, name: str, config: RunConfig) -> Future[None]:
        found = Future[None]()
        found.set_running_or_notify_cancel()  # nobody but the listener ends it
        with self._lock:
            if self._ended:
                found.set_exception(self._reason())
                return found
            self._asked[name] = found
        self._tell({"run": name, "config": config.to_toml()})
        return found

    def send(self) -> None:
        """What was asked for."""
        with suppress(OSError, ValueError):  # its end is heard; or it has been hung up
            self._asking.flush()

    def stop(self) -> None:
        if not self._stopped:
            self._stopped = True
            self._tell({"stop": True})
            self.send()

    def hang_up(self) -> None:
        with suppress(OSError):
            self._asking.close()

    def end(self) -> None:
        try:
            self._process.wait(2 * GRACE)
        except subprocess.TimeoutExpired:  # it loads a base, or is in an environment's own code
            self._process.kill()
            self._process.wait()

    def _tell(self, message: Mapping[str, Any]) -> None:
        with suppress(OSError, ValueError):
            self._asking.write(json.dumps(message) + "\n")

    def _listen(self) -> None:
        try:
            self._hear()
        except Exception:  # no answer of ours: nothing more that it says can be trusted
            LOG.exception("a process that makes runs cannot be understood")
            self._process.kill()
        self._process.wait()
        with self._lock:
            self._ended = True
            left = list(self._asked.values())
            self._asked.clear()
        for found in left:
            found.set_exception(self._reason())

    def _hear(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as answers:
            for line in answers:
                told = json.loads(line)
                with self._lock:
                    found = self._asked.pop(told["run"])
                if "error" in told:
                    found.set_exception(_raised(*told["error"]))
                else:
                    found.set_result(None)

    def _reason(self) -> VeneerError:
        code = self._process.returncode
        how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
        return RunError(
            f"a process that makes runs {how}, as it may where memory is short (--processes 1 needs the least); what was done is kept, "
            "and the same command goes on from there"
        )


async def serve(lab: Lab, asked: IO[Any], answers: TextIO) -> None:
    """Make the runs that are asked for, until it is said that they are to stop. If nobody is there any more they are broken off: what was
    saved is there to be gone on with, and a run's folder is free for whoever comes next."""
    lines, stopped, runs = asyncio.StreamReader(limit=MAX_LINE), asyncio.Event(), set[asyncio.Task[None]]()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), asked)

    async def listen() -> None:
        while line := await lines.readline():
            told = json.loads(line)
            if "stop" in told:
                lab.stop.set()
                stopped.set()
            else:
                runs.add(asyncio.create_task(one(told["run"], make_config(tomllib.loads(told["config"])))))

    async def one(name: str, config: RunConfig) -> None:
        told: dict[str, Any] = {"run": name}
        try:
            if lab.folder_of(config).name != name:
                raise RunError("Veneer's files were changed since this command began, and runs would be another version's; start it again")
            await lab.make(config)
        except Exception as error:
            if not isinstance(error, VeneerError | MemoryError):
                LOG.exception("a run failed")  # a fault of ours, or of an environment: where it was is to be seen
            told["error"] = type(error).__name__, str(error)
        print(json.dumps(told), file=answers, flush=True)

    listening, stopping = asyncio.create_task(listen()), asyncio.create_task(stopped.wait())
    await asyncio.wait([listening, stopping], return_when=asyncio.FIRST_COMPLETED)
    if not listening.done():
        await asyncio.wait([listening, asyncio.gather(*runs, return_exceptions=True)], return_when=asyncio.FIRST_COMPLETED)
    if listening.done():
        last = threading.Timer(GRACE, os._exit, [1])
        last.daemon = True
        last.start()
        for run in runs:
            run.cancel()
        await asyncio.gather(*runs, return_exceptions=True)
        listening.result()
    listening.cancel()
    stopping.cancel()


def _raised(name: str, words: str) -> Exception:
    """An error as it was in the other process."""
    known: dict[str, type[Exception]] = {kind.__name__: kind for kind in (*_kinds(VeneerError), MemoryError)}
    return known[name](words) if name in known else RuntimeError(f"{name}: {words}")


def _kinds(kind: type[VeneerError]) -> Iterator[type[VeneerError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _kinds(below)
