"""One program, from its start until nothing is left of it. Runs on a thread of its own: the event loop may be busy with a model for longer
than a program is allowed to take."""

from __future__ import annotations

import contextlib
import os
import re
import select
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Self

from veneer.envs.tools.sandbox.launch import STOPPED, descendants, sweep

LimitName = Literal["cpu", "wall", "memory", "output", "processes", "files"]
TICK = 0.05
"""Seconds between two looks at what a program has become."""
LAST_WAIT = 5.0
"""Seconds that what was killed may take to be gone."""
PAGE = os.sysconf("SC_PAGE_SIZE")
AROUND = 2
"""Processes that stay around a program, and are not its own."""


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    cpu: int = 5
    """Seconds of each process."""
    wall: float = 8.0
    """Seconds from start to end, however busy the machine is. Keep it below ``env.seconds``."""
    memory: int = 512 * 2**20
    """Bytes of each process, and of all together as far as they are in memory."""
    disk: int = 64 * 2**20
    """Bytes of all files together; with bubblewrap alone."""
    file: int = 16 * 2**20
    """Bytes of one file."""
    files: int = 4096
    """Files and folders; with bubblewrap alone."""
    processes: int = 16
    """Threads among them."""
    output: int = 64 * 2**10
    """Bytes of stdout, and as many of stderr."""


@dataclass(frozen=True)
class Start:
    """How a program is started, and what this process holds open for it until then."""

    command: Sequence[str]
    order: int
    """What it reads first, as a file descriptor."""
    inherited: Sequence[int] = ()
    """File descriptors that it gets beside stdin, stdout and stderr. They and ``order`` are closed here as soon as it has them."""
    status: int | None = None
    """Where bubblewrap tells how the program ended; closed here in the end. None: as ``command`` ended."""
    environment: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Ended:
    status: int | None
    """Its exit status, or minus the signal that ended it; None: it never began."""
    stdout: bytes
    """At most one byte longer than the limit."""
    stderr: bytes
    limit: LimitName | None
    """The limit for which it was ended."""
    seconds: float


def play(start: Start, limits: Limits, stop: threading.Event) -> Ended:
    """``stop``: nobody waits for it any more."""
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        walls = None if start.status is None else stack.enter_context(_Walls(start.status))
        process = _spawn(start)
        assert process.stdout is not None
        assert process.stderr is not None
        outlets = [_Outlet(stack.enter_context(pipe).fileno(), limits.output) for pipe in (process.stdout, process.stderr)]
        try:
            limit = _attend(process, outlets, walls, _Watch(process.pid, limits), stop)
        finally:
            code = _end(process, walls)
        for outlet in outlets:  # what it said before it was ended
            outlet.read()
        if walls is not None:
            walls.read()
            code = STOPPED + signal.SIGKILL if walls.code is None and (limit or stop.is_set()) else walls.code
    seconds = time.monotonic() - began
    status = code if code is None or not STOPPED < code <= STOPPED + signal.SIGRTMAX else STOPPED - code
    if limit is None and (status == -signal.SIGXCPU or (status == -signal.SIGKILL and seconds > limits.cpu)):
        limit = "cpu"
    return Ended(status, bytes(outlets[0].kept), bytes(outlets[1].kept), limit, seconds)


class _Walls:
    """What bubblewrap tells of a sandbox, and a hold on its first process: with that one ends every other."""

    def __init__(self, fd: int) -> None:
        self.fd, self._told = fd, b""
        self._first: int | None = None
        os.set_blocking(fd, False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)
        if self._first is not None:
            os.close(self._first)

    @property
    def code(self) -> int | None:
        """The program's exit status, once it is told."""
        return self._number(b"exit-code")

    def read(self) -> bool:
        """Take in what is told. False: nothing will follow."""
        try:
            piece = os.read(self.fd, 2**12)
        except BlockingIOError:
            return True
        self._told += piece
        if self._first is None and (pid := self._number(b"child-pid")) is not None:
            with contextlib.suppress(ProcessLookupError):
                self._first = os.pidfd_open(pid)
        return bool(piece)

    def _number(self, name: bytes) -> int | None:
        """Of the JSON documents, which may not be whole yet."""
        found = re.search(rb'"%s": (\d+)\s*[,}]' % name, self._told)
        return int(found[1]) if found else None

    def raze(self) -> None:
        """End it, and wait until nothing of it is left. Its first process has to be known: killed before that, bubblewrap leaves it behind,
        asleep."""
        until = time.monotonic() + LAST_WAIT
        while self._first is None and select.select([self.fd], [], [], max(0.0, until - time.monotonic()))[0] and self.read():
            pass
        if self._first is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._first, signal.SIGKILL)
            select.select([self._first], [], [], LAST_WAIT)


