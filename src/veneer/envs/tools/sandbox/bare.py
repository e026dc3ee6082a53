"""Programs without bubblewrap: limits, a session and a folder of their own, an end, and no walls."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

from veneer.envs.tools.sandbox.bubblewrap import FLAGS, LAUNCH

COOKIE = "VENEER_SANDBOX"
"""Stands in the environment of a program's processes, by which they are found when they have left its tree."""


def command() -> list[str]:
    return [os.path.realpath(sys.executable), *FLAGS, str(LAUNCH)]


def running(uid: int) -> int:
    """Processes and threads of a user, which the kernel's limit counts together."""
    count = 0
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit() and folder.stat().st_uid == uid:
                count += len(os.listdir(folder / "task"))
    return count


def sweep_strays(cookie: str) -> None:
    """End every process with this cookie, also one that killed those that were to end it."""
    mark = f"{COOKIE}={cookie}".encode()
    while strays := [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if mark in _environment(pid)]:
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in strays:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        while any(map(_alive, strays)):
            time.sleep(0.001)


def _alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def _environment(pid: int) -> list[bytes]:
    """Empty for another user's, and for a process that has ended and is not yet reaped."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return []
