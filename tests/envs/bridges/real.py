"""The libraries behind the bridges, each in an environment of its own under .bench, and the tests that need them. ``make bridges``.

They are too heavy for every test run (a minute of installing and half a gigabyte each) and do not agree with each other's pins.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[3]
PACKAGES = {
    "verifiers-v0": ("verifiers[rg]==0.3.1",),  # the last with load_environment
    "verifiers-v1": ("verifiers==0.4.0", "datasets==5.1.0"),  # reverse_text reads its problems with datasets
    "openenv": ("openenv==0.10.0",),
    "openenv-core": ("openenv-core==0.3.0",),  # the older package of the same protocol
}


SOURCE = os.environ.get("VENEER_VERIFIERS_SOURCE", "https://github.com/PrimeIntellect-ai/verifiers")
"""Where git finds the public environments, which no package index has; a local copy does too."""
PUBLIC = ROOT / ".bench/public"
ENVIRONMENTS = {
    "9daf5a9337e1d3516b0f7086909db2cbf24a42b6": ("reasoning_gym_env/reasoning_gym_env.py", "tool_test/tool_test.py"),
    "a60a606ecc4d309247edf9ff92c3eabca362781f": ("glossary/glossary", "reverse_text/reverse_text"),
}
"""commit -> the modules of its folder ``environments`` that are played, unchanged: two of the classic interface, two of v1."""


def ensure_public() -> None:
    """Take the public environments out of their repository, unless they are there."""
    if (PUBLIC / "complete").exists():
        return
    PUBLIC.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as clone:
        subprocess.run(["git", "clone", "--quiet", "--bare", SOURCE, clone], check=True)
        for commit, modules in ENVIRONMENTS.items():
            for module in modules:
                folder = f"environments/{Path(module).parent}"
                archive = subprocess.run(["git", "-C", clone, "archive", commit, f"environments/{module}"], check=True, capture_output=True)
                strip = str(folder.count("/") + 1)
                subprocess.run(["tar", "-x", "-C", PUBLIC, f"--strip-components={strip}"], input=archive.stdout, check=True)
    (PUBLIC / "complete").touch()


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
    ensure_public()
    for name in PACKAGES:
        ensure(name)
    command = [sys.executable, "-m", "pytest", "-n", "0", "-rs", str(Path(__file__).parent), *sys.argv[1:]]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "VENEER_BRIDGES": "real"}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