def _spawn(start: Start) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            start.command,
            stdin=start.order,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=start.environment,
            pass_fds=start.inherited,
            start_new_session=True,
            bufsize=0,
        )
    finally:
        for fd in (start.order, *start.inherited):
            os.close(fd)


class _Outlet:
    """A pipe that a program writes to."""

    def __init__(self, fd: int, limit: int) -> None:
        self.fd, self.limit, self.kept = fd, limit, bytearray()
        os.set_blocking(fd, False)

    def read(self) -> bool:
        """Take in what is there, up to one byte more than the limit. False: nothing will follow."""
        with contextlib.suppress(BlockingIOError):
            while room := self.limit + 1 - len(self.kept):
                piece = os.read(self.fd, min(room, 2**16))
                self.kept += piece
                if not piece:
                    return False
        return True


class _Watch:
    """What is seen of a program from outside, for limits that the kernel does not keep for us."""

    def __init__(self, pid: int, limits: Limits) -> None:
        self.pid, self.limits, self.began = pid, limits, time.monotonic()
        self._seen: set[int] = set()
        self._goes_first(pid)

    def passed(self) -> LimitName | None:
        """The limit that the program has passed."""
        if time.monotonic() - self.began > self.limits.wall:
            return "wall"
        inside = descendants(self.pid)
        for pid in {*inside} - self._seen:
            self._goes_first(pid)
        if sum(map(_threads, inside)) > self.limits.processes + AROUND:
            return "processes"
        if sum(map(_resident, inside)) > self.limits.memory:
            return "memory"
        return "files" if inside and _files(inside[0]) > self.limits.files else None

    def _goes_first(self, pid: int) -> None:
        """When the machine is out of memory, the kernel is to end this program and not the one that trains."""
        self._seen.add(pid)
        with contextlib.suppress(OSError), open(f"/proc/{pid}/oom_score_adj", "w") as file:
            file.write("1000")


def _threads(pid: int) -> int:
    with contextlib.suppress(OSError):
        return len(os.listdir(f"/proc/{pid}/task"))
    return 0


def _resident(pid: int) -> int:
    """Bytes of its own in memory; pages that a fork left shared count for both."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/statm") as file:
        _, resident, shared, *_ = map(int, file.read().split())
        return (resident - shared) * PAGE
    return 0


def _files(pid: int) -> int:
    """Files in the sandbox's /tmp; 0 where there is no sandbox, or none to be seen."""
    with contextlib.suppress(OSError):
        inside, outside = os.statvfs(f"/proc/{pid}/root/tmp"), os.statvfs("/proc/self/root/tmp")
        return inside.f_files - inside.f_ffree if inside.f_fsid != outside.f_fsid else 0
    return 0


def _attend(
    process: subprocess.Popen[bytes], outlets: Sequence[_Outlet], walls: _Walls | None, watch: _Watch, stop: threading.Event
) -> LimitName | None:
    """Until the program has ended, or must be: for which limit."""
    look = watch.began + TICK
    with selectors.DefaultSelector() as selector:
        for source in (*outlets, *([walls] if walls else [])):
            selector.register(source.fd, selectors.EVENT_READ, source)
        while not stop.is_set():
            if selector.get_map():
                for key, _ in selector.select(max(0.0, look - time.monotonic())):
                    if not key.data.read():
                        selector.unregister(key.fd)
                if any(len(outlet.kept) > outlet.limit for outlet in outlets):
                    return "output"
            else:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.001, look - time.monotonic()))
                    return None
            if time.monotonic() >= look:
                if process.poll() is not None:
                    return None
                if (limit := watch.passed()) is not None:
                    return limit
                look = time.monotonic() + TICK
    return None


def _end(process: subprocess.Popen[bytes], walls: _Walls | None) -> int:
    """Its exit status, once nothing runs of it any more."""
    if walls is not None:
        walls.raze()
        process.kill()
    elif process.poll() is None:
        sweep(process.pid)
        process.send_signal(signal.SIGCONT)  # what stays around it may have been stopped by it
    try:
        return process.wait(LAST_WAIT)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
