"""A server in a process of its own, as a user would start it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path

NAMES = ("Qwen/Qwen3-8B", "Qwen/Qwen3.5-9B-Base", "Qwen/Qwen3.5-9B", "Qwen/Qwen3.5-4B", "Qwen/Qwen3.6-35B-A3B")
ALIASES = dict.fromkeys(NAMES, "nano")
"""Names that the recipes know a renderer for, or ask for of themselves -> what answers under them."""


def command_of(port: int, aliases: Mapping[str, str]) -> list[str]:
    pairs = [part for name, base in aliases.items() for part in ("--alias", f"{name}={base}")]
    return [sys.executable, "-m", "veneer", "serve", "--base", "nano", *pairs, "--host", "127.0.0.1", "--port", str(port)]


class Server:
    """``veneer serve`` on a free port, with a VENEER_HOME of its own. The port and the home outlive the process."""

    def __init__(self, home: Path, log: Path) -> None:
        self.home, self.log, self.port = home, log, free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.started_at = 0.0
        """Wall clock, when the process of now was started."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, patience: float = 120.0) -> float:
        """Start it and return the seconds until it answered.

        Raises:
            AssertionError: it ended, or did not answer in time.
        """
        self.log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "VENEER_HOME": str(self.home), "HF_HUB_OFFLINE": "1"}
        self.started_at, clock = time.time(), time.monotonic()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command_of(self.port, ALIASES), stdout=log, stderr=log, env=environment)
        while not self.answers():
            assert self.process.poll() is None, f"the server ended with code {self.process.returncode}; see {self.log}"
            assert time.monotonic() - clock < patience, f"no answer within {patience:.0f} s; see {self.log}"
            time.sleep(0.05)
        return time.monotonic() - clock

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/healthz", timeout=2) as response:
                return bool(json.load(response)["status"] == "ok")
        except (OSError, ValueError, KeyError):
            return False

    def kill(self) -> None:
        """kill -9: nothing is flushed, nobody is told."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> int:
        """As ctrl-C does; returns the exit code."""
        if self.process is None or self.process.poll() is not None:
            return 0 if self.process is None else int(self.process.returncode)
        self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError("the server did not end within 30 s of an interrupt") from None


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
