"""Whether there is a sandbox here, marks for tests that need one, and what tests have started."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from veneer.envs.tools.sandbox import Sandbox
from veneer.envs.tools.sandbox.launch import descendants
from veneer.types import ConfigError


def _no_walls() -> str:
    """Why there is no sandbox here; empty: there is one."""
    try:
        Sandbox()
    except ConfigError as error:
        return str(error)
    return ""


NO_WALLS = _no_walls()
LINUX = pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="programs are run on Linux alone")
WALLED = pytest.mark.skipif(bool(NO_WALLS), reason=NO_WALLS)
BOTH = [pytest.param(False, id="bubblewrap", marks=WALLED), pytest.param(True, id="bare")]


def children(word: str) -> set[int]:
    """Processes that come from this one, with this word in their command line."""
    return {pid for pid in descendants(os.getpid()) if word in command_of(pid)}


def command_of(pid: int) -> list[str]:
    """Empty: it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return []
