"""Runs a client in a process of its own and keeps what it says."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workplace import HERE, NANO

from server import Server

CLIENTS = HERE / "clients"
INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "SSL_CERT_FILE")
"""What a client sees of this process's environment: nothing of Veneer."""


@dataclass(frozen=True)
class Stage:
    """What every point of acceptance plays on."""

    python: Path
    """Of the clients' environment."""
    folder: Path
    """Where they start, with its tokenizers and data sets."""
    logs: Path
    server: Server

    def environment(self, url: str | None = None) -> dict[str, str]:
        url = url or self.server.url
        return {
            **{key: os.environ[key] for key in INHERITED if key in os.environ},
            "TINKER_BASE_URL": url,
            "TINKER_API_KEY": "tml-dummy",
            "OPENAI_BASE_URL": f"{url}/v1",
            "OPENAI_API_KEY": "dummy",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(self.logs.parent / "datasets"),
            "TINKER_COOKBOOK_RUNS_DIR": str(self.logs.parent / "cookbook-runs"),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
            "ACCEPTANCE_BASE": str(NANO),
        }

    def start(self, name: str, *args: object, url: str | None = None, typed: str = "") -> subprocess.Popen[bytes]:
        """``python ARGS`` in the clients' environment; what it prints goes behind what the log holds. ``typed``: standard input."""
        with (self.logs / f"{name}.log").open("ab") as log:
            command = [str(self.python), *map(str, args)]
            log.write(f"$ {' '.join(command)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                command, cwd=self.folder, env=self.environment(url), stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT
            )
        assert process.stdin is not None
        with process.stdin:
            process.stdin.write(typed.encode())
        return process

    def run(self, name: str, *args: object, patience: float = 900.0, url: str | None = None, typed: str = "") -> float:
        """Run to the end and return the seconds.

        Raises:
            AssertionError: it failed, or did not end in time.
        """
        clock = time.monotonic()
        process = self.start(name, *args, url=url, typed=typed)
        try:
            code = process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(f"not done after {patience:.0f} s") from None
        finally:
            if process.poll() is None:  # an interrupt: leave nobody behind
                process.kill()
        assert code == 0, f"exit code {code}: {last_line(self.logs / f'{name}.log')}"
        return time.monotonic() - clock

    def checks(self, name: str, *args: object, patience: float = 900.0) -> dict[str, Any]:
        """Run ``clients/NAME.py``, a list of checks, and return its figures."""
        report = self.logs / f"{name}.json"
        report.unlink(missing_ok=True)
        try:
            self.run(name, CLIENTS / f"{name}.py", "--report", report, *args, patience=patience)
        except AssertionError as error:
            if not report.exists():
                raise
            failed = json.loads(report.read_text())["failed"]
            raise AssertionError("; ".join(f"{check}: {why}" for check, why in failed.items()) or str(error)) from None
        document = json.loads(report.read_text())
        return {"checks": len(document["passed"]), **document["figures"]}


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON documents of a file, one a line; a line that is being written is left out."""
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def column(rows: Sequence[dict[str, Any]], key: str) -> list[float]:
    """A metric over the steps that have it."""
    return [row[key] for row in rows if key in row]
