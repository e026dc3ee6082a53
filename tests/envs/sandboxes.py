"""Whether there is a sandbox here, and marks for tests that need one."""

from __future__ import annotations

import os

import pytest

from veneer.envs.tools.sandbox import Sandbox
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
