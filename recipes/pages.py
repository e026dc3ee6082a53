"""What the scripts share that measure whole runs: commands in a home, rates in words, and sections of a page that a command writes."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def veneer(home: str | Path, *arguments: object) -> Any:
    """The JSON document of ``veneer ARGUMENTS --json``, run from the repository with a VENEER_HOME."""
    command = [sys.executable, "-m", "veneer", *map(str, arguments), "--json"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"VENEER_HOME": str(home)}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed: {done.stdout}")
    return json.loads(done.stdout)


def rate(r: Mapping[str, float], form: str = ".3f") -> str:
    return f"{r['value']:{form}} [{r['low']:{form}}, {r['high']:{form}}]"


def machine() -> str:
    return f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {datetime.date.today().isoformat()}"


def write_section(page: Path, title: str, text: str) -> None:
    """Put ``text`` under ``title``, in place of what stands there up to the next title, or at the end."""
    before, _, behind = page.read_text().partition(f"\n{title}\n")
    after = behind.partition("\n## ")[2]
    page.write_text(f"{before.rstrip()}\n\n{title}\n\n{text.strip()}\n" + (f"\n## {after}" if after else ""))
