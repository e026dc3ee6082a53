"""Processes that do for us what may hang, eat memory or evaluate what a model wrote.

Symbolic algebra over a short answer, ``9^{99999999}``, takes as long as it is given, and on our thread all other rollouts and the engine
would wait for it. Here the kernel ends what takes too long, by its own CPU time, so that a busy machine changes no reward, and whether
it computes in Python or in C. That is no sandbox: the process has the user's rights.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from veneer.turns import submit
from veneer.types import RunError

SOURCES = Path(__file__).parents[2]
PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TMPDIR")
"""Of our environment; keys stay here."""
WALL = 12.0
"""A process that has not answered after this many times its CPU seconds is ended too: it sleeps, or the machine is far too busy."""


class Ended(RunError):
    """The process was ended, or died, over this request."""


class Broken(RunError):
    """The module itself cannot be used."""


class Refused(RunError):
    """The request raised an error, in words."""


class Apart:
    """Calls ``answer(**request)`` of a module in processes of its own. They start when they are needed and end with this one."""

    def __init__(self, module: str, memory: int = 4 * 2**30, processes: int = 2) -> None:
        """``memory``: bytes of address space of one process."""
        self.module, self.memory = module, memory
        self._alive = set[_Process]()
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._one_scratch = threading.Lock()
        self._free: queue.LifoQueue[_Process | None] = queue.LifoQueue()
        for _ in range(processes):
            self._free.put(None)
        self._threads = ThreadPoolExecutor(processes, f"veneer-{module}")

    async def ask(self, cpu_seconds: int, **request: Any) -> Any:
        """Raises:
        Ended, Refused: as ``ask_now``.
        """
        return await asyncio.wrap_future(submit(self._threads, partial(self.ask_now, cpu_seconds, **request)))

    def ask_now(self, cpu_seconds: int, **request: Any) -> Any:
        """What the module answers, as JSON makes of it. ``cpu_seconds``: what the answer may cost.

        Raises:
            Ended: it took too long or too much, and its process is gone.
            Refused: it raised an error.
            Broken: there is no such module here.
        """
        process = self._free.get()
        try:
            if process is None:
                process = _Process(self.module, self.memory, self._folder())
                self._alive.add(process)
            answer = process.ask(cpu_seconds, request)
            if "broken" in answer:
                raise Broken(f"{self.module} cannot be imported: {answer['broken']}")
        except BaseException:
            if process is not None:
                self._alive.discard(process)
                process.end()
            process = None
            raise
        finally:
            self._free.put(process)
        if "error" in answer:
            raise Refused(answer["error"])
        return answer["value"]

    def _folder(self) -> str:
        """Where the processes are, because some tasks write files where they are."""
        with self._one_scratch:  # of two that are made at once one is dropped, and its folder with it, under a process that starts there
            self._scratch = self._scratch or tempfile.TemporaryDirectory(prefix="veneer-apart-", ignore_cleanup_errors=True)
            return self._scratch.name

    def close(self) -> None:
        """End all processes; what they are asked right now is not answered. Another question starts new ones."""
        for process in list(self._alive):
            process.kill()
        with suppress(queue.Empty):
            for _ in range(self._free.qsize()):
                process = self._free.get_nowait()
                if process is not None:
                    self._alive.discard(process)
                    process.end()
                self._free.put(None)
        with self._one_scratch:
            scratch, self._scratch = self._scratch, None
        if scratch is not None:
            scratch.cleanup()


class _Process:
    def __init__(self, module: str, memory: int, folder: str) -> None:
        paths = [str(SOURCES), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        environment = {
            **{name: os.environ[name] for name in PASSED_ON if name in os.environ},
            "PYTHONPATH": os.pathsep.join(map(os.path.abspath, paths)),
            "PYTHONHASHSEED": "0",  # the order of a set must not differ from process to process
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        command = [sys.executable, "-P", "-m", "veneer.envs.apart_program", module, str(memory)]
        self.process = subprocess.Popen(
            command,
            env=environment,
            cwd=folder,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is ours, not theirs
        )
        self.selector = selectors.DefaultSelector()
        assert self.process.stdout is not None
        self.selector.register(self.process.stdout, selectors.EVENT_READ)

    def ask(self, cpu_seconds: int, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):  # then it has said why, or left
            self.process.stdin.write(json.dumps([cpu_seconds, request]) + "\n")
            self.process.stdin.flush()
        if not self.selector.select(WALL * cpu_seconds):
            raise Ended(f"no answer within {WALL * cpu_seconds:g} s")
        line = self.process.stdout.readline()
        if not line.endswith("\n"):
            raise Ended(f"the process {self._death(cpu_seconds)}")
        return json.loads(line)

    def _death(self, cpu_seconds: int) -> str:
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:
            return "closed its output"
        if code == -signal.SIGXCPU:
            return f"took more than {cpu_seconds} s of CPU time"
        return f"died of {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"

    def kill(self) -> None:
        self.process.kill()

    def end(self) -> None:
        self.kill()
        self.process.wait()
        self.selector.close()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # it still holds what the dead process did not read
                    pipe.close()
