"""The sandbox: Python programs that nobody has to trust."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from veneer.envs.tools.sandbox import bare, bubblewrap, seccomp
from veneer.envs.tools.sandbox.process import Ended, LimitName, Limits, Start, play
from veneer.turns import submit
from veneer.types import ConfigError, RunError

AT_ONCE = 4 * (os.cpu_count() or 1)
"""Programs that run side by side; more wait, and their time does not begin. Few: what runs beside many others runs into its wall time for
their sake, and a right answer is graded wrong."""
HINT = "install bubblewrap (apt-get install bubblewrap), or set unsafe_no_sandbox = true in env.args to run them with your own rights"


class SandboxError(RunError):
    """The sandbox itself failed, not the program in it."""


@dataclass(frozen=True)
class Outcome:
    """What came of a program."""

    status: int
    """Its exit status, or minus the signal that ended it."""
    stdout: str
    """What is no UTF-8 is replaced; what was cut off ends with a note."""
    stderr: str
    limit: LimitName | None
    """The limit for which it was ended. A program that is refused something goes on, and says itself what it makes of it."""
    seconds: float

    @property
    def complaint(self) -> str:
        """The last line that it wrote to stderr: of a traceback, the exception."""
        return next((line.strip() for line in reversed(self.stderr.splitlines()) if line.strip()), "")


@dataclass(frozen=True)
class Sandbox:
    """Runs Python programs apart: a process of its own with bubblewrap's walls around it.

    ``unsafe_no_sandbox``: without walls, with limits alone.
    """

    limits: Limits = field(default_factory=Limits)
    unsafe_no_sandbox: bool = False

    def __post_init__(self) -> None:
        """Raises:
        ConfigError: there is no sandbox on this machine.
        """
        if not os.path.exists(f"/proc/self/task/{os.getpid()}/children"):
            raise ConfigError("programs are run on Linux alone, where /proc tells which process comes from which")
        if self.unsafe_no_sandbox:
            return
        if bubblewrap.installed() is None:
            raise ConfigError(f"there is no sandbox for programs: {HINT}")
        tried = self._play({"main.py": "print('in')"}, "", (), threading.Event())
        if tried.stdout != b"in\n":
            said = (tried.stderr.decode(errors="replace").strip().splitlines() or ["no word"])[-1]
            raise ConfigError(f"bubblewrap makes no sandbox here ({said}): {HINT}")

    async def run(self, files: Mapping[str, str], stdin: str = "", inherited: Sequence[int] = ()) -> Outcome:
        """Run ``main.py`` of ``files``, in a folder that is gone afterwards. ``inherited``: file descriptors, closed here once it has them.

        Raises:
            SandboxError: it did not begin.
        """
        stop = threading.Event()
        work = submit(self._threads, partial(self._play, files, stdin, inherited, stop))
        try:
            ended = await asyncio.wrap_future(work)
        finally:
            stop.set()
            if work.cancelled():  # before it had begun
                for fd in inherited:
                    os.close(fd)
        if ended.status is None:
            raise SandboxError(f"the sandbox did not start ({ended.stderr.decode(errors='replace').strip()[-200:]})")
        stdout, stderr = (_text(output, self.limits.output) for output in (ended.stdout, ended.stderr))
        return Outcome(ended.status, stdout, stderr, ended.limit, ended.seconds)

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(AT_ONCE, thread_name_prefix="sandbox")

    def _play(self, files: Mapping[str, str], stdin: str, inherited: Sequence[int], stop: threading.Event) -> Ended:
        order: dict[str, Any] = {"files": dict(files), "main": "main.py", "stdin": stdin, "uid": None, "watched": False}
        limits = {name: getattr(self.limits, name) for name in ("cpu", "memory", "file", "processes")}
        if self.unsafe_no_sandbox:
            return self._play_bare(order, limits, inherited, stop)
        program = bubblewrap.installed()
        assert program is not None
        order |= {"uid": bubblewrap.fresh_uid(), "folder": bubblewrap.FOLDER, "limits": limits}
        status, told = os.pipe()
        filtered = seccomp.program()
        filters = [] if filtered is None else [seccomp.in_memory(filtered)]
        command = bubblewrap.command(program, self.limits.disk, told, *filters)
        start = Start(command, seccomp.in_memory(json.dumps(order).encode()), (told, *filters, *inherited), status)
        return play(start, self.limits, stop)

    def _play_bare(self, order: dict[str, Any], limits: dict[str, int], inherited: Sequence[int], stop: threading.Event) -> Ended:
        cookie = secrets.token_hex(8)
        limits["processes"] += bare.running(os.getuid())
        with tempfile.TemporaryDirectory(prefix="veneer-sandbox-", ignore_cleanup_errors=True) as folder:
            order |= {"watched": True, "folder": folder, "limits": limits}
            start = Start(bare.command(), seccomp.in_memory(json.dumps(order).encode()), inherited, None, {bare.COOKIE: cookie})
            try:
                return play(start, self.limits, stop)
            finally:
                bare.sweep_strays(cookie)


def _text(output: bytes, limit: int) -> str:
    text = output[:limit].decode(errors="replace")
    return f"{text}\n[cut at {limit} bytes]" if len(output) > limit else text
