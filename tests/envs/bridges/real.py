"""The libraries behind the bridges, each in an environment of its own under .bench, and the tests that need them. ``make bridges``.

They are too heavy for every test run (a minute of installing and half a gigabyte each) and do not agree with each other's pins.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
PACKAGES = {
    "verifiers-v0": ("verifiers[rg]==0.3.1",),  # the last with load_environment
    "verifiers-v1": ("verifiers==0.4.0", "datasets==5.1.0"),  # reverse_text reads its problems with datasets
    "openenv": ("openenv==0.10.0",),
    "openenv-core": ("openenv-core==0.3.0",),  # the older package of the same protocol
}


def python_of(name: str) -> Path:
    return ROOT / f".bench/{name}/bin/python"


def ensure(name: str) -> None:
    """Make an environment, unless it is there."""
    python = python_of(name)
    if not (python.parent / "complete").exists():
        print(f"making .bench/{name}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", python.parents[1]], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES[name]], check=True)
        (python.parent / "complete").touch()


def main() -> int:
    for name in PACKAGES:
        ensure(name)
    command = [sys.executable, "-m", "pytest", "-n", "0", "-rs", str(Path(__file__).parent), *sys.argv[1:]]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "VENEER_BRIDGES": "real"}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
