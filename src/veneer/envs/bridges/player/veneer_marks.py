"""All that an environment's process has started, wherever it stands in the tree of processes: it inherits a variable. Imported by both
sides of the pipe; standard library only."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

MARK = "VENEER_BRIDGE_MARK"
PATIENCE = 2.0
"""Seconds."""


def marked(mark: str) -> list[int]:
    """Other processes with this mark. Where there is no /proc, none."""
    found, wanted = [], f"{MARK}={mark}".encode()
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if wanted in environ.read_bytes().split(b"\0") and int(environ.parent.name) != os.getpid():
                found.append(int(environ.parent.name))
    return found


def kill_marked(mark: str) -> None:
    """Until they are gone, among them what they start meanwhile. What the kernel does not end within ``PATIENCE`` is left to it."""
    until = time.monotonic() + PATIENCE
    while (found := marked(mark)) and time.monotonic() < until:
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
