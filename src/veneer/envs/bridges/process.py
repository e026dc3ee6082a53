"""The process in which an environment plays: its commands, what it says, what it printed last, its end."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from veneer.envs.bridges.chat import Json
from veneer.envs.bridges.errors import BridgeError
from veneer.envs.bridges.player.veneer_marks import MARK, kill_marked

PLAYER = Path(__file__).parent / "player"
MAX_LINE = 2**20
"""Bytes of one message."""
TAIL = 4096
"""Bytes of output that are remembered."""
GRACE = 8.0
"""Seconds that it has to end by itself, which the player does within 5."""


class Process:
    """Started at once. Two threads listen: one to what it says, one to what it prints, so that it never waits for our loop."""

    def __init__(self, python: str, settings: Mapping[str, Any], hear: Callable[[Process, Json | None], None]) -> None:
        """``hear`` is called on a thread with every message, and with None when it has ended.

        Raises:
            OSError: there is no such interpreter.
        """
        self.ready: Future[Json] = Future()
        """What it says of the environment once that is loaded; a BridgeError if it is not to be had."""
        self.hung = False
        self._hear, self._printed, self._mark = hear, b"", secrets.token_hex(8)
        self._popen = subprocess.Popen(
            [python, str(PLAYER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, MARK: self._mark},
            start_new_session=True,  # a signal from the terminal is ours to answer
        )
        assert self._popen.stdin is not None
        self._stdin = self._popen.stdin.fileno()
        self._write(settings)
        os.set_blocking(self._stdin, False)  # one that does not read must not hold us
        self._printing = threading.Thread(target=self._watch, daemon=True)
        self._printing.start()
        self._listening = threading.Thread(target=self._listen, daemon=True)
        self._listening.start()

    @property
    def pid(self) -> int:
        return self._popen.pid

    def tell(self, **command: Any) -> None:
        self._write(command)

    def _write(self, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError, BlockingIOError):  # its end is heard, or its silence noticed
            os.write(self._stdin, (json.dumps(message) + "\n").encode())

    def _listen(self) -> None:
        assert self._popen.stdout is not None
        while line := self._popen.stdout.readline(MAX_LINE):
            try:
                message = json.loads(line)
            except ValueError:
                message = None
            if not isinstance(message, dict):  # printed before the program had begun
                self._printed = (self._printed + line)[-TAIL:]
            elif "ready" in message:
                self.ready.set_result(message["ready"])
            elif "refused" in message:
                self.ready.set_exception(BridgeError(message["refused"]))
            else:
                self._hear(self, message)
        self._popen.wait()
        kill_marked(self._mark)
        self._printing.join(timeout=1.0)
        if not self.ready.done():
            self.ready.set_exception(BridgeError(self.epitaph()))
        self._hear(self, None)

    def _watch(self) -> None:
        assert self._popen.stderr is not None
        while chunk := os.read(self._popen.stderr.fileno(), 65536):
            self._printed = (self._printed + chunk)[-TAIL:]

    def epitaph(self) -> str:
        """How it ended, and the last line that it printed."""
        code = self._popen.poll()
        if self.hung:
            end = "answered no more and was killed"
        elif code is not None and code < 0:
            end = f"was killed by signal {-code}"
        else:
            end = f"ended with exit code {code}"
        lines = [line for line in self._printed.decode(errors="replace").splitlines() if line.strip()]
        return f"the environment's process {end}" + (f"; its last line: {lines[-1].strip()[:300]}" if lines else "")

    def kill(self) -> None:
        self._popen.kill()

    def close(self) -> None:
        """Let it end, or make it, and wait until it has, with all that it has started."""
        with contextlib.suppress(OSError):
            assert self._popen.stdin is not None
            self._popen.stdin.close()
        try:
            self._popen.wait(GRACE)
        except subprocess.TimeoutExpired:
            self.kill()
        self._listening.join()
